"""How users travel: from a dataset column, on the margin of a pair, to the loss. It runs in every DeepSpeed rank.

The host drops every dataset column but prompt, chosen and rejected, and gives each pair one more number, `extra`: a
margin. That number travels unchanged through collating, so it becomes a `TaggedMargin`.

One function, `models.texts.text_of`, makes text and tokens of both responses, because their form must not tell which
one was chosen.
"""

import inspect
from collections.abc import Sequence

import wrapt

from openrlhf_pgrpo.core.names import Names, listed
from openrlhf_pgrpo.host import columns, flags
from openrlhf_pgrpo.host.tags import TaggedMargin
from openrlhf_pgrpo.host.user_rewards import factorized_folder
from openrlhf_pgrpo.models.texts import encode, end_of_text, text_of


def install(module) -> None:
    """Makes `RewardDataset` keep user and preference of each pair, and treat both of its responses alike."""
    host_process_data, host_item = module.RewardDataset.process_data, module.RewardDataset.__getitem__

    def process_data(self, data):
        # A plain function: `datasets` pickles it for its worker processes, which no wrapper of wrapt survives.
        row = host_process_data(self, data)
        args = self.strategy.args
        if args.reward.factors is not None:
            preference = 1.0 if args.data.preference_key is None else float(data[args.data.preference_key])
            if preference < 0.5:  # the host counts a pair as right if its chosen side scores higher
                row["chosen"], row["reject"], preference = row["reject"], row["chosen"], 1 - preference
            extra = {"margin": float(row["extra"]), "user": str(data[args.data.user_key]), "preference": preference}
            row["extra"] = extra
        return row

    def item(self, index):
        if self.strategy.args.reward.factors is None:
            return host_item(self, index)
        prompt, end = self.prompts[index], end_of_text(self.tokenizer)
        chosen, reject = (text_of(prompt, side[index], end) for side in (self.chosens, self.rejects))
        tokens = [encode([text], self.tokenizer, self.max_length) for text in (chosen, reject)]
        return (*(of_text[name] for of_text in tokens for name in ("input_ids", "attention_mask")), self.extras[index])

    def init(wrapped, self, args, kwargs):
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        strategy = call["strategy"]
        if strategy.args.reward.factors is None:
            return wrapped(*args, **kwargs)
        known = _known_users(strategy, _check(call["dataset"], strategy.args.data))
        wrapped(*args, **kwargs)
        extras = list(self.extras)
        rows = known.rows([extra["user"] for extra in extras]).tolist()
        self.extras = [TaggedMargin(extra["margin"], row, extra["preference"]) for extra, row in zip(extras, rows)]

    module.RewardDataset.process_data = process_data
    module.RewardDataset.__getitem__ = item
    wrapt.wrap_function_wrapper(module, "RewardDataset.__init__", init)


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


def _check(dataset, data) -> list[str]:
    """The user (B,) of each pair.

    Raises:
        ValueError: a column is missing, or a row does not say whose pair it is or which response is preferred.
    """
    if data.preference_key is not None:
        columns.check_column(dataset, f"--{flags.PREFERENCE_KEY}", data.preference_key, "the pairs")
    users = columns.names(dataset, f"--{flags.USER_KEY}", data.user_key, "the pairs")
    if data.preference_key is not None:
        for row, preference in enumerate(dataset[data.preference_key]):
            if not isinstance(preference, (int, float)) or not 0 <= preference <= 1:
                raise ValueError(
                    f"every row needs a number from 0 to 1 in {data.preference_key!r} (--{flags.PREFERENCE_KEY}), got "
                    f"{preference!r} in row {row} of the pairs: correct it or drop the row"
                )
    # A published result was wrong because one response was a list and the other its printed form.
    chosen, rejected = (dataset.features.get(key) for key in (data.chosen_key, data.rejected_key))
    if chosen != rejected:
        raise ValueError(
            f"{data.chosen_key!r} and {data.rejected_key!r} need the same form, got {chosen} and {rejected}: give "
            "both one form, because a difference tells which response was chosen"
        )
    return users
