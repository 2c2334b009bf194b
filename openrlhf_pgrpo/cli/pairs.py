"""`openrlhf-pgrpo pairs`: ratings, conversations or pairs, written as the pairs that every trainer reads."""

from pathlib import Path

from openrlhf_pgrpo.cli.factorize import add_columns, add_data, columns_in


def add_to(commands) -> None:
    parser = commands.add_parser("pairs", help="make pairs of ratings or conversations, and hold some out")
    add_data(parser)
    parser.add_argument(
        "--output", type=Path, required=True, help="JSONL of pairs: user, prompt, chosen, rejected, preference"
    )
    parser.add_argument(
        "--hold_out",
        metavar="KIND:SHARE",
        action="append",
        default=[],
        help="Hold out a share of the users, prompts or responses, such as users:0.2. Given again, of another kind: "
        "held out is what all kinds hold out, and what only some do is left out.",
    )
    parser.add_argument("--held_out", type=Path, help="JSONL of the pairs that --hold_out holds out")
    parser.add_argument(
        "--messages",
        action="store_true",
        help="Write texts as lists of messages, which trainers need with --data.apply_chat_template.",
    )
    add_columns(parser)
    parser.set_defaults(run=run)


def run(args) -> None:
    from openrlhf_pgrpo.people.pairs import write_pairs

    given = (columns_in(args), args.split, args.pairs, args.seed, args.hold_out, args.held_out, args.messages)
    print(*write_pairs(args.data, args.output, *given), sep="\n")
