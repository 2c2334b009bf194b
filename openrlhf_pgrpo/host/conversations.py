"""Columns of conversations, looked at as a whole: to look at each message takes ten times as long.

What is looked at is the usual kind alone: every row a list of messages, every message a role and a content, all of
them texts. Of other columns this says None, and `rows` looks at each row, also to say what is wrong with it.

Axes: N rows, M messages in all rows.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from openrlhf_pgrpo.core.names import UNSEEN

# A sign that can be seen. `rows` looks closer at texts without one.
SEEN = r"[^\s\p{Z}\p{C}" + "".join(sorted(UNSEEN)) + "]"


class Alike(NamedTuple):
    """Rows of pairs of conversations: those that differ before the last message; those of a single message; those that
    are equal."""

    differ: list[int]
    single: list[int]
    equal: list[int]


class _Messages(NamedTuple):
    """The fields (M,) of all messages, the number of messages (N,) of a row, the last one (N,) of it, and whether the
    assistant wrote that one (N,), or a user or tool (N,)."""

    fields: dict[str, pa.Array]
    sizes: np.ndarray
    last: np.ndarray
    answered: np.ndarray
    asked: np.ndarray


def await_answers(dataset, key: str) -> bool | None:
    """Whether every row is a conversation that an answer can follow."""
    for batch in _batches(dataset, key):
        messages = _messages(batch.column(key))
        if messages is None or not messages.asked.all():
            return None
    return True


def compared(dataset, one_key: str, other_key: str) -> Alike | None:
    """How the conversations of two columns are alike, if all of them end with an answer."""
    found, done = Alike([], [], []), 0
    for batch in _batches(dataset, one_key, other_key):
        one, other = (_messages(batch.column(key)) for key in (one_key, other_key))
        if one is None or other is None or not (one.answered.all() and other.answered.all()):
            return None
        if _types(one) != _types(other) or (one.sizes != other.sizes).any():
            return None
        unlike = np.zeros(one.sizes.sum(), bool)
        for name in one.fields:
            unlike |= pc.not_equal(one.fields[name], other.fields[name]).to_numpy(zero_copy_only=False)
        starts = one.last - one.sizes + 1
        equal = ~np.logical_or.reduceat(unlike, starts)
        unlike[one.last] = False
        differ = np.logical_or.reduceat(unlike, starts)
        for rows, here in zip(found, (differ, one.sizes == 1, equal), strict=True):
            rows += (done + np.flatnonzero(here)).tolist()
        done += len(one.sizes)
    return found


def any_longer(dataset, one_key: str, other_key: str) -> bool:
    """Whether a row has more messages in the one column than in the other, which has some."""
    for batch in _batches(dataset, one_key, other_key):
        one, other = batch.column(one_key), batch.column(other_key)
        if _is_list(one) and _is_list(other):
            sizes, least = pc.list_value_length(one), pc.list_value_length(other)
            if pc.any(pc.and_(pc.greater(sizes, least), pc.greater(least, 0))).as_py():
                return True
    return False


def _batches(dataset, *keys: str) -> list[pa.RecordBatch]:
    return dataset.select_columns([*dict.fromkeys(keys)]).with_format("arrow")[:].to_batches()


def _messages(column: pa.Array) -> _Messages | None:
    kind = column.type
    if not _is_list(column) or not pa.types.is_struct(kind.value_type):
        return None
    turns, sizes = column.flatten(), column.value_lengths().to_numpy(zero_copy_only=False)
    if column.null_count or not sizes.all():
        return None
    fields = dict(zip((field.name for field in kind.value_type), turns.flatten()))
    if not fields.keys() >= {"role", "content"} or not all(map(_texts, fields.values())):
        return None
    last = sizes.cumsum() - 1
    ends = {name: fields[name].take(pa.array(last)) for name in ("role", "content")}
    of_users = fields["content"].filter(pc.equal(fields["role"], "user"))
    if not (_filled(fields["role"]) and _filled(ends["content"]) and _filled(of_users)):
        return None
    kinds = (pa.array(["assistant"]), pa.array(["user", "tool"]))
    wrote = (pc.is_in(ends["role"].cast(pa.string()), kind).to_numpy(zero_copy_only=False) for kind in kinds)
    return _Messages(fields, sizes, last, *wrote)


def _is_list(column: pa.Array) -> bool:
    return pa.types.is_list(column.type) or pa.types.is_large_list(column.type)


def _types(messages: _Messages) -> dict[str, pa.DataType]:
    return {name: field.type for name, field in messages.fields.items()}


def _texts(field: pa.Array) -> bool:
    return (pa.types.is_string(field.type) or pa.types.is_large_string(field.type)) and not field.null_count


def _filled(field: pa.Array) -> bool:
    return pc.all(pc.match_substring_regex(field, SEEN)).as_py()
