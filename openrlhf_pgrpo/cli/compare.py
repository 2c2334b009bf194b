"""`openrlhf-pgrpo compare`: two policies on the same prompts, by win rate for each preference group."""

from pathlib import Path

from openrlhf_pgrpo.cli.people import add_chat_template, arguments
from openrlhf_pgrpo.host.flags import add_trust


def add_to(commands) -> None:
    parser = commands.add_parser("compare", help="compare two policies by win rate for each preference group")
    parser.add_argument(
        "--policies", nargs=2, required=True, metavar=("A", "B"), help="Folders or hub names of the two policies."
    )
    parser.add_argument(
        "--data",
        required=True,
        help="Rows with prompt, a text or messages[, user, pref_group], as factorize reads them",
    )
    parser.add_argument("--split", help="Split of the data, if there are several. Default: train")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="Folder for answers, verdicts and the result. The same command goes on where one was interrupted.",
    )
    judge = parser.add_mutually_exclusive_group(required=True)
    judge.add_argument("--model", help="Judge by the users' rewards: folder or hub name of a factorized reward model.")
    judge.add_argument(
        "--judge",
        metavar="URL",
        help="Judge by a language model: address of a server that speaks the OpenAI protocol. Its key, if it asks for "
        "one, comes from the environment variable OPENAI_API_KEY.",
    )
    parser.add_argument(
        "--profile",
        dest="profiles",
        type=Path,
        nargs="+",
        default=[],
        help="With --model: profiles of new users in the data, files or folders.",
    )
    parser.add_argument(
        "--population", action="store_true", help="With --model: the average user judges for unknown users."
    )
    add_chat_template(parser)
    parser.add_argument("--judge_model", help="With --judge: name of the model. Default: the first of the server.")
    parser.add_argument(
        "--judge_prompt",
        type=Path,
        metavar="FILE",
        help="With --judge: its prompt, with {prompt}, {a}, {b} and {pref_group} where they go. It has to ask for a "
        "last line that is A, B or tie. Default: one in the package.",
    )
    parser.add_argument(
        "--pref_group_texts",
        type=Path,
        metavar="FILE",
        help="With --judge: JSON object with a text for each preference group, which goes to {pref_group}. Default: "
        "its name.",
    )
    parser.add_argument(
        "--judge_tokens", type=int, default=1024, help="With --judge: longest answer of the judge. Default: 1024"
    )
    parser.add_argument(
        "--judge_timeout", type=float, default=120.0, help="With --judge: seconds for one answer. Default: 120"
    )
    parser.add_argument("--prompt_key", default="prompt", help="Column of prompts. Default: prompt")
    parser.add_argument("--user_key", help="Column of users. Default: user, if there is one")
    parser.add_argument("--pref_group_key", help="Column of preference groups. Default: pref_group, if there is one")
    parser.add_argument(
        "--plain_prompts",
        action="store_true",
        help="Prompt the policies with the texts as they are. Default: each by its own chat template, if both have "
        "one.",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="Of the policies. Default: 1")
    parser.add_argument("--max_tokens", type=int, default=512, help="Longest answer of a policy. Default: 512")
    parser.add_argument("--seed", type=int, default=0, help="Of the policies' sampling. Default: 0")
    add_trust(parser)
    parser.set_defaults(run=run)


def run(args) -> None:
    from openrlhf_pgrpo.people.compare import compare

    try:
        print(*compare(**arguments(args)), sep="\n")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command goes on with what is in {args.output}") from None
