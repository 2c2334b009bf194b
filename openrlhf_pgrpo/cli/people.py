"""`openrlhf-pgrpo elicit`, `refit`, `rerank` and `groups`: a factorized reward model used for people."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from openrlhf_pgrpo.cli.factorize import add_columns, columns_in
from openrlhf_pgrpo.host.flags import add_trust


def add_to(commands) -> None:
    add_elicit(commands.add_parser("elicit", help="learn a new user from about ten questions"))
    add_refit(commands.add_parser("refit", help="fit profiles again, for a model that was trained again"))
    add_rerank(commands.add_parser("rerank", help="order candidate responses for a user, best first"))
    add_groups(commands.add_parser("groups", help="cluster users into preference groups for P-GRPO"))


def add_model(parser) -> None:
    parser.add_argument("--model", required=True, help="Folder or hub name of a factorized reward model.")
    add_trust(parser)


def add_chat_template(parser) -> None:
    parser.add_argument(
        "--chat_template",
        metavar="MODEL",
        help="For a reward model from before forms of texts were recorded: the folder or hub name of the model whose "
        "chat template it was, or plain.",
    )


def add_batch_size(parser) -> None:
    parser.add_argument("--batch_size", type=above_0, default=16, help="Texts scored at once. Default: 16")


def above_0(word: str) -> int:
    if not word.isdecimal() or not int(word):
        raise argparse.ArgumentTypeError(f"it needs a whole number of at least 1, got {word!r}")
    return int(word)


def add_elicit(parser) -> None:
    add_model(parser)
    add_chat_template(parser)
    parser.add_argument(
        "--pool",
        type=Path,
        help="Pairs to ask about: rows with prompt, a, b, texts or messages; or rows as factorize reads them, whoever "
        "preferred what.",
    )
    parser.add_argument("--user", help="Name of the new user.")
    parser.add_argument(
        "--profile",
        type=Path,
        help="File to save the answers in; an existing one is continued. Default: <user>.json, where characters that "
        "file names cannot have are written as in a URL.",
    )
    parser.add_argument(
        "--answers",
        type=Path,
        help="Ask nobody, but learn everybody in these rows whom the model does not know: rows as factorize reads "
        "them. Needs --profiles.",
    )
    parser.add_argument("--profiles", type=Path, help="With --answers: folder to write the profiles to, new or not.")
    parser.add_argument("--split", help="Split of the pool or the answers, if there are several. Default: train")
    add_columns(parser)
    parser.add_argument("--scores", type=Path, help="File to keep the base rewards in. Read if it exists.")
    parser.add_argument("--questions", type=int, help="Number of questions. Default: 10")
    parser.add_argument(
        "--entropy", type=float, help="Stop earlier, once the predictive entropy per pair is below so many bits."
    )
    add_batch_size(parser)
    parser.add_argument("--web", action="store_true", help="Ask on a page in the browser instead of the terminal.")
    parser.add_argument("--host", help="Address of the page with --web. Default: 127.0.0.1, this machine.")
    parser.add_argument("--port", type=int, help="Port of the page with --web. Default: any free one.")
    parser.set_defaults(run=run_elicit)


def add_refit(parser) -> None:
    add_model(parser)
    add_chat_template(parser)
    parser.add_argument(
        "--profile",
        dest="profiles",
        type=Path,
        nargs="+",
        required=True,
        help="Profiles of any model: files, or folders. They stay as they are.",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="Folder to write the profiles to, new or with others."
    )
    parser.add_argument(
        "--pool",
        type=Path,
        help="For profiles from before texts were kept in them: the pool that they were asked from, as it was.",
    )
    add_batch_size(parser)
    parser.set_defaults(run=run_refit)


def add_rerank(parser) -> None:
    add_model(parser)
    add_chat_template(parser)
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--user", help="One of the model's users.")
    who.add_argument("--profile", type=Path, help="The profile of a new user, written by openrlhf-pgrpo elicit.")
    parser.add_argument("--population", action="store_true", help="Use the average user if the user is unknown.")
    parser.add_argument(
        "--candidates",
        required=True,
        help="Rows with prompt, and responses, a list; texts or messages: a file (JSONL, JSON, Parquet, arrow; with "
        "--generate also CSV), a folder that `datasets` saved, or a data set on the hub",
    )
    parser.add_argument("--split", help="Split of the candidates, if there are several. Default: train")
    parser.add_argument("--prompt_key", default="prompt", help="Column of prompts. Default: prompt")
    parser.add_argument("--responses_key", default="responses", help="Column of responses. Default: responses")
    parser.add_argument("--output", type=Path, required=True, help="JSONL: the same with rewards, order and best")
    parser.add_argument(
        "--generate", dest="policy", metavar="POLICY", help="Sample the responses with vLLM from this model instead."
    )
    parser.add_argument("--n", type=int, help="Responses to each prompt with --generate. Default: 8")
    parser.add_argument("--temperature", type=float, help="Temperature with --generate. Default: 1")
    parser.add_argument("--max_tokens", type=int, help="Longest response with --generate. Default: 512")
    parser.add_argument(
        "--plain_prompts",
        action="store_true",
        help="With --generate: prompt the policy with the texts as they are, without its chat template.",
    )
    add_batch_size(parser)
    parser.set_defaults(run=run_rerank)


def add_groups(parser) -> None:
    add_model(parser)
    parser.add_argument("--groups", type=int, help="Number of preference groups. Default: chosen by BIC.")
    parser.add_argument(
        "--data",
        required=True,
        help="Rows with a column that names the user: a file (JSONL, JSON, CSV, Parquet, arrow), a folder that "
        "`datasets` saved, or a data set on the hub.",
    )
    parser.add_argument("--split", help="Split of the data, if there are several. Default: train")
    parser.add_argument("--user_key", default="user", help="Column of users in the data. Default: user")
    parser.add_argument("--pref_group_key", default="pref_group", help="Column to write. Default: pref_group")
    parser.add_argument(
        "--group_key", action=OldName, dest="pref_group_key", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--profile",
        dest="profiles",
        type=Path,
        nargs="+",
        default=[],
        help="Profiles of new users in the data: files, or folders.",
    )
    parser.add_argument("--output", type=Path, required=True, help="JSONL: the data with the preference group")
    parser.set_defaults(run=run_groups)


class OldName(argparse.Action):
    """A flag that has a new name: it is refused with that."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string} is now called --{self.dest}, got the old name: type the new one")


def arguments(args) -> dict:
    """The arguments of a command, as its function takes them."""
    return {name: value for name, value in vars(args).items() if name not in ("command", "run", "trust_remote_code")}


def data_arguments(args) -> dict:
    """`arguments` of a command with the flags of `add_columns`."""
    given = arguments(args)
    kept = {name: value for name, value in given.items() if not name.endswith("_key") and name != "pairs"}
    return {**kept, "columns": columns_in(args), "pairs_per_user": given["pairs"]}


def run_elicit(args) -> None:
    from openrlhf_pgrpo.people.answers import learn
    from openrlhf_pgrpo.people.elicit import elicit

    given = data_arguments(args)
    asking = ("pool", "user", "profile", "questions", "entropy", "web", "host", "port")
    learning = ("answers", "profiles")
    try:
        if args.answers is not None:
            check_one_way(given, learning, asking, "learning from --answers")
            print(*learn(**{name: value for name, value in given.items() if name not in asking}), sep="\n")
        else:
            check_one_way(given, asking[:2], learning, "asking one user")
            elicit(**{name: value for name, value in given.items() if name not in learning})
    except KeyboardInterrupt:
        if not args.web:  # a page is served until then
            raise KeyboardInterrupt("all that was answered is kept, and the same command goes on from there") from None


def check_one_way(given: dict, needed: Sequence[str], foreign: Sequence[str], way: str) -> None:
    """Raises ValueError unless the flags that are needed are given, and none that is for the other way."""
    for name in foreign:
        if given[name] is not None and given[name] is not False:
            raise ValueError(f"--{name} is of no use to {way}: leave it out")
    for name in needed:
        if given[name] is None:
            raise ValueError(f"{way} needs --{' and --'.join(needed)}, got no --{name}: add it")


def run_refit(args) -> None:
    from openrlhf_pgrpo.people.refit import refit

    print(*refit(**arguments(args)), sep="\n")


def run_rerank(args) -> None:
    from openrlhf_pgrpo.people.rerank import rerank

    print(rerank(**arguments(args)))


def run_groups(args) -> None:
    from openrlhf_pgrpo.people.groups import group_users

    print(*group_users(**arguments(args)), sep="\n")
