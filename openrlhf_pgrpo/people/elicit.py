"""Learns a new user's coefficients from about ten questions: pool and model go in, the profile comes out.

Axes: P pairs, D base rewards.
"""

from contextlib import nullcontext
from pathlib import Path

import numpy as np

from openrlhf_pgrpo.core.names import alike
from openrlhf_pgrpo.core.posterior import Prior
from openrlhf_pgrpo.files import check_folder
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.profiles import check_user
from openrlhf_pgrpo.models.scoring import load
from openrlhf_pgrpo.people.pool import Pair, read_pool, read_scores, score_pool, tell_apart, write_scores
from openrlhf_pgrpo.people.session import Session, profile_name
from openrlhf_pgrpo.people.terminal import ask, plain


def elicit(
    model: str,
    pool: Path,
    user: str,
    profile: Path | None = None,
    scores: Path | None = None,
    questions: int = 10,
    entropy: float | None = None,
    batch_size: int = 16,
    web: bool = False,
    host: str = "127.0.0.1",
    port: int = 0,
) -> None:
    """Asks the user in the terminal or on a page, and saves the profile after every answer.

    Args:
        model: folder or hub name. pool: file of pairs. profile: `session.profile_name` unless given.
        scores: file that keeps the base rewards of the pool. It is read if it exists.
        questions, entropy: when to stop, as `core.questions.enough`.

    Raises:
        ValueError: arguments or files that do not fit; nothing has been asked yet.
        OSError: a file cannot be read, or the profile cannot be written.
        ModuleNotFoundError: a package that the page needs is not installed.
    """
    check_user(user)
    if questions < 1:
        raise ValueError(f"--questions needs at least 1, got {questions}")
    if entropy is not None and not 0 < entropy <= 1:
        raise ValueError(f"--entropy needs a number of bits above 0 and up to 1, got {entropy}")
    path = profile or Path(profile_name(user))
    check_folder(path, "--profile", {"--pool": pool, "--scores": scores})
    if web:
        from openrlhf_pgrpo.people.web import listen, serve
    with listen(host, port) if web else nullcontext() as listener:  # a bad address is refused before texts are scored
        pairs, folder = read_pool(pool), Folder(model)
        if user in folder.users:
            raise ValueError(f"--user needs a new name, got {user!r}, one of the model's users")
        for written in alike([*folder.users, user]):
            if user in written:
                print(plain(f"--user {user!r} is a new user, though the model has {written[0]!r}"), flush=True)
        pairs, a, b = tell_apart(pairs, *base_rewards(folder, pairs, scores, batch_size))
        prior = Prior.of(folder.coefficients)
        session = Session(pairs, a, b, prior, user, folder.fingerprint, path, questions, entropy)
        if listener:
            serve(session, listener)
        else:
            ask(session)


def base_rewards(
    folder: Folder, pairs: list[Pair], scores: Path | None, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Base rewards (P, D) of the answers a and b, from the file `scores` if it exists, else from the model."""
    if scores and scores.exists():
        return read_scores(scores, pairs, folder.fingerprint)
    if scores:
        check_folder(scores, "--scores")
    print(f"scoring the answers of {len(pairs)} pairs ...", flush=True)
    a, b = score_pool(load(folder.name), pairs, batch_size)
    if scores:
        write_scores(scores, a, b, pairs, folder.fingerprint)
    return a, b
