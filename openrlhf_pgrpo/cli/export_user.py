"""`openrlhf-pgrpo export-user`: one user of a factorized reward model as a plain reward model."""

from pathlib import Path


def add_to(commands) -> None:
    parser = commands.add_parser("export-user", help="write one user's reward as a plain OpenRLHF reward model")
    parser.add_argument("--model", required=True, help="Folder or hub name of a factorized reward model.")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", help="One of the model's users.")
    who.add_argument("--profile", type=Path, help="The profile of a new user, as elicit writes it.")
    parser.add_argument("--output", type=Path, required=True, help="A new folder.")
    parser.set_defaults(run=run)


def run(args) -> int | str:
    from openrlhf_pgrpo.core.elicitation import Profile
    from openrlhf_pgrpo.models.factorized_reward import Folder
    from openrlhf_pgrpo.models.scalar_reward import export_user

    try:
        model = Folder(args.model)
        if args.profile is not None:
            coefficients = Profile.load(args.profile, model.fingerprint).coefficients
        elif args.user in model.users:
            coefficients = model.coefficients[model.users.index(args.user)]
        else:
            raise ValueError(
                f"--user needs one of the {len(model.users)} users of {model.name}, got {args.user!r}: name another, "
                "or the profile of a new user with --profile"
            )
        export_user(model, coefficients, args.output)
    except (ValueError, OSError) as error:
        return f"openrlhf-pgrpo export-user: {error}"
    print(args.output)
    return 0
