"""`openrlhf-pgrpo elicit`, `rerank` and `groups`: a factorized reward model used for people."""

from pathlib import Path


def add_to(commands) -> None:
    add_elicit(commands.add_parser("elicit", help="learn a new user from about ten questions"))
    add_rerank(commands.add_parser("rerank", help="order candidate responses for a user, best first"))
    add_groups(commands.add_parser("groups", help="cluster users into preference groups for P-GRPO"))


def add_model(parser) -> None:
    parser.add_argument("--model", required=True, help="Folder or hub name of a factorized reward model.")


def add_elicit(parser) -> None:
    add_model(parser)
    parser.add_argument("--pool", type=Path, required=True, help="JSONL of pairs to ask about: prompt, a, b")
    parser.add_argument("--user", required=True, help="Name of the new user; letters, digits and . _ @ + -")
    parser.add_argument("--profile", type=Path, help="Default: the user's name with .json; one that exists goes on.")
    parser.add_argument("--scores", type=Path, help="File that keeps the pool's base rewards, read if it is there.")
    parser.add_argument("--questions", type=int, default=10, help="Ask so many. Default: 10")
    parser.add_argument("--entropy", type=float, help="Stop before, below so many bits of predictive entropy per pair.")
    parser.add_argument("--batch_size", type=int, default=16, help="Texts scored at once. Default: 16")
    parser.add_argument("--web", action="store_true", help="a page in the browser of this machine, not the terminal")
    parser.add_argument("--host", default="127.0.0.1", help="Address of the page. Default: 127.0.0.1, this machine.")
    parser.add_argument("--port", type=int, default=0, help="Default: one that is free.")
    parser.set_defaults(run=elicit)


def add_rerank(parser) -> None:
    add_model(parser)
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--user", help="One of the model's users.")
    who.add_argument("--profile", type=Path, help="The profile of a new user, as elicit writes it.")
    parser.add_argument("--population", action="store_true", help="the mean of all users, for one it does not know")
    parser.add_argument("--candidates", type=Path, required=True, help="JSONL: prompt, and responses, a list of texts")
    parser.add_argument("--output", type=Path, required=True, help="JSONL: the same with rewards, order and best")
    parser.add_argument("--generate", metavar="POLICY", help="Sample the responses with vLLM from this model instead.")
    parser.add_argument("--n", type=int, default=8, help="Responses to each prompt with --generate. Default: 8")
    parser.add_argument("--temperature", type=float, default=1.0, help="Of --generate. Default: 1")
    parser.add_argument("--max_tokens", type=int, default=512, help="Of a response with --generate. Default: 512")
    parser.add_argument("--batch_size", type=int, default=16, help="Texts scored at once. Default: 16")
    parser.set_defaults(run=rerank)


def add_groups(parser) -> None:
    add_model(parser)
    parser.add_argument("--groups", type=int, help="Number of preference groups. Default: by the BIC of a mixture.")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with a column that names the user")
    parser.add_argument("--user_key", default="user", help="That column. Default: user")
    parser.add_argument("--group_key", default="pref_group", help="Column to write. Default: pref_group")
    parser.add_argument("--profile", type=Path, nargs="+", default=[], help="Profiles of new users in the data.")
    parser.add_argument("--output", type=Path, required=True, help="JSONL: the data with the preference group")
    parser.set_defaults(run=groups)


def elicit(args) -> int | str:
    from openrlhf_pgrpo.core.elicitation import Prior
    from openrlhf_pgrpo.elicit.pool import read_pool
    from openrlhf_pgrpo.elicit.session import Session, checked_user
    from openrlhf_pgrpo.elicit.terminal import ask
    from openrlhf_pgrpo.models.factorized_reward import Folder

    try:
        own = Path(f"{checked_user(args.user)}.json")
        if args.questions < 1:
            raise ValueError(f"--questions needs at least 1, got {args.questions}")
        if args.entropy is not None and not 0 < args.entropy <= 1:
            raise ValueError(f"--entropy needs a number of bits above 0 and up to 1, got {args.entropy}")
        if args.web:
            from openrlhf_pgrpo.elicit.web import checked_host, serve

            checked_host(args.host)
        pairs = read_pool(args.pool)
        model = Folder(args.model)
        if args.user in model.users:
            raise ValueError(f"--user needs a new name, got {args.user!r}, whom the model knows from its training")
        a, b = scores(args, pairs, model.fingerprint)
        prior, limits = Prior.of(model.coefficients), (args.questions, args.entropy)
        session = Session(pairs, a, b, prior, args.user, model.fingerprint, args.profile or own, *limits)
        if args.web:
            serve(session, args.host, args.port)
        else:
            ask(session)
    except KeyboardInterrupt:
        return 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return f"openrlhf-pgrpo elicit: {error}"
    return 0


def scores(args, pairs, fingerprint: str):
    """Base rewards of the answers a and b, from the file or the model."""
    from openrlhf_pgrpo.elicit.pool import read_scores, score_pool, write_scores

    if args.scores and args.scores.exists():
        return read_scores(args.scores, pairs, fingerprint)
    if args.scores:
        check_folder("--scores", args.scores)
    print(f"scoring the answers of {len(pairs)} pairs ...", flush=True)
    a, b = score_pool(load(args.model), pairs, args.batch_size)
    if args.scores:
        write_scores(args.scores, a, b, pairs, fingerprint)
    return a, b


def rerank(args) -> int | str:
    from openrlhf_pgrpo.core.rows import write_rows
    from openrlhf_pgrpo.elicit import rerank as best_of_n
    from openrlhf_pgrpo.models.factorized_reward import Folder

    try:
        check_folder("--output", args.output)
        coefficients = best_of_n.coefficients_for(Folder(args.model), args.user, args.profile, args.population)
        if args.generate:
            suit_vllm_to_this_machine()
            rows = best_of_n.generate(args.candidates, args.generate, args.n, args.temperature, args.max_tokens)
        else:
            rows = best_of_n.read_candidates(args.candidates)
        model = load(args.model)  # after vLLM, which takes what memory is free, has given it back
        write_rows(args.output, best_of_n.rerank(model, rows, coefficients, args.batch_size))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return f"openrlhf-pgrpo rerank: {error}"
    print(args.output)
    return 0


def groups(args) -> int | str:
    from openrlhf_pgrpo.core.elicitation import Profile
    from openrlhf_pgrpo.core.rows import read_rows, write_rows
    from openrlhf_pgrpo.elicit.groups import assign, cluster
    from openrlhf_pgrpo.models.factorized_reward import Folder

    try:
        check_folder("--output", args.output)
        rows = read_rows(args.data, {args.user_key: str})
        model = Folder(args.model)
        found = cluster(model.coefficients, args.groups)
        chances = dict(zip(model.users, found.of_users))
        profiles = [Profile.load(path, model.fingerprint) for path in args.profile]
        for path, profile in zip(args.profile, profiles):
            if profile.user in chances:
                raise ValueError(f"{path} needs to be of a new user, got a second {profile.user!r}: leave it out")
            chances[profile.user] = found.of_answers(profile.answers)
        write_rows(args.output, assign(rows, chances, found.names, args.user_key, args.group_key))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return f"openrlhf-pgrpo groups: {error}"
    if args.groups is None:
        tried = ", ".join(f"{k}: {criterion:.1f}" for k, criterion in found.criteria.items())
        print(f"{len(found.shares)} preference groups have the lowest BIC ({tried})")
        if len(found.shares) == 1:
            print("one preference group is no use to P-GRPO: the users differ by degrees; give --groups to split them")
    for name, share in zip(found.names, found.shares):
        print(f"{name}: {share:.1%} of {len(model.users)} users")
    for profile in profiles:
        best = chances[profile.user].argmax()
        print(f"{profile.user}: {found.names[best]}, with a probability of {chances[profile.user][best]:.2f}")
    print(f"{args.output}: train with --pgrpo.group_key {args.group_key} --pgrpo.user_key {args.user_key}")
    return 0


def suit_vllm_to_this_machine() -> None:
    """Without a GPU, vLLM needs to be told what it may take."""
    import os

    import torch

    from openrlhf_pgrpo.host.cpu import environment

    if not torch.cuda.is_available():
        os.environ.update(environment())


def check_folder(flag: str, file: Path) -> None:
    """Now, and not when everything is done."""
    if not file.parent.is_dir():
        raise ValueError(f"{flag} needs a folder that exists, got {file.parent}: make it")


def load(folder: str):
    from openrlhf_pgrpo.models.factorized_reward import load

    return load(folder)
