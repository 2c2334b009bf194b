"""Learns many people at once from choices that exist: data and model go in, a folder of profiles comes out.

Axes: U users, P pairs, D base rewards.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from openrlhf_pgrpo.core.names import Names, alike, alike_listed, listed
from openrlhf_pgrpo.core.posterior import Prior
from openrlhf_pgrpo.files import check_apart, check_distinct, check_folder, data_in, held_in, locked
from openrlhf_pgrpo.models.comparisons import Comparisons, read
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.output_folder import CONFIG, WEIGHT_FILES
from openrlhf_pgrpo.models.profiles import Answer, Profile, check_user
from openrlhf_pgrpo.models.scoring import MOST_TEXTS
from openrlhf_pgrpo.models.tables import COLUMNS, Columns
from openrlhf_pgrpo.people.pool import Pair, base_rewards, readable, tell_apart
from openrlhf_pgrpo.people.session import profile_name
from openrlhf_pgrpo.progress import along

Said = dict[str, list[float]]  # the name of a pair -> preferences for its answer a


def learn(
    model: str,
    answers: Path,
    profiles: Path,
    scores: Path | None = None,
    batch_size: int = MOST_TEXTS,
    chat_template: str | None = None,
    columns: Columns = COLUMNS,
    split: str | None = None,
    pairs_per_user: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Writes a profile of everybody in the data whom the model does not know; returns the lines to print.

    Args:
        model: folder or hub name. answers, columns, split, pairs_per_user, seed: as `comparisons.read`. profiles: as
            `write_profiles`. scores: file that keeps the base rewards. It is read if it exists. chat_template: as
            `Folder`.

    Raises:
        ValueError: arguments or files that do not fit, or nobody new; nothing has been written yet.
        OSError: a file cannot be read or written.
    """
    check_distinct({"--answers": answers, "--scores": scores})
    check_profiles_folder(profiles, "--profiles")
    check_apart(profiles, "--profiles", {"--answers": answers})
    if scores is not None:
        check_folder(scores, "--scores", data_in(answers, "--answers") | held_in(model, "--model"))
    data, folder = read(answers, columns, split, pairs_per_user, seed), Folder(model, chat_template)
    for sentence in data.said:
        print(sentence, flush=True)
    placed, said, known = said_by_new(data, Names(folder.users))
    if not said:
        raise ValueError(
            f"--answers needs people whom the model does not know, got none among the {len(known)} in {answers}: the "
            "model has coefficients of its own for them"
        )
    if same := [names for names in alike([*folder.users, *said]) if not set(names) <= set(folder.users)]:
        print(f"warning: users count as people of their own whose names {alike_listed(same)}", flush=True)
    there = profiles_there(profiles, "--profiles", said, folder)
    pairs, written = readable(folder, placed, answers)
    pairs, a, b = tell_apart(pairs, *base_rewards(folder, written, scores, batch_size, chat_template))
    found = Profile.many(answers_of(said, pairs, (a - b).tolist()), folder.fingerprint, Prior.of(folder.coefficients))
    write_profiles(profiles, "--profiles", found, there)
    lines = [f"{profiles}: {counted(found)}"]
    if known:
        lines.append(f"users whom the model knows, so they have no profile: {len(known)} ({listed(known)})")
    if silent := sorted(said.keys() - {profile.user for profile in found}):
        lines.append(f"users without an answer that the model can read: {len(silent)} ({listed(silent)})")
    return lines


def said_by_new(data: Comparisons, known: Names) -> tuple[list[tuple[str, Pair]], dict[str, Said], list[str]]:
    """The distinct pairs, each with its place; what people said of them whom the model does not know; and the others.

    A pair that some saw the other way round is the same pair.

    Raises:
        ValueError: a name that UTF-8 cannot hold, with its place.
    """
    placed: dict[str, tuple[str, Pair]] = {}
    said: dict[str, Said] = {}
    passed: dict[str, None] = {}
    for number, (user, prompt, first, second, preference) in enumerate(data.rows):
        if user in known:
            passed[user] = None
            continue
        place = data.places([(number, 0), (number, 1)])
        if user not in said:
            try:
                check_user(user)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        pair = Pair(prompt, first, second).in_order
        placed.setdefault(pair.name, (place, pair))
        turned = pair.a != first
        said.setdefault(user, {}).setdefault(pair.name, []).append(1 - preference if turned else preference)
    return list(placed.values()), said, list(passed)


def answers_of(said: Mapping[str, Said], pairs: Sequence[Pair], features: Sequence[list]) -> dict[str, list[Answer]]:
    """The answers of each user to those of the pairs (P,) that they were asked; who has none is left out.

    Who was asked the same twice has one answer, the mean of both.
    """
    rows = {pair.name: row for row, pair in enumerate(pairs)}
    v = [tuple(row) for row in features]
    found = {}
    for user, of_pairs in said.items():
        answers = [
            Answer(name, v[rows[name]], fmean(preferences), *pairs[rows[name]])
            for name, preferences in of_pairs.items()
            if name in rows
        ]
        if answers:
            found[user] = answers
    return found


def counted(profiles: Sequence[Profile]) -> str:
    """How many profiles of how many answers."""
    answers = sum(len(profile.answers) for profile in profiles)
    return f"{len(profiles)} profile{'s' * (len(profiles) != 1)} of {answers} answer{'s' * (answers != 1)}"


# ---- a folder of profiles ----


def check_profiles_folder(folder: Path, flag: str) -> None:
    """Looks before the work begins whether profiles can be written to a folder, new or not.

    Raises:
        ValueError: they cannot.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{flag} needs a folder, got {folder}, a file: name another")
    if (folder / CONFIG).exists() and any(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
        raise ValueError(f"{flag} needs a folder without a model, got {folder}, which holds one: name another")
    check_folder(folder / "profile.json" if folder.is_dir() else folder, flag)


def profiles_there(folder: Path, flag: str, users: Iterable[str], model: Folder) -> dict[str, Profile]:
    """The profiles of these users for that model that are in the folder already, as everybody takes them.

    Raises:
        ValueError: another file has the name of a profile that is to be written.
    """
    paths = {user: path for user in users if (path := folder / profile_name(user)).exists()}
    others = [path for path in paths.values() if not path.is_file()]
    files = {user: path for user, path in paths.items() if path.is_file()}
    loaded = Profile.load_all([*files.values()], model.fingerprint, Prior.of(model.coefficients))
    found = {}
    for (user, path), profile in zip(files.items(), loaded):
        if isinstance(profile, Profile) and profile.user == user:
            found[user] = profile
        else:
            others.append(path)
    if others:
        more = f" and {len(others) - 1} more" * (len(others) > 1)
        raise ValueError(
            f"{flag} needs a folder without other files of these names, got {others[0]}{more}, which is no profile of "
            "that user for this model, or an edited one: name another folder, or move the file away"
        )
    return found


def write_profiles(folder: Path, flag: str, profiles: Sequence[Profile], there: Mapping[str, Profile]) -> None:
    """Writes profiles to a folder, which is made if it is not there; each is a whole file.

    Those that are there already with the same answers stay, so the same command goes on after an interruption.

    Args:
        there: as `profiles_there` gave them, perhaps long ago.

    Raises:
        ValueError: one that is there has other answers, then nothing has been written; or one came in the meantime,
            then that one stays and all others are written.
        OSError: a file cannot be written.
    """
    new = [profile for profile in profiles if profile.user not in there]
    if others := [p.user for p in profiles if p.user in there and choices(p) != choices(there[p.user])]:
        raise ValueError(
            f"{flag} needs a folder without profiles of these users that have other answers, got {len(others)} "
            f"({listed(others)}) in {folder}: name another folder, or move these profiles away"
        )
    folder.mkdir(exist_ok=True)
    came = []
    for profile in along(new, "writing profiles", "profiles"):
        path = folder / profile_name(profile.user)
        with locked(path, needed=False):  # as a session does; the work is done, so no lock is no reason to lose it
            if path.exists():
                came.append(profile.user)
            else:
                profile.save(path)
    if came:
        raise ValueError(
            f"{flag} needs a folder that nobody else writes these profiles to, got {len(came)} ({listed(came)}) that "
            f"came into {folder} in the meantime, which stays; the others are written: run the command again, which "
            "compares their answers"
        )


def choices(profile: Profile) -> list:
    """What a user said, in whatever order, without the numbers that a model makes of it."""
    answers = [(said.pair, said.preference, said.prompt, said.a, said.b) for said in profile.answers]
    return [sorted(answers, key=lambda answer: answer[0]), profile.skipped]
