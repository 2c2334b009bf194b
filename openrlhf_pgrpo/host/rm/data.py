"""How users travel: from a dataset column, on the margin of a pair, to the loss. It runs in every DeepSpeed rank.

The host drops every dataset column but prompt, chosen and rejected, and gives each pair one more number, `extra`: a
margin. That number travels unchanged through collating, so it becomes a `TaggedMargin`.

One account, `models.texts.Texts`, makes the tokens of both responses, because their form must not tell which one was
chosen.
"""

import inspect
import math
from collections.abc import Sequence

import wrapt

from openrlhf_pgrpo.core.annotations import preference_of
from openrlhf_pgrpo.core.names import Names, in_words, listed, name_of
from openrlhf_pgrpo.host import columns, flags, pair_texts, rows
from openrlhf_pgrpo.host.tags import TaggedMargin
from openrlhf_pgrpo.host.text_forms import asked_form
from openrlhf_pgrpo.host.user_rewards import factorized_folder
from openrlhf_pgrpo.models.form import Writer
from openrlhf_pgrpo.models.messages import count_shared, no_answer
from openrlhf_pgrpo.models.tables import as_given
from openrlhf_pgrpo.models.texts import Texts


def check(dataset, args, source: str, training: bool = True) -> list[str]:
    """Checks the rows of pairs, without a tokenizer, so before anything heavy; `args` are nested host arguments.

    Returns:
        What is worth a sentence, though nothing is wrong.

    Raises:
        ValueError: a row that cannot be used or would be used wrongly; with `--reward.factors`, one that does not say
            whose pair it is or which response is preferred, or whose responses are equal.
    """
    data = args.data
    if not len(dataset):
        raise ValueError(f"a reward model needs at least one pair, got an empty dataset {source}: add rows")
    said, equal = rows.check_pairs(dataset, data, source)
    unread = rows.unread_prompts(dataset, data, source)
    _check_margins(dataset, args, source)
    if args.reward.factors is None:
        said += [f"warning: {unread}"] if unread else []
        return [*said, *rows.check_chosen_is_preferred(dataset, source)]
    if unread:
        raise ValueError(unread)
    users = columns.names(dataset, f"--{flags.USER_KEY}", data.user_key, source)
    said += columns.spellings(users, f"--{flags.USER_KEY}", source)
    _check_preferences(dataset, data, source, training)
    _refuse_equal(equal, source)
    return said


def install(module) -> None:
    """Makes `RewardDataset` keep user and preference of each pair, and treat both of its responses alike."""
    host_process_data, host_item = module.RewardDataset.process_data, module.RewardDataset.__getitem__

    def process_data(self, data):
        # A plain function: `datasets` pickles it for its worker processes, which no wrapper of wrapt survives.
        args = self.strategy.args
        if args.reward.factors is not None:
            data = {key: as_given(value) for key, value in data.items()}
        row = host_process_data(self, data)
        if self.apply_chat_template and row["prompt"]:
            pair_texts.check_template(row["prompt"], data, args.data, self.apply_chat_template)
        if args.reward.factors is not None:
            if self.apply_chat_template:
                row |= _as_everywhere(self.writer, row, data, args.data)
            key = preference_key(args.data, data)
            preference = 1.0 if key is None else preference_of(data[key])
            if preference < 0.5:  # the host counts a pair as right if its chosen side scores higher
                row["chosen"], row["reject"], preference = row["reject"], row["chosen"], 1 - preference
            row["extra"] = {"user": name_of(data[args.data.user_key]), "preference": preference}
        return row

    def item(self, index):
        if self.strategy.args.reward.factors is None:
            return host_item(self, index)
        prompt, sides = self.prompts[index], (self.chosens[index], self.rejects[index])
        tokens = self.texts.tokens([prompt, prompt], sides)
        padded = [self.texts.pad([ids]) for ids in tokens.ids]
        return (*(side[name] for side in padded for name in ("input_ids", "attention_mask")), self.extras[index])

    def init(wrapped, self, args, kwargs):
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        strategy, dataset = call["strategy"], call["dataset"]
        if not len(dataset):  # the training data have been looked at
            raise ValueError(
                "the evaluation of a reward model needs at least one pair, got none: give --eval.dataset, or at least "
                "100 pairs in --data.dataset, of which the host takes the first 1 %"
            )
        training = not getattr(strategy, "has_training_pairs", False)  # the host makes these first
        strategy.has_training_pairs = True
        check(dataset, strategy.args, "the pairs", training)
        factorized = strategy.args.reward.factors is not None
        if factorized:
            known = _known_users(strategy, [*map(name_of, dataset[strategy.args.data.user_key][:])])
            form = asked_form(strategy.args.data, strategy.args.model.model_name_or_path)
            self.writer = Writer(form, call["tokenizer"])
        wrapped(*args, **kwargs)
        if factorized:
            extras = list(self.extras)
            numbers = known.rows([extra["user"] for extra in extras]).tolist()
            self.extras = [TaggedMargin(0.0, row, extra["preference"]) for extra, row in zip(extras, numbers)]
            self.texts = Texts(self.tokenizer, self.max_length, self.writer.ends)
        pair_texts.check_said(self, self.writer.ends if factorized else ())
        for sentence in _lengths(self) if factorized else _equal(self, training):
            strategy.print(f"[pgrpo] {sentence}")

    module.RewardDataset.process_data = process_data
    module.RewardDataset.__getitem__ = item
    wrapt.wrap_function_wrapper(module, "RewardDataset.__init__", init)


# ---- texts ----------------------------------------------------------------------------------------------------------


def _as_everywhere(writer: Writer, row: dict, data: dict, keys) -> dict[str, str]:
    """Prompt and answers of a pair, as every command writes them; `row` has those of the host's chat template."""
    sides = data[keys.chosen_key], data[keys.rejected_key]
    prompt, written = row["prompt"], (row["chosen"], row["reject"])
    if keys.prompt_key:
        answers = [*map(writer.words, written)]
    else:
        shared = count_shared(*sides)
        start, ends = sides[0][:shared], [side[shared:] for side in sides]
        if not start or any(map(no_answer, ends)):  # the answers are to different prompts, which was said
            return {}
        prompt, answers = writer.prompt(start), [writer.response(start, end) for end in ends]
    return {"prompt": prompt, "chosen": answers[0], "reject": answers[1]}


# ---- users ----------------------------------------------------------------------------------------------------------


def _known_users(strategy, users: Sequence[str]) -> Names:
    """The users of the table, by row; `users` are those of the pairs.

    The host makes the dataset of the training data first. Its users get the rows, unless training starts from a
    factorized model. We keep them on the strategy, as `reward_users`, because the script hands nothing else to both
    data and model.

    Raises:
        ValueError: a pair of a user without a row.
    """
    known = getattr(strategy, "reward_users", None)
    if known is not None:
        _check_known(users, known, "the training data")
        return known
    folder = factorized_folder(strategy.args.model.model_name_or_path)
    if folder is None:
        strategy.reward_users = Names(sorted(set(users)))
    else:
        strategy.reward_users = Names(folder.users)
        _check_known(users, strategy.reward_users, f"the model {folder.name}")
    return strategy.reward_users


def _check_known(users: Sequence[str], known: Names, where: str) -> None:
    if unknown := sorted({user for user in users if user not in known}):
        found = listed(unknown, 5)
        raise ValueError(f"every pair needs a user of {where}, got {found}: drop their pairs, or add them there first")


# ---- preferences and margins ----------------------------------------------------------------------------------------


def preference_key(data, present) -> str | None:
    """The column with the preference for the chosen response: that of the flag, else `preference` if it is among those
    that are present, as `openrlhf-pgrpo factorize` reads it; None if chosen is always preferred."""
    return data.preference_key or (rows.PREFERENCE if rows.PREFERENCE in present else None)


def _check_preferences(dataset, data, source: str, training: bool) -> None:
    key, flag = preference_key(data, dataset.column_names), f"--{flags.PREFERENCE_KEY}"
    if key is None:
        return
    wrong, ties = {}, 0
    for row, value in enumerate(columns.column(dataset, flag, key, source)):
        try:
            ties += preference_of(value) == 0.5
        except ValueError as error:
            wrong[row] = error
    if wrong:
        raise ValueError(
            f"every row needs a number from 0 (rejected) to 1 (chosen) in {key!r} ({flag}), got "
            f"{next(iter(wrong.values()))} in {columns.at([*wrong], source)}: correct it or drop the row"
        )
    if training and ties == len(dataset):
        raise ValueError(
            f"training needs at least one answer that is preferred, got only ties in {key!r} ({flag}) of {source}: "
            "add rows"
        )


def _check_margins(dataset, args, source: str) -> None:
    """The host reads a column `margin` without being asked to, and trains on it with --model.margin_loss_enable."""
    if args.reward.factors is not None:
        return
    if "margin" not in dataset.column_names:
        if args.model.margin_loss_enable:
            raise ValueError(
                f"--model.margin_loss_enable needs a column 'margin' in {source}, got none, so it would do nothing: "
                "add it or leave the flag out"
            )
        return
    for row, value in enumerate(dataset["margin"][:]):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not (number or value is None and not args.model.margin_loss_enable):
            raise ValueError(
                f"every row needs a finite number in 'margin', got {in_words(value)} in row {row} of {source}: "
                "correct it, or give the column another name"
            )


# ---- tokens ---------------------------------------------------------------------------------------------------------


def _refuse_equal(equal: Sequence[int], source: str) -> None:
    if equal:
        raise ValueError(
            f"both responses of a pair need different texts, got equal ones in {columns.at(equal, source)}: drop such "
            "rows, because they teach nothing"
        )


def _lengths(dataset) -> list[str]:
    """Says how many prompts are cut.

    Raises:
        ValueError: a response that does not fit, or two of a pair that are the same tokens.
    """
    prompts, texts, alike = list(dataset.prompts), dataset.texts, pair_texts.may_be_equal(dataset.tokenizer)
    pairs = [*zip(list(dataset.chosens), list(dataset.rejects))]
    # Those that are certainly short are not looked at.
    long = [
        row
        for row, (tokens, pair) in enumerate(zip(pair_texts.most_tokens(dataset), pairs))
        if any(pair_texts.may_fill(answer, tokens, texts.max_length) for answer in pair)
        or alike(*pair, pair_texts.common_start(*pair))
    ]
    cut, equal, too_long = 0, [], {}
    for start in range(0, len(long), pair_texts.AT_ONCE):
        part = long[start : start + pair_texts.AT_ONCE]
        answers = [pairs[row][side] for side in (0, 1) for row in part]
        found = texts.tokens([prompts[row] for row in part] * 2, answers)
        for row, size in zip(part, found.answers.reshape(2, -1).max(axis=0).tolist()):
            if size > texts.max_length:
                too_long[row] = size
        cut += int(found.cut.reshape(2, -1).any(axis=0).sum())
        equal += [row for row, one, other in zip(part, found.ids, found.ids[len(part) :]) if one == other]
    if too_long:
        raise ValueError(
            f"every response needs room in {texts.max_length} tokens (--data.max_len), got one of "
            f"{next(iter(too_long.values()))} tokens in {columns.at([*too_long], 'the pairs')}: raise it, or drop "
            "such rows"
        )
    _refuse_equal(equal, "the pairs, once they are tokens")
    if not cut:
        return []
    return [
        f"{cut} of {len(pairs)} prompts are cut from the left, to fit with their responses into {texts.max_length} "
        "tokens (--data.max_len)"
    ]


def _equal(dataset, training: bool) -> list[str]:
    """Says how many pairs the host cuts to equal texts, in its own training.

    Raises:
        ValueError: all of them, where they are to teach.
    """
    equal, pairs = pair_texts.equal_tokens(dataset, pair_texts.most_tokens(dataset)), len(dataset)
    where = f"their first {dataset.max_length} tokens (--data.max_len)"
    if training and len(equal) == pairs:
        raise ValueError(
            f"training needs pairs whose responses differ in {where}, got none among {pairs}: raise --data.max_len, "
            "or look whether both columns are the same"
        )
    return [f"{len(equal)} of {pairs} pairs teach nothing, because they are equal in {where}"] if equal else []
