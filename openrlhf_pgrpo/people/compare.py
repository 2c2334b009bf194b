"""Two policies against each other on the same prompts, as the paper of P-GRPO evaluates: by win rate for each
preference group, judged by users' rewards or by a language model.

A folder holds everything: settings.json, answers-A.jsonl, answers-B.jsonl and verdicts.jsonl, which grow line by line,
and at the end result.json. The same command goes on where one was interrupted.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openrlhf_pgrpo.core.names import in_words, listed, user_in
from openrlhf_pgrpo.core.win_rate import win_rate
from openrlhf_pgrpo.files import check_apart, json_object, locked, read_rows, with_keys_once, write_whole
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.messages import Text, no_text
from openrlhf_pgrpo.models.scoring import RewardModel, load
from openrlhf_pgrpo.models.tables import Table, as_json, read_table
from openrlhf_pgrpo.models.users import ASK, MEAN, Users, profile_files
from openrlhf_pgrpo.people.generation import Sampling, generate, prompt_ids, writers_for, written
from openrlhf_pgrpo.people.judge import ANYBODY, Judge, Pair, read_prompt
from openrlhf_pgrpo.people.terminal import on_one_line
from openrlhf_pgrpo.progress import along, progress

SETTINGS, VERDICTS, RESULT = "settings.json", "verdicts.jsonl", "result.json"
SIDES = ("A", "B")
OUR_FILES = {SETTINGS, f".{SETTINGS}.lock", VERDICTS, RESULT, *(f"answers-{side}.jsonl" for side in SIDES)}
USER, PREF_GROUP = "user", "pref_group"  # columns of the data, unless others are named
PROMPTS_AT_ONCE = 32  # scored by a reward model between two looks at the disk


class Row(NamedTuple):
    """A row of the data; `line` is its number there, `prompt` that of its prompt among the different ones."""

    line: int
    prompt: int
    user: str | None
    pref_group: str | None


class Data(NamedTuple):
    table: Table
    rows: list[Row]
    prompts: list[Text]
    places: list[str]  # of the first row of each prompt, in words


def compare(
    policies: Sequence[str],
    data: str | Path,
    output: Path,
    model: str | None = None,
    profiles: Sequence[Path] = (),
    population: bool = False,
    judge: str | None = None,
    judge_model: str | None = None,
    judge_prompt: Path | None = None,
    judge_tokens: int = 1024,
    judge_timeout: float = 120.0,
    pref_group_texts: Path | None = None,
    prompt_key: str = "prompt",
    user_key: str | None = None,
    pref_group_key: str | None = None,
    plain_prompts: bool = False,
    chat_template: str | None = None,
    temperature: float = 1.0,
    max_tokens: int = 512,
    seed: int = 0,
    split: str | None = None,
) -> list[str]:
    """Writes answers, verdicts and the result into the folder `output`; returns the lines to print.

    Args:
        policies: A and B, folders or hub names. data, split: as `tables.read_table`.
        model: a factorized reward model, whose `profiles` name new users; population: the average user's rewards for
            unknown ones. judge: the address of a server instead.
        pref_group_texts: a JSON file that says in words who a preference group is. plain_prompts: the policies are
            prompted without a template. chat_template: as `Folder`.

    Raises:
        ValueError: arguments, files, a policy or a judge that do not fit.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: vLLM is not installed.
    """
    _check(model, judge, judge_model, judge_prompt, pref_group_texts, profiles, population, chat_template)
    check_apart(output, "--output", {"--data": data})
    sampling = Sampling(temperature, max_tokens, seed)
    if judge is not None:
        asked = Judge(judge, judge_model, read_prompt(judge_prompt), judge_tokens, judge_timeout)
    read = read_data(data, prompt_key, user_key, pref_group_key, split)
    placed = dict(zip(read.places, read.prompts))
    ids = [prompt_ids(writer, placed) for writer in writers_for(policies, plain_prompts)]
    _claim(output)
    busy = (
        f"--output needs a folder that no other compare writes to, got {output}, which one does: wait until it has "
        "ended, or name another"
    )
    with locked(output / SETTINGS, refusal=busy):
        kept = _kept_settings(output)
        settings: dict[str, dict] = {"answers": {"data": _content(read), "prompt_key": prompt_key}}
        settings["answers"] |= {f"policy {side}": _identity(policy) for side, policy in zip(SIDES, policies)}
        settings["answers"] |= {"plain_prompts": plain_prompts, **asdict(sampling)}
        columns = {"user_key": user_key or USER, "pref_group_key": pref_group_key or PREF_GROUP}
        if model is not None:
            users = Users(Folder(model, chat_template), profiles, f"{ASK}, or take the average user with --population")
            _check_users(read, users, population)
            written(users.model.writer, placed)  # refuses those that it cannot write
            files = [file for path in profiles for file in profile_files(path)]
            settings["verdicts"] = {"model": users.model.fingerprint, "profiles": _sha256(files), **columns}
            settings["verdicts"] |= {"population": population, "chat_template": chat_template}
        else:
            name = asked.find_name(kept.get("verdicts", {}).get("judge_model"))
            readers = _readers(read, pref_group_texts)
            settings["verdicts"] = {"judge_model": name, "judge_prompt": asked.prompt, **columns}
            settings["verdicts"] |= {"judge_tokens": judge_tokens, "pref_group_texts": readers}
        settings = json.loads(json.dumps(settings))  # as those that are read
        _check_same(output, kept, settings)
        write_whole(output / SETTINGS, json.dumps({"policies": list(policies), **settings}, indent=1) + "\n")

        answers = [
            answer_all(policy, side, read, ids_of_side, sampling, output)
            for policy, side, ids_of_side in zip(policies, SIDES, ids)
        ]
        texts = [[answer["answer"] for answer in of_side] for of_side in answers]
        with _growing(output / VERDICTS, ("line", "verdict"), "verdicts", len(read.rows)) as (verdicts, add):
            done = {verdict["line"] for verdict in verdicts}
            todo = [row for row in read.rows if row.line not in done]
            if todo and model is not None:
                loaded = load(model, chat_template=chat_template)
                users.model.check_unchanged()  # hours may have passed
                for row, verdict in judge_by_rewards(loaded, users, read, todo, texts):
                    add({**_about(row), **verdict})
            elif todo:
                pairs = [
                    (row, Pair(read.prompts[row.prompt], *(of[row.prompt] for of in texts), readers[row.pref_group]))
                    for row in todo
                ]
                try:
                    asked.verdicts(pairs, lambda row, verdict: add({**_about(row), **verdict}))
                except ValueError as error:
                    raise ValueError(
                        f"{error}. The same command goes on after the {len(verdicts)} verdicts in {output / VERDICTS}"
                    ) from error
        result = summarize(read, verdicts)
        cut = {side: sum(answer["cut"] for answer in of_side) for side, of_side in zip(SIDES, answers)}
        result |= {"answers_cut": cut, "policies": list(policies), "settings": settings}
        write_whole(output / RESULT, json.dumps(result, indent=1) + "\n")
    if not result["all"]["rows"] - result["all"]["no_verdict"]:
        why = verdicts[0].get("said") or verdicts[0].get("why")
        raise ValueError(
            f"a judge needs to give verdicts, got none for {len(verdicts)} rows, for the first {str(why)[:300]}: "
            f"delete {output / VERDICTS} and take another judge or --judge_prompt, or shorter answers"
        )
    return [*table(result), *_remarks(result, verdicts), str(output / RESULT)]


def read_data(
    source: str | Path,
    prompt_key: str = "prompt",
    user_key: str | None = None,
    pref_group_key: str | None = None,
    split: str | None = None,
) -> Data:
    """The rows of the data. A column that is named is in every row; `user` and `pref_group` are in all or in none.

    Raises:
        ValueError: as `read_table`; a row that is not whole, with its place.
        OSError: the file cannot be read.
    """
    named = {"user": user_key or USER, "preference group": pref_group_key or PREF_GROUP}
    table = read_table(source, {prompt_key: object}, split)
    names: list[list] = []
    for (what, column), key in zip(named.items(), (user_key, pref_group_key)):
        there = key is not None or any(column in row for row in table.rows)
        names.append([user_in(r, column, table.place(i), what) if there else None for i, r in enumerate(table.rows)])
    prompts: dict[str, int] = {}
    data = Data(table, [], [], [])
    for number, (row, user, pref_group) in enumerate(zip(table.rows, *names)):
        if wrong := no_text(row[prompt_key]):
            raise ValueError(f"{table.place(number)} needs a prompt in {prompt_key!r}, got {wrong}: fill it in")
        prompt = as_json(row[prompt_key], prompt_key, table.place(number))
        key = json.dumps(prompt)
        if key not in prompts:
            prompts[key] = len(prompts)
            data.prompts.append(prompt)
            data.places.append(table.place(number))
        data.rows.append(Row(table.numbers[number], prompts[key], user, pref_group))
    return data


def answer_all(
    policy: str, side: str, data: Data, ids: list[list[int]], sampling: Sampling, output: Path
) -> list[dict]:
    """The answers of a policy to all prompts, in their order; those that are not in its file yet are made."""
    path = output / f"answers-{side}.jsonl"
    with _growing(path, ("number", "answer", "cut"), f"answers of {side}", len(ids)) as (answers, add):
        done = {answer["number"] for answer in answers}
        if todo := {number: prompt for number, prompt in enumerate(ids) if number not in done}:
            with closing(generate(policy, todo, sampling)) as made:  # so that its process ends with us
                for number, text, cut in made:
                    add({"number": number, "prompt": data.prompts[number], "answer": text, "cut": cut})
    return sorted(answers, key=lambda answer: answer["number"])


def judge_by_rewards(
    model: RewardModel, users: Users, data: Data, rows: list[Row], texts: list[list[str]]
) -> Iterator[tuple[Row, dict]]:
    """Each row with the rewards that its user gives to both answers: the higher one wins, equal ones are a tie.

    An answer that is blank, or too long for the model, gets no verdict. Unknown users are the average one.

    Raises:
        ValueError: a reward that is not finite, or a prompt that the model's form cannot write.
    """
    by_prompt: dict[int, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, []).append(row)
    for start in range(0, len(by_prompt), PROMPTS_AT_ONCE):
        numbers = list(by_prompt)[start : start + PROMPTS_AT_ONCE]
        prompts = [data.prompts[number] for number in numbers for _ in SIDES]
        answers = [of_side[number] for number in numbers for of_side in texts]
        tokens = model.tokens(prompts, answers)
        fits = ~(tokens.too_long | tokens.empty)
        rewards = np.full((len(prompts), model.coefficients.shape[1]), math.nan)
        if fits.any():
            kept = ([text for text, fit in zip(of, fits) if fit] for of in (prompts, answers))
            rewards[fits] = model.base_rewards(*kept)
        for i, number in enumerate(numbers):
            both, read_whole = rewards[2 * i : 2 * i + 2], fits[2 * i : 2 * i + 2].all()
            cut = bool(tokens.cut[2 * i : 2 * i + 2].any())
            for row, coefficients in zip(by_prompt[number], users.of([row.user for row in by_prompt[number]], MEAN)):
                if not read_whole:
                    why = (
                        f"an answer is blank, or longer than the {model.texts.max_length} tokens that the model reads"
                    )
                    yield row, {"verdict": None, "rewards": None, "prompt_cut": cut, "why": why}
                    continue
                a, b = (both @ coefficients).tolist()
                if not math.isfinite(a + b):
                    raise ValueError(f"verdicts need finite rewards, got {a} and {b} for {row}: the model is broken")
                verdict = "tie" if a == b else "A" if a > b else "B"
                yield row, {"verdict": verdict, "rewards": [a, b], "prompt_cut": cut}


def summarize(data: Data, verdicts: list[dict]) -> dict:
    """Counts, win rate of A and its interval over prompts, for all rows and for each preference group."""
    prompts = {row.line: row.prompt for row in data.rows}
    groups = sorted({row.pref_group for row in data.rows if row.pref_group is not None})

    def summary(some: list[dict]) -> dict:
        judged = [verdict for verdict in some if verdict["verdict"] is not None]
        found = win_rate([v["verdict"] for v in judged], [prompts[v["line"]] for v in judged])
        counts = {name: sum(v["verdict"] == name for v in some) for name in (*SIDES, "tie")}
        of = {"rows": len(some), "prompts": found.prompts, "wins": counts["A"], "ties": counts["tie"]}
        of |= {"losses": counts["B"], "no_verdict": len(some) - len(judged)}
        if "order_dependent" in some[0]:
            of["order_dependent"] = sum(verdict["order_dependent"] for verdict in some)
        else:
            margins = [v["rewards"][0] - v["rewards"][1] for v in judged]
            of["mean_margin"] = sum(margins) / len(margins) if margins else None
        numbers = {"win_rate": found.rate, "low": found.low, "high": found.high}
        return of | {name: number if math.isfinite(number) else None for name, number in numbers.items()}

    by_group = {group: summary([v for v in verdicts if v.get("pref_group") == group]) for group in groups}
    return {"all": summary(verdicts), "pref_groups": by_group}


def table(result: dict) -> list[str]:
    """The result as lines of a table."""
    titles = {"rows": "rows", "prompts": "prompts", "wins": "A wins", "ties": "ties", "losses": "B wins"}
    titles |= {"no_verdict": "no verdict", "order_dependent": "order-dependent", "mean_margin": "mean margin"}
    titles = {name: title for name, title in titles.items() if name in result["all"]}
    lines = [["preference group", *titles.values(), "win rate of A", "95 % interval"]]
    for group, of in [*result["pref_groups"].items(), ("all", result["all"])]:
        numbers = [f"{of[name]:.3g}" if isinstance(of[name], float) else str(of[name]) for name in titles]
        rate = "-" if of["win_rate"] is None else f"{of['win_rate']:.1%}"
        interval = "-" if of["low"] is None else f"{of['low']:.1%} to {of['high']:.1%}"
        lines.append([on_one_line(group), *numbers, rate, interval])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]


def _remarks(result: dict, verdicts: list[dict]) -> list[str]:
    """What a reader of the table should know, in sentences."""
    cut = {side: count for side, count in result["answers_cut"].items() if count}
    said = [f"{count} answers of {side} were ended by --max_tokens" for side, count in cut.items()]
    if prompts := sum(verdict.get("prompt_cut", False) for verdict in verdicts):
        said.append(f"in {prompts} rows the prompt is longer than the model reads: its beginning was cut away")
    if lost := result["all"]["no_verdict"]:
        said.append(f"{lost} of {len(verdicts)} rows have no verdict and are not in the win rate; {VERDICTS} says why")
    return said


def _about(row: Row) -> dict:
    named = {"user": row.user, "pref_group": row.pref_group}
    return {"line": row.line, **{key: name for key, name in named.items() if name is not None}}


@contextmanager
def _growing(path: Path, keys: Sequence[str], what: str, total: int):
    """The rows of a JSONL file that an interrupted command may have left, and a function that adds one, to the disk
    and to the rows. Half a line at the end is dropped. A progress bar counts up to `total`."""
    content = path.read_bytes() if path.exists() else b""
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
    rows = [row for _, row in read_rows(path, dict.fromkeys(keys, object))] if end else []
    with open(path, "ab") as file, progress(what, total, done=len(rows)) as count:

        def add(row: dict) -> None:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            rows.append(row)
            count(1)

        yield rows, add


def _claim(output: Path) -> None:
    """Makes the folder. Raises ValueError if it is a file, or holds files that are not of this command."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output needs a folder, got {output}, a file: name another")
    output.mkdir(parents=True, exist_ok=True)
    held = {path.name for path in output.iterdir() if not path.name.startswith(".new-")}  # one that is being written
    if foreign := held - OUR_FILES or (held - {f".{SETTINGS}.lock"} if SETTINGS not in held else None):
        raise ValueError(
            f"--output needs a new or empty folder, or one that compare has begun, got {output} with "
            f"{listed(sorted(foreign), 3)}: name another"
        )


def _kept_settings(output: Path) -> dict[str, Any]:
    """The settings that a folder was begun with. Those of answers and verdicts count only where there are some.

    Raises:
        ValueError: the file is of something else.
    """
    path = output / SETTINGS
    if not path.exists():
        return {}
    kept = json_object(path.read_bytes(), str(path))
    needed = {"policies": list, "answers": dict, "verdicts": dict}
    if wrong := [part for part, kind in needed.items() if not isinstance(kept.get(part), kind)]:
        raise ValueError(
            f"{path} needs the settings of a comparison, got {in_words(kept.get(wrong[0]))} as {wrong[0]!r}: name "
            "another folder with --output"
        )
    filled = {file.name for file in output.glob("*.jsonl") if file.stat().st_size}
    judged = VERDICTS in filled
    return {"answers": kept["answers"] if filled else {}, "verdicts": kept["verdicts"] if judged else {}}


def _check_same(output: Path, kept: dict[str, Any], settings: dict[str, dict]) -> None:
    for part, now in settings.items():
        before = kept.get(part) or now
        for key in {**before, **now}:
            one, other = (str(values.get(key, "nothing")) for values in (before, now))
            if one != other:
                start = max(0, len(os.path.commonprefix([one, other])) - 20)  # long ones differ somewhere
                again = f", or delete {VERDICTS} to judge again" if part == "verdicts" else ""
                raise ValueError(
                    f"--output {output} needs the settings that it was begun with, got {key} "
                    f"{other[start : start + 80]!r} instead of {one[start : start + 80]!r}: name another folder{again}"
                )


def _check(model, judge, judge_model, judge_prompt, pref_group_texts, profiles, population, chat_template) -> None:
    if (model is None) == (judge is None):
        got = "neither" if model is None else "both"
        raise ValueError(f"compare needs --model or --judge, got {got}: say who judges")
    of_judge = {"--judge_model": judge_model, "--judge_prompt": judge_prompt, "--pref_group_texts": pref_group_texts}
    of_model = {"--profile": profiles, "--population": population, "--chat_template": chat_template}
    owner, others = ("--judge", of_judge) if judge is None else ("--model", of_model)
    if given := [flag for flag, value in others.items() if value]:
        raise ValueError(f"{given[0]} needs {owner}, got the other judge: leave it out")


def _check_users(data: Data, users: Users, population: bool) -> None:
    """Raises ValueError for a row whose user the model does not know, unless the average one may stand in."""
    if population:
        return
    for number, row in enumerate(data.rows):
        if row.user is None:
            raise ValueError(
                f"{data.table.place(number)} needs a user for --model, got no column of users: name it with "
                "--user_key, or take the average user with --population"
            )
        users.check([row.user], data.table.place(number))


def _readers(data: Data, texts: Path | None) -> dict[str | None, str]:
    """In words, for whom a judge compares: preference group -> its text in the file, else its name."""
    groups = sorted({row.pref_group for row in data.rows if row.pref_group is not None})
    if texts is None:
        return {None: ANYBODY, **{group: group for group in groups}}
    try:
        said = json.loads(Path(texts).read_text(encoding="utf-8"), object_pairs_hook=with_keys_once)
    except ValueError as error:
        raise ValueError(f"--pref_group_texts needs a JSON object, got {error} in {texts}: correct it") from error
    for group in groups:
        text = said.get(group) if isinstance(said, dict) else said
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"--pref_group_texts needs a text for {group!r}, got {in_words(text)} in {texts}: add it")
    return {None: ANYBODY, **{group: said[group] for group in groups}}


def _content(data: Data) -> str:
    """A hash of all that is read of the data."""
    return hashlib.sha256(json.dumps([data.rows, data.prompts]).encode()).hexdigest()


def _identity(policy: str) -> str:
    """What a policy is: a hash of the files in its folder, or its name on the hub."""
    folder = Path(policy)
    return _sha256([file for file in sorted(folder.glob("*")) if file.is_file()]) if folder.is_dir() else policy


def _sha256(files: Sequence[Path]) -> str:
    """Of the content of files."""
    digest = hashlib.sha256()
    for file in along(files, "reading files", "files"):
        with open(file, "rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
