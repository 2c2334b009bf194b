"""`openrlhf-pgrpo factorize`: a factorized reward model on a frozen backbone, in seconds to minutes."""

from pathlib import Path

from openrlhf_pgrpo.files import check_folder, data_in, whole_file
from openrlhf_pgrpo.host.flags import add_trust


def add_to(commands) -> None:
    parser = commands.add_parser("factorize", help="fit a reward model for many users on a frozen backbone")
    add_data(parser)
    parser.add_argument("--backbone", required=True, help="Folder or hub name of a causal model or an encoder.")
    parser.add_argument("--output", type=Path, required=True, help="Folder to write the reward model to.")
    parser.add_argument("--factors", type=int, help="Number of base rewards. Default: by cross-validation.")
    parser.add_argument("--l2", type=float, help="Penalty on both factors. Default: by cross-validation.")
    parser.add_argument(
        "--pooling",
        choices=("last", "mean"),
        default="last",
        help="State that the head sees: last token of the text (default, for causal models) or mean (for encoders).",
    )
    parser.add_argument(
        "--chat_template",
        metavar="MODEL",
        help="Write texts by the chat template of this model (folder or hub name), as its policy is prompted; plain: "
        "without one. Default: the backbone's own template if prompts are lists of messages, else plain.",
    )
    parser.add_argument("--curve", type=Path, help="Figure to draw of the cross-validated curve: .png, .svg or .pdf")
    add_columns(parser)
    add_trust(parser)
    parser.set_defaults(run=run)


def add_data(parser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="Rows with user, prompt, chosen, rejected[, preference], or user, chosen, rejected as conversations, or "
        "user, prompt, response, rating: a file (JSONL, JSON, CSV, Parquet, arrow), a folder that `datasets` saved, "
        "or a data set on the hub.",
    )
    parser.add_argument("--split", help="Split of the data, if there are several. Default: train")


def add_columns(parser) -> None:
    for column in ("user", "prompt", "chosen", "rejected", "preference", "response", "rating"):
        parser.add_argument(f"--{column}_key", default=column, help=f"Column of the data. Default: {column}")
    parser.add_argument(
        "--pairs", type=int, help="If rows are ratings: pairs of responses to draw of each user. Default: all."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of what is drawn. Default: 0")


def columns_in(args):
    """The columns that the flags of `add_columns` name."""
    from openrlhf_pgrpo.models.tables import Columns

    return Columns(*(getattr(args, f"{column}_key") for column in Columns._fields))


def run(args) -> None:
    from openrlhf_pgrpo.models.factorize import factorize

    if args.curve:
        check_curve(args)
    given = (args.factors, args.l2, args.pooling, columns_in(args), args.chat_template, args.split)
    choice = factorize(args.data, args.backbone, args.output, *given, args.pairs, args.seed)
    if choice is not None:
        print(choice)
        if args.curve:
            draw(choice, args.curve)
    print(args.output)


def check_curve(args) -> None:
    """Raises ValueError if there can be no curve, or if it would make the model's folder a foreign one."""
    path, output = args.curve, args.output
    if path.suffix not in (".png", ".svg", ".pdf") or not path.parent.is_dir():
        raise ValueError(f"--curve needs a .png, .svg or .pdf in a folder that exists, got {path}: name another")
    if args.factors is not None and args.l2 is not None:
        raise ValueError("--curve needs something to choose, got both --factors and --l2: leave one of them out")
    check_folder(path, "--curve", data_in(args.data, "--data"))
    if path.resolve().is_relative_to(output.resolve()):
        raise ValueError(
            f"--curve needs a place outside of --output {output}, which holds a model alone, got {path}: name another"
        )
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as missing:
        raise ValueError(
            f'--curve needs {missing.name}, which is not installed: pip install "openrlhf-pgrpo[pref]" or leave it out'
        ) from missing


def draw(choice, path: Path) -> None:
    """Draws the curve with its standard errors and the recommended number."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 4))
    ax.errorbar(choice.factors, choice.loss, choice.error, fmt="o-", color="#0072B2", capsize=2)
    ax.axvline(choice.recommended, color="#D55E00", linestyle=":", label=f"recommended: {choice.recommended}")
    ax.set_xlabel("base rewards")
    ax.set_ylabel("held-out log loss ± standard error")
    ax.set_xticks(choice.factors)
    ax.grid(alpha=0.3)
    ax.legend()
    fig.tight_layout()
    with whole_file(path) as file:
        fig.savefig(file, format=path.suffix[1:], dpi=100)
    plt.close(fig)
