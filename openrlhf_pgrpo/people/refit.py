"""Profiles for a model that was trained again: it reads the answers that a profile keeps, and nobody is asked twice.

Axes: P pairs, D base rewards.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from openrlhf_pgrpo.core.names import listed
from openrlhf_pgrpo.core.posterior import Prior
from openrlhf_pgrpo.files import check_apart
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.profiles import Answer, Profile
from openrlhf_pgrpo.models.scoring import MOST_TEXTS
from openrlhf_pgrpo.models.users import all_faults, profile_files
from openrlhf_pgrpo.people.answers import check_profiles_folder, counted, profiles_there, write_profiles
from openrlhf_pgrpo.people.pool import Pair, base_rewards, read_pool, written_in


def refit(
    model: str,
    profiles: Sequence[Path],
    output: Path,
    pool: Path | None = None,
    batch_size: int = MOST_TEXTS,
    chat_template: str | None = None,
) -> list[str]:
    """Fits profiles again, for this model, and writes them; returns the lines to print.

    What the model cannot read of a user's answers is left out, so the old profiles stay as they are. Users whom the
    model was trained on need no profile, and get none.

    Args:
        model: folder or hub name. profiles: files, or folders of them. output: as `write_profiles`.
        pool: of the profiles from before texts were kept, with the answers a and b as they were then: such a profile
            knows which pair it means, and not which of its answers came first. chat_template: as `Folder`.

    Raises:
        ValueError: arguments or files that do not fit; nothing has been written yet.
        OSError: a file cannot be read or written.
    """
    check_profiles_folder(output, "--output")
    check_apart(output, "--output", {"--pool": pool})
    paths = dict.fromkeys(file for given in profiles for file in profile_files(given))
    texts = {} if pool is None else {pair.name: pair for _, pair in read_pool(pool)}
    folder = Folder(model, chat_template)
    old, known = _read(paths, texts, pool, folder.users)
    if not old:
        raise ValueError(
            f"--profile needs people whom the model was not trained on, got none in {len(known)} profiles: the model "
            "has coefficients of its own for them"
        )
    there = profiles_there(output, "--output", [profile.user for profile in old.values()], folder)
    read, left_out = _read_by(folder, chat_template, old, batch_size)
    if nothing := [path for path, profile in read.items() if old[path].answers and not profile.answers]:
        raise all_faults(
            f"{path} needs an answer that the model can read, got none among {len(old[path].answers)}: each is to "
            f"answers that are the same to {model}, say nothing, or do not fit into its {folder.max_length} tokens. "
            "Leave it out and ask again"
            for path in nothing
        )
    said = {profile.user: profile.answers for profile in read.values()}
    fitted = Profile.many(said, folder.fingerprint, Prior.of(folder.coefficients))
    new = [replace(one, skipped=profile.skipped) for one, profile in zip(fitted, read.values())]
    write_profiles(output, "--output", new, there)
    lines = [f"{output}: {counted(new)}"]
    if known:
        lines.append(f"users whom the model was trained on, so they need no profile: {len(known)} ({listed(known)})")
    if left_out:
        lines.append(f"answers left out, because the model cannot read them or tell them apart: {left_out}")
    return lines


def _read(
    paths: Iterable[Path], texts: dict[str, Pair], pool: Path | None, trained: Sequence[str]
) -> tuple[dict[str, Profile], list[str]]:
    """The profiles by path, all with texts, and the users among the trained ones.

    Args:
        texts: pairs of the pool by their names, for answers without texts.

    Raises:
        ValueError: files that are no profiles, two of one user, or answers whose texts are not known; all are named.
    """
    found: dict[str, Profile] = {}
    of_user: dict[str, Path] = {}
    known, faults, passed = [], [], set(trained)
    for path in paths:
        try:
            profile = Profile.read(path)
            if profile.user in passed:
                known.append(profile.user)
                continue
            if profile.user in of_user:
                raise ValueError(
                    f"{path} needs to be of a user of its own, got {profile.user!r}, as in {of_user[profile.user]}: "
                    "leave one of them out"
                )
            of_user[profile.user] = path
            found[str(path)] = replace(profile, answers=_with_texts(path, profile, texts, pool))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise all_faults(faults)
    return found, known


def _with_texts(path: Path, profile: Profile, texts: dict[str, Pair], pool: Path | None) -> tuple[Answer, ...]:
    """The answers of a profile with their texts.

    Raises:
        ValueError: texts that are not known, or that are not those of the pair that was asked.
    """
    answers, missing = [], 0
    for number, said in enumerate(profile.answers):
        if said.prompt is not None:
            if Pair(said.prompt, said.a, said.b).name != said.pair:
                raise ValueError(f"{path} needs the texts that were asked, got others in answer {number}: restore it")
            answers.append(said)
        elif said.pair in texts:
            pair = texts[said.pair]
            answers.append(replace(said, prompt=pair.prompt, a=pair.a, b=pair.b))
        else:
            missing += 1
    if missing:
        where = (
            "give the pool they were asked from with --pool" if pool is None else f"{pool} lacks them, name another"
        )
        raise ValueError(
            f"{path} needs the texts of its answers, got {missing} of {len(profile.answers)} without, as in profiles "
            f"from before texts were kept: {where}, or ask again"
        )
    return tuple(answers)


def _read_by(
    folder: Folder, chat_template: str | None, old: dict[str, Profile], batch_size: int
) -> tuple[dict[str, Profile], int]:
    """The profiles by path with the features (D,) that the model makes of their answers, and how many answers are left
    out because it cannot read them. Coefficients are still the old ones.

    Raises:
        ValueError: messages that cannot be written in the model's form, with their file.
    """
    rows: dict[str, int] = {}
    pairs, places = [], []
    for path, profile in old.items():
        for number, said in enumerate(profile.answers):
            if rows.setdefault(_key(said), len(rows)) == len(pairs):
                pairs.append(Pair(said.prompt, said.a, said.b))
                places.append(f"answer {number} of {path}")
    v: dict[int, tuple[float, ...]] = {}
    if pairs:
        written, empty, too_long = written_in(folder, pairs, places.__getitem__)
        if usable := [row for row in range(len(pairs)) if not (empty[row] or too_long[row])]:
            asked = [written[row] for row in usable]
            a, b = base_rewards(folder, asked, batch_size=batch_size, chat_template=chat_template)
            v = {row: tuple(features) for row, features in zip(usable, (a - b).tolist()) if any(features)}
    read, left_out = {}, 0
    for path, profile in old.items():
        kept = [rows[_key(said)] in v for said in profile.answers]
        answers = [
            replace(said, features=v[rows[_key(said)]]) for said, is_kept in zip(profile.answers, kept) if is_kept
        ]
        skipped = [replace(one, after=sum(kept[: one.after])) for one in profile.skipped]
        read[path] = replace(profile, answers=tuple(answers), skipped=tuple(skipped))
        left_out += len(kept) - len(answers)
    return read, left_out


def _key(said: Answer) -> str:
    """The texts of an answer in their order, which says what its features mean."""
    return json.dumps((said.prompt, said.a, said.b))
