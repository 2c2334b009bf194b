"""Learns a new user's coefficients from about ten questions: pool and model go in, the profile comes out."""

from contextlib import nullcontext
from pathlib import Path

from openrlhf_pgrpo.core.names import alike
from openrlhf_pgrpo.core.posterior import Prior
from openrlhf_pgrpo.files import check_distinct, check_folder, data_in
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.profiles import check_user
from openrlhf_pgrpo.models.scoring import MOST_TEXTS
from openrlhf_pgrpo.models.tables import COLUMNS, Columns
from openrlhf_pgrpo.people.pool import base_rewards, read_pool, readable, tell_apart
from openrlhf_pgrpo.people.session import Session, profile_name
from openrlhf_pgrpo.people.terminal import ask, plain

LOCAL = "127.0.0.1"  # this machine alone
QUESTIONS = 10


def elicit(
    model: str,
    pool: Path,
    user: str,
    profile: Path | None = None,
    scores: Path | None = None,
    questions: int | None = None,
    entropy: float | None = None,
    batch_size: int = MOST_TEXTS,
    web: bool = False,
    host: str | None = None,
    port: int | None = None,
    chat_template: str | None = None,
    columns: Columns = COLUMNS,
    split: str | None = None,
    pairs_per_user: int | None = None,
    seed: int = 0,
) -> None:
    """Asks the user in the terminal or on a page, and saves the profile after every answer.

    Args:
        model: folder or hub name. profile: `session.profile_name` unless given.
        pool, columns, split, pairs_per_user, seed: as `read_pool`.
        scores: file that keeps the base rewards of the pool. It is read if it exists.
        questions, entropy: when to stop, as `core.questions.enough`; QUESTIONS unless given.
        host, port: of the page, this machine alone and any free port unless given.
        chat_template: as `Folder`.

    Raises:
        ValueError: arguments or files that do not fit; nothing has been asked yet.
        OSError: a file cannot be read, or the profile cannot be written.
        ModuleNotFoundError: a package that the page needs is not installed.
    """
    check_user(user)
    questions = QUESTIONS if questions is None else questions
    if questions < 1:
        raise ValueError(f"--questions needs at least 1, got {questions}")
    if entropy is not None and not 0 < entropy <= 1:
        raise ValueError(f"--entropy needs a number of bits above 0 and up to 1, got {entropy}")
    if given := [flag for flag, value in (("--host", host), ("--port", port)) if value is not None and not web]:
        raise ValueError(f"{given[0]} needs --web, got questions in the terminal: leave it out")
    path = profile or Path(profile_name(user))
    check_distinct({"--pool": pool, "--scores": scores, "--profile": path})
    inputs = data_in(pool, "--pool")
    check_folder(path, "--profile", None if path.exists() else inputs)  # the session goes on from one that exists
    if scores is not None and not scores.exists():
        check_folder(scores, "--scores", inputs)
    if web:
        from openrlhf_pgrpo.people.web import listen, serve
    address = (LOCAL if host is None else host, port or 0)
    with listen(*address) if web else nullcontext() as listener:  # a bad one is refused before texts are scored
        placed, folder = read_pool(pool, columns, split, pairs_per_user, seed), Folder(model, chat_template)
        if user in folder.users:
            raise ValueError(f"--user needs a new name, got {user!r}, one of the model's users")
        for names in alike([*folder.users, user]):
            if user in names:
                print(plain(f"--user {user!r} is a new user, though the model has {names[0]!r}"), flush=True)
        pairs, written = readable(folder, placed, pool)
        pairs, a, b = tell_apart(pairs, *base_rewards(folder, written, scores, batch_size, chat_template))
        prior = Prior.of(folder.coefficients)
        session = Session(pairs, a, b, prior, user, folder.fingerprint, path, questions, entropy)
        if listener:
            serve(session, listener)
        else:
            ask(session)
