"""`openrlhf-pgrpo export-user`: one user of a factorized reward model as a plain reward model."""

from pathlib import Path

from openrlhf_pgrpo.cli.people import add_chat_template
from openrlhf_pgrpo.host.flags import add_trust
from openrlhf_pgrpo.progress import progress


def add_to(commands) -> None:
    parser = commands.add_parser("export-user", help="write one user's reward as a plain OpenRLHF reward model")
    parser.add_argument("--model", required=True, help="Folder or hub name of a factorized reward model.")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", help="One of the model's users.")
    who.add_argument("--profile", type=Path, help="The profile of a new user, written by openrlhf-pgrpo elicit.")
    parser.add_argument("--output", type=Path, required=True, help="A new folder.")
    add_chat_template(parser)
    add_trust(parser)
    parser.set_defaults(run=run)


def run(args) -> None:
    from openrlhf_pgrpo.models.folder import Folder
    from openrlhf_pgrpo.models.scalar_reward import export_user
    from openrlhf_pgrpo.models.users import coefficients_for

    model = Folder(args.model, args.chat_template)
    with progress("exporting"):
        export_user(model, coefficients_for(model, args.user, args.profile), args.output)
    print(args.output)
