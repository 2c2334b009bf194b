"""`openrlhf-pgrpo evaluate`: how well a factorized reward model predicts people, as a table, JSON and a page."""

import time
from pathlib import Path

from openrlhf_pgrpo.cli.factorize import add_columns, columns_in
from openrlhf_pgrpo.cli.people import add_batch_size, add_chat_template
from openrlhf_pgrpo.files import check_distinct, check_folder, data_in, held_in
from openrlhf_pgrpo.host.flags import add_trust

GAIN = "gain: accuracy minus that of one reward for all on the same answers. ±: standard error over people"


def add_to(commands) -> None:
    parser = commands.add_parser("evaluate", help="measure how well a reward model predicts known and new users")
    parser.add_argument("--model", required=True, help="Folder or hub name of a factorized reward model.")
    parser.add_argument("--data", type=Path, required=True, help="Held-out rows, as factorize reads them.")
    parser.add_argument("--split", help="Split of the data, if there are several. Default: train")
    parser.add_argument("--output", type=Path, help="JSON file for all numbers.")
    parser.add_argument("--page", type=Path, help="HTML file with tables and figures.")
    parser.add_argument("--scores", type=Path, help="File to keep the base rewards in. Read if it exists.")
    parser.add_argument("--pref_group_key", help="Column of the data with the preference group of the user.")
    add_chat_template(parser)
    add_batch_size(parser)
    add_columns(parser)
    add_trust(parser)
    parser.set_defaults(run=run)


def run(args) -> None:
    began = time.time()
    try:
        measure(args)
    except KeyboardInterrupt:
        files = [file for file in (args.scores, args.output) if file is not None and file.exists()]
        kept = [str(file) for file in files if file.stat().st_mtime >= began]
        raise KeyboardInterrupt(f"on the disk: {', '.join(kept) or 'nothing'}") from None
    except ModuleNotFoundError as missing:
        advice = 'pip install "openrlhf-pgrpo[pref,report]"'
        said = f"it needs {missing.name}, which is not installed: {advice}"
        raise ModuleNotFoundError(said, name=missing.name) from missing


def measure(args) -> None:
    from openrlhf_pgrpo.people.evaluate import evaluate
    from openrlhf_pgrpo.people.evaluation_tables import lines, tables

    if args.page is not None:
        from openrlhf_pgrpo.report.evaluation import write_page  # plotly is no part of [pref]
    files = {"--output": args.output, "--scores": args.scores, "--page": args.page}
    check_distinct({"--data": args.data, **files})
    for flag, file in files.items():
        if file is not None:
            check_folder(file, flag, {**data_in(args.data, "--data"), **held_in(args.model, "--model")})
    given = (args.scores, columns_in(args), args.pref_group_key, args.chat_template, args.split, args.batch_size)
    result = evaluate(args.model, args.data, args.output, *given, args.pairs, args.seed)
    made = tables(result)
    for table in made:
        print(*lines(table), sep="\n")
    print(GAIN, *result["notes"], sep="\n")
    if args.page is not None:
        write_page(result, made, args.page)
    print(*(file for file in (args.output, args.page) if file is not None), sep="\n")
