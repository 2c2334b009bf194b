"""What the rows of prompts and of pairs have to hold, so that the host makes the texts that were meant.

The host asks nothing. Without a chat template it prints a list of messages as text; with one it cuts the rejected
answer out by the length of the chosen one's prompt. Nothing here needs a tokenizer, so it runs before anything heavy.

`data` are nested host arguments under `--data.`; `source` is where the rows come from, in words. Rows are counted
from 0.
"""

import math
from collections.abc import Callable, Iterable
from itertools import repeat

from openrlhf_pgrpo.core.names import in_words, is_blank
from openrlhf_pgrpo.host import columns, conversations
from openrlhf_pgrpo.models.messages import (
    BY_CHANCE,
    check_forms,
    filled,
    no_messages,
    printed_messages,
    repeating,
)

TEMPLATE = "--data.apply_chat_template"
ANSWERERS = ("assistant", "model", "gpt", "bot", "chatbot", "ai")  # roles that formats of chats give who answers
MESSAGES = "messages as {'role': ..., 'content': ...}"  # how to write them
PREFERENCE = "preference"  # the column with the preference for the chosen answer, unless a flag names another


def check_prompts(dataset, data, source: str) -> list[str]:
    """Refuses a row whose prompt is not what PPO's flags need; returns what else is worth a sentence.

    Raises:
        ValueError: a column is missing, or a prompt is no text; with a chat template, neither a text nor messages.
    """
    flag = "--data.input_key"
    _check_template(data)
    found = _check_starts_of_answers(dataset, _wrong_start, data, data.input_key, flag, source)
    said = columns.printed(found or [], flag, source)
    if data.apply_chat_template and data.input_template:
        said.append(f"warning: --data.input_template does nothing beside {TEMPLATE}")
    return [*said, *_labels(dataset, data, source), *_images(dataset, data, source)]


def check_pairs(dataset, data, source: str, dpo: bool = False) -> tuple[list[str], list[int]]:
    """Refuses a row whose prompt or answers are not what the flags of the trainers on pairs need.

    Returns:
        What else is worth a sentence, and the rows whose answers are equal: for DPO, but for newlines at their end.

    Raises:
        ValueError: a column is missing or a text is; with a chat template, something is no conversation; for DPO,
            two conversations without a column of prompts differ before their last message.
    """
    _check_template(data)
    sides = {"--data.chosen_key": data.chosen_key, "--data.rejected_key": data.rejected_key}
    for flag, key in sides.items():
        columns.need(dataset, flag, key, source)
    starts = answers = None
    if data.prompt_key:
        starts = _check_starts_of_answers(dataset, _wrong_messages, data, data.prompt_key, "--data.prompt_key", source)
    alike = conversations.compared(dataset, *sides.values()) if data.apply_chat_template else None
    if alike is None:
        answers = [columns.column(dataset, flag, key, source) for flag, key in sides.items()]
        for (flag, key), column in zip(sides.items(), answers):
            _check(column, _wrong_end if data.apply_chat_template else _wrong_text, key, flag, source)
        if not data.apply_chat_template:
            key = getattr(data, "preference_key", None) or PREFERENCE
            preferences = map(_number, dataset[key][:]) if key in dataset.column_names else repeat(1.0)
            check_forms(*answers, preferences, source)
        alike = _compared(*answers, data, dpo)
    if data.prompt_key:
        said = _check_repeated(dataset, data, source, starts, answers)
    else:
        said = _check_starts(alike, data, source, dpo) if data.apply_chat_template else []
    for flag, column in zip(["--data.prompt_key", *sides], [starts or [], *(answers or [])]):
        said += columns.printed(column, flag, source)
    if data.input_template and (data.apply_chat_template or not data.prompt_key):
        beside = f"beside {TEMPLATE}" if data.apply_chat_template else "without --data.prompt_key"
        said.append(f"warning: --data.input_template does nothing {beside}")
    return said, alike.equal


def _check_starts_of_answers(dataset, wrong: Callable, data, key: str, flag: str, source: str) -> list | None:
    """Checks a column of prompts, and returns it if it was read; `wrong` is for those that a chat template writes."""
    columns.need(dataset, flag, key, source)
    if not data.apply_chat_template:
        wrong = _wrong_text
    elif conversations.await_answers(dataset, key):
        return None
    _check(found := columns.column(dataset, flag, key, source), wrong, key, flag, source)
    return found


def _compared(chosen: list, rejected: list, data, dpo: bool) -> conversations.Alike:
    """How answers, or conversations, are alike, row by row."""
    if dpo and not data.apply_chat_template:  # the host trains on answers without newlines at their end
        chosen, rejected = ([answer.rstrip("\n") for answer in column] for column in (chosen, rejected))
    equal = [row for row, (one, other) in enumerate(zip(chosen, rejected)) if one == other]
    if not data.apply_chat_template or data.prompt_key:
        return conversations.Alike([], [], equal)
    differ = [row for row, pair in enumerate(zip(chosen, rejected)) if not _start_alike(*pair)]
    return conversations.Alike(differ, [row for row, turns in enumerate(chosen) if len(turns) < 2], equal)


def _check_starts(alike: conversations.Alike, data, source: str, dpo: bool) -> list[str]:
    """Two conversations of a pair hold their prompt themselves: all messages but the last."""
    chosen_key, rejected_key = data.chosen_key, data.rejected_key
    if alike.differ and dpo:
        raise ValueError(
            f"both conversations of a pair need the same messages before the last one, got different ones in "
            f"{chosen_key!r} and {rejected_key!r} in {columns.at(alike.differ, source)}: correct or drop them"
        )
    if alike.single and dpo:
        raise ValueError(
            f"every row needs messages before the answer in {chosen_key!r} (--data.chosen_key), got one message in "
            f"{columns.at(alike.single, source)}: add the prompt to it, or name a column of prompts with "
            "--data.prompt_key"
        )
    if alike.differ:
        return [
            f"conversations in {chosen_key!r} and {rejected_key!r} differ before their last message in "
            f"{columns.at(alike.differ, source)}: there the reward compares answers to different prompts"
        ]
    return []


def _check_repeated(dataset, data, source: str, starts: list | None, answers: list[list] | None) -> list[str]:
    """Answers that begin with their prompt, beside a column of prompts: the host would write it twice.

    A conversation that does is a whole one. A text may begin with the same words by chance, so only if all do,
    of more than a few prompts, is it refused. `starts` and `answers` are columns as far as they were read.
    """
    prompt, sides = data.prompt_key, (data.chosen_key, data.rejected_key)
    if data.apply_chat_template and not any(conversations.any_longer(dataset, key, prompt) for key in sides):
        return []
    triple = (starts or dataset[prompt][:], *(answers or [dataset[key][:] for key in sides]))
    if data.apply_chat_template:
        rows = [row for row, (start, *ends) in enumerate(zip(*triple)) if any(_begins(end, start) for end in ends)]
    else:
        rows = repeating(*triple)
    if not rows:
        return []
    if not data.apply_chat_template and (len(rows) < len(dataset) or len({*triple[0]}) < BY_CHANCE):
        return [f"warning: both answers begin with the text of their prompt in {columns.at(rows, source)}"]
    raise ValueError(
        f"answers need to begin after their prompt, got ones that repeat it in {columns.at(rows, source)}: leave "
        "out --data.prompt_key, or cut the prompt off the answers, because it would be written twice"
    )


def _begins(conversation: list[dict], start: list[dict]) -> bool:
    return _same(conversation[: len(start)], start)


def _check(column: list, wrong: Callable, key: str, flag: str, source: str) -> None:
    """Raises ValueError if `wrong` says of a row what it needs, what it has and what to do."""
    bad = [row for row, value in enumerate(column) if wrong(value) is not None]
    if bad:
        need, got, do = wrong(column[bad[0]])
        raise ValueError(f"every row needs {need} in {key!r} ({flag}), got {got} in {columns.at(bad, source)}: {do}")


# ---- what is wrong with a value, if anything: what it needs to be, what it is, what to do ----


def _wrong_text(value):
    if isinstance(value, str) and not is_blank(value):
        if printed_messages(value):
            do = f"save them as a list, as JSON lines or Parquet do, and pass {TEMPLATE}"
            return "a text", f"messages that were printed, {value[:80]!r}", do
        return None
    do = "fill it in or drop the row" if value is None or isinstance(value, str) else "write it as a text"
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        do = f"pass {TEMPLATE}, which makes a text of messages"
    return "a text", in_words(value), do


def _wrong_start(value):
    """A prompt for PPO's chat template may be a text, too: it becomes the message of a user."""
    if isinstance(value, list):
        return _wrong_messages(value)
    return _wrong_text(value) and ("a text or a list of messages", *_wrong_text(value)[1:])


def _wrong_messages(value):
    need = "a list of messages that an answer can follow"
    if got := no_messages(value):
        return need, got, f"write {MESSAGES}, as openrlhf-pgrpo pairs --messages does, or leave out {TEMPLATE}"
    last = value[-1]["role"]
    if last.casefold() in ANSWERERS:
        of = "the assistant" if last == "assistant" else f"the role {last!r}, an assistant's"
        return need, f"a last message of {of}", "drop it, so that the prompt ends before the answer"
    if all(turn["role"] in ("system", "developer") for turn in value):
        return need, f"messages of the role {last!r} alone", "add what the user says"
    return None


def _wrong_end(value):
    need = "a list of messages that ends with the answer"
    if got := no_messages(value):
        return need, got, f"write {MESSAGES}, as openrlhf-pgrpo pairs --messages does, or leave out {TEMPLATE}"
    if value[-1]["role"] != "assistant":
        return need, f"a last message of the role {value[-1]['role']!r}", "end it with a message of the assistant"
    return None


def _start_alike(one: list[dict], other: list[dict]) -> bool:
    """Whether two conversations are the same but for their last message."""
    return _same(one[:-1], other[:-1])


def _same(one: list[dict], other: list[dict]) -> bool:
    return one == other or [*map(filled, one)] == [*map(filled, other)]


# ---- what only looks wrong ----


def _check_template(data) -> None:
    template, mark = data.input_template, "a prompt"
    if not template:
        return
    need = (
        f"--data.input_template needs one {{}}, where the prompt goes, and every other brace doubled, got {template!r}"
    )
    try:
        written = template.format(mark)
    except (IndexError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{need}: double them") from error
    if "{}" not in template or mark not in written:  # the host leaves out a template without these two signs
        raise ValueError(f"{need}: write {{}} where the prompt goes, or leave the flag out")


def _labels(dataset, data, source: str) -> Iterable[str]:
    if data.label_key is None:
        return
    labels = columns.column(dataset, "--data.label_key", data.label_key, source)
    if without := [row for row, label in enumerate(labels) if label is None or label != label]:
        yield (
            f"warning: no label in {data.label_key!r} (--data.label_key) in {columns.at(without, source)}: there the "
            "reward function gets None"
        )


def _images(dataset, data, source: str) -> Iterable[str]:
    key, most = getattr(data, "image_key", None), getattr(data, "max_images_per_prompt", 0)
    if key not in dataset.column_names:
        if most:
            raise ValueError(
                f"--data.max_images_per_prompt {most} needs a column of images (--data.image_key), got {key!r}; "
                f"columns of {source} are {sorted(dataset.column_names)}: correct the flag or add the column"
            )
    elif not most and dataset.data.column(key).null_count < len(dataset.data):
        yield f"warning: images in {key!r} of {source} are not read without --data.max_images_per_prompt"


def unread_prompts(dataset, data, source: str) -> str | None:
    """What to say if there is a column of prompts that no flag names; answers that begin with it do not need it."""
    if data.prompt_key or data.apply_chat_template or "prompt" not in dataset.column_names:
        return None
    for row, (prompt, answer) in enumerate(zip(dataset["prompt"][:], dataset[data.chosen_key][:])):
        if not isinstance(prompt, str) or not answer.startswith(prompt.strip()):
            return (
                f"--data.prompt_key needs the column of prompts, got none, and {data.chosen_key!r} in row {row} of "
                f"{source} does not begin with 'prompt': pass --data.prompt_key prompt, or drop the column"
            )
    return None


def check_chosen_is_preferred(dataset, source: str) -> list[str]:
    """For a training that reads no preferences: refuses data in which a column says that `chosen` is not preferred.

    Raises:
        ValueError: a preference other than 1, as data for factorized reward models have them.
    """
    if PREFERENCE not in dataset.column_names:
        return []
    values = dataset[PREFERENCE][:]
    numbers = [*map(_number, values)]
    if lost := [row for row, number in enumerate(numbers) if number is not None and number < 1]:
        raise ValueError(
            f"this training needs preferred answers as chosen ones, got {values[lost[0]]} in {PREFERENCE!r} in "
            f"{columns.at(lost, source)}: swap answers that lost, drop ties, and then drop the column"
        )
    if all(number == 1 or value is None or value != value for value, number in zip(values, numbers)):
        return []
    return [f"warning: the column {PREFERENCE!r} of {source} is not read: 'chosen' counts as preferred"]


def _number(value) -> float | None:
    """The number that a value is, even if it is written as a text; None if it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if math.isnan(number) else number
