"""How a pair's preference group travels: from a dataset column, on the length of its prompt, to the loss.

The host drops every dataset column but prompt, chosen and rejected, and gives each pair one more number, `extra`: the
length of its prompt in tokens. That number travels unchanged through collating to `concatenated_forward`, so it
becomes a `TaggedLength`.

The host cuts texts after `--data.max_len` tokens. A pair whose answers are equal from then on teaches nothing: its
loss stays ln 2, and a preference group of such pairs would draw all the weight. So they are counted.
"""

import inspect
from collections import Counter
from collections.abc import Sequence

import wrapt

from openrlhf_pgrpo.core.names import listed, name_of
from openrlhf_pgrpo.host import columns, flags, pair_texts, rows
from openrlhf_pgrpo.host.tags import TaggedLength


def check(dataset, args, source: str, training: bool = True) -> list[str]:
    """Checks the rows of pairs, without a tokenizer, so before anything heavy; `args` are nested host arguments.

    Returns:
        What is worth a sentence, though nothing is wrong.

    Raises:
        ValueError: a row that cannot be used or would be used wrongly, a preference group without a pair that teaches,
            or a single one.
    """
    data = args.data
    if not len(dataset):
        raise ValueError(f"preference training needs at least one pair, got an empty dataset {source}: add rows")
    said, equal = rows.check_pairs(dataset, data, source, dpo=True)
    said += rows.check_chosen_is_preferred(dataset, source)
    unread = rows.unread_prompts(dataset, data, source)
    names = None
    if data.pref_group_key is not None:
        names = columns.names(dataset, f"--{flags.PREF_GROUP_KEY}", data.pref_group_key, source)
        said += columns.spellings(names, f"--{flags.PREF_GROUP_KEY}", source)
        if unread:
            raise ValueError(unread)
        if training and len(set(names)) < 2:
            raise ValueError(
                f"group-robust training needs at least two preference groups in {data.pref_group_key!r} "
                f"(--{flags.PREF_GROUP_KEY}), got {listed(set(names))} alone in {source}: name another column, or "
                "leave the flag out"
            )
    elif unread:
        said.append(f"warning: {unread}")
    return [*said, *_teaching(equal, names or [None] * len(dataset), source)]


def install(module) -> None:
    """Makes `RewardDataset` keep the preference group of each pair, count the pairs of each in `pref_groups`, and say
    what the host leaves out or cuts to equal texts."""
    host_process_data = module.RewardDataset.process_data

    def process_data(self, data):
        # A plain function: `datasets` pickles it for its worker processes, which no wrapper of wrapt survives.
        row = host_process_data(self, data)
        if self.apply_chat_template and row["prompt"] is not None:
            pair_texts.check_template(row["prompt"], data, self.strategy.args.data, self.apply_chat_template)
        if (key := self.strategy.args.data.pref_group_key) is not None:
            row["extra"] = {"prompt_tokens": row["extra"], "pref_group": name_of(data[key])}
        return row

    def init(wrapped, self, args, kwargs):
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        strategy, dataset = call["strategy"], call["dataset"]
        check(dataset, strategy.args, "the pairs", training=False)
        key = strategy.args.data.pref_group_key
        given = [None] * len(dataset) if key is None else [*map(name_of, dataset[key][:])]
        wrapped(*args, **kwargs)
        left = [None] * len(self.extras)
        if key is not None:
            left = [extra["pref_group"] for extra in self.extras]
            self.extras = [TaggedLength(extra["prompt_tokens"], extra["pref_group"]) for extra in self.extras]
            self.pref_groups = Counter(left)
        pair_texts.check_said(self)
        said = _room(self.max_length, given, left)
        equal = pair_texts.equal_tokens(self, map(int, self.extras))
        said += _teaching(equal, left, f"their first {self.max_length} tokens (--data.max_len)")
        for sentence in said:
            strategy.print(f"[pgrpo] {sentence}")

    module.RewardDataset.process_data = process_data
    wrapt.wrap_function_wrapper(module, "RewardDataset.__init__", init)


def _room(max_length: int, given: Sequence[str | None], left: Sequence[str | None]) -> list[str]:
    """What the host dropped, because a prompt leaves no room for an answer.

    Raises:
        ValueError: nothing is left of a preference group.
    """
    before, after = Counter(given), Counter(left)
    if lost := [name for name in before if not after[name]]:
        raise ValueError(
            f"{_who(lost)} needs a pair that fits --data.max_len {max_length}, got none{_of(lost)}: raise it, shorten "
            "their prompts or drop their rows"
        )
    if len(given) == len(left):
        return []
    return [
        f"{len(given) - len(left)} of {len(given)} pairs are left out, because their prompts leave no room for an "
        f"answer in --data.max_len {max_length}{_shares(before - after, before)}"
    ]


def _teaching(equal: Sequence[int], names: Sequence[str | None], where: str) -> list[str]:
    """What to say of pairs (by row) whose answers are equal; the preference group of every pair is in `names`.

    Raises:
        ValueError: a preference group has no other pairs.
    """
    pairs, same = Counter(names), Counter(names[row] for row in equal)
    if lost := [name for name in pairs if same[name] == pairs[name]]:
        row = next(row for row in equal if names[row] == lost[0])
        raise ValueError(
            f"{_who(lost)} needs pairs whose answers differ in {where}, got none{_of(lost)}; pair {row} is the first "
            f"of {same[lost[0]]}: drop these rows or, if long prompts leave answers no room, raise --data.max_len"
        )
    if not equal:
        return []
    return [
        f"{len(equal)} of {len(names)} pairs teach nothing, because their answers are equal in {where}"
        f"{_shares(same, pairs)}"
    ]


def _who(lost: list[str | None]) -> str:
    return "training" if lost == [None] else "every preference group"


def _of(lost: list[str | None]) -> str:
    return "" if lost == [None] else f" of {listed(lost)}"


def _shares(some: Counter, all_: Counter) -> str:
    """': 3 of 8 of 'a', ...'; empty if there are no preference groups."""
    if None in all_:
        return ""
    shown = [f"{count} of {all_[name]} of {name!r}" for name, count in some.most_common(8)]
    return f": {', '.join(shown)}{f' and {len(some) - 8} more' * (len(some) > 8)}"
