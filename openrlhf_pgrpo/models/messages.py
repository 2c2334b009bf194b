"""Texts and lists of messages in people's data: whether a value is one.

The trainers' early look asks it too, so it does without transformers, which take ten seconds to import.
"""

import ast
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from openrlhf_pgrpo.core.names import in_words, is_blank
from openrlhf_pgrpo.files import is_text

Text = str | list[dict]  # a text, or messages
BY_CHANCE = 10  # fewer pairs, or prompts, may be alike by chance


def no_text(value: Any) -> str | None:
    """Why this is neither a text with something in it nor a list of messages, in words; None if it is one."""
    if isinstance(value, list):
        return no_messages(value)
    if isinstance(value, str) and not is_blank(value):
        if printed_messages(value):
            return f"messages that were printed as a text, {value[:80]!r}"
        return None if is_text(value) else f"half of a character in {value[:80]!r}"
    return in_words(value)


def filled(turn: dict) -> dict:
    """A message without the keys that say nothing: arrow gives every message of a column the keys of all."""
    return {key: value for key, value in turn.items() if value is not None}


def count_shared(one: list[dict], other: list[dict]) -> int:
    """How many messages two conversations begin with alike."""
    for number, (turn, its) in enumerate(zip(one, other)):
        if filled(turn) != filled(its):
            return number
    return min(len(one), len(other))


def no_answer(value: Any) -> str | None:
    """Why this is no answer, as `no_text`; of messages, a model has to begin and to end them."""
    wrong = no_text(value)
    if wrong or isinstance(value, str):
        return wrong
    for where, turn in (("begins", value[0]), ("ends", value[-1])):
        if turn["role"] in ("user", "system", "developer"):
            return f"messages of which the one that {where} them is of {turn['role']!r}"
    return None


def printed_messages(text: str) -> bool:
    """Whether a text is what Python or JSON prints of a list of messages, as when they go through CSV."""
    if not text.lstrip().startswith("[{"):
        return False
    for read in (json.loads, ast.literal_eval):
        try:
            return no_messages(read(text)) is None
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return False


def check_forms(
    first: Sequence[Text], second: Sequence[Text], preferences: Iterable[float | None], source: str
) -> None:
    """Refuses pairs of which all answers that won are printed lists and no other is, or the other way round: their
    form tells who won. Few pairs may be so by chance.

    Args:
        preferences: for the first answer; None counts as 1.

    Raises:
        ValueError: they are so.
    """
    won = [
        pair if preference is None or preference > 0.5 else pair[::-1]
        for *pair, preference in zip(first, second, preferences)
        if preference != 0.5
    ]
    listed = [(_is_list(chosen), _is_list(rejected)) for chosen, rejected in won]
    for side, form in (("chosen", (True, False)), ("rejected", (False, True))):
        if len(listed) >= BY_CHANCE and {*listed} == {form}:
            raise ValueError(
                f"both answers of a pair need one form, got a printed list as the {side} answer of every pair of "
                f"{source}: take the texts out of the lists, because the form would tell the answers apart"
            )


def _is_list(text: Text) -> bool:
    return isinstance(text, str) and text.startswith("[") and text.endswith("]")


def repeating(prompts: Sequence[Text], *answers: Sequence[Text]) -> list[int]:
    """The rows in which every answer begins with the text of its prompt, so that a model would read it twice."""
    return [
        row
        for row, (prompt, *its) in enumerate(zip(prompts, *answers))
        if isinstance(prompt, str) and all(isinstance(answer, str) and answer.startswith(prompt) for answer in its)
    ]


def check_begun(
    prompts: Sequence[Text], *answers: Sequence[Text], places: Callable[[Sequence[int]], str]
) -> list[str]:
    """What to say about rows that are `repeating`, whose `places` are named. A text may begin with the words of its
    prompt by chance, as "Hello! ..." answers "Hello", so only if all do is it refused.

    Raises:
        ValueError: all do, and they answer more than a few prompts.
    """
    rows = repeating(prompts, *answers)
    if not rows:
        return []
    if len(rows) == len(prompts) and len({prompts[row] for row in rows}) >= BY_CHANCE:
        raise ValueError(
            f"answers need to begin after their prompt, got ones that repeat it in {places(rows)}: cut the prompt off "
            "the answers, because it would be read twice"
        )
    return [f"warning: answers begin with the text of their prompt in {places(rows)}, which is read twice there"]


def no_messages(value: Any) -> str | None:
    """Why this is no list of messages with a text of the user's and in the last one, in words; None if it is."""
    if not isinstance(value, list) or not value:
        return in_words(value)
    for number, turn in enumerate(value):
        if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
            return f"{in_words(turn)} as message {number}"
        role, content = turn["role"], turn["content"]
        if not isinstance(role, str) or is_blank(role):
            return f"{in_words(role)} as the role of message {number}"
        parts = isinstance(content, list) and content and all(isinstance(p, dict) and "type" in p for p in content)
        calls = content is None and turn.get("tool_calls")  # a call of a tool needs no text
        if not (isinstance(content, str) or parts or calls):
            return f"{in_words(content)} as the content of message {number}"
        last = number == len(value) - 1
        if (last or role == "user") and _says_nothing(content):
            got = in_words(content) if isinstance(content, str) else "parts that show nothing"
            return f"{got} as the content of {'the last message' if last else f'message {number}'}"
    return None


def _says_nothing(content: str | list[dict] | None) -> bool:
    """Whether a message has no text that can be seen, no image and nothing else."""
    if isinstance(content, str):
        return is_blank(content)
    return content is not None and all(
        part["type"] == "text" and is_blank(str(part.get("text") or "")) for part in content
    )
