"""Texts and lists of messages in people's data: whether a value is one.

The trainers' early look asks it too, so it does without transformers, which take ten seconds to import.
"""

from typing import Any

from openrlhf_pgrpo.core.names import in_words, is_blank
from openrlhf_pgrpo.files import is_text

Text = str | list[dict]  # a text, or messages


def no_text(value: Any) -> str | None:
    """Why this is neither a text with something in it nor a list of messages, in words; None if it is one."""
    if isinstance(value, list):
        return no_messages(value)
    if isinstance(value, str) and not is_blank(value):
        return None if is_text(value) else f"half of a character in {value[:80]!r}"
    return in_words(value)


def no_messages(value: Any) -> str | None:
    """Why this is no list of messages with something in the last one, in words; None if it is one."""
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
    if isinstance(value[-1]["content"], str) and is_blank(value[-1]["content"]):
        return f"{in_words(value[-1]['content'])} as the content of the last message"
    return None
