"""The road of a pair's user: from a dataset column, on the pair's margin, to the loss.

The host drops every dataset column but prompt, chosen and rejected, and gives each pair one number more, `extra`: a
margin. That number travels unchanged through collating, so it is replaced by one that also says whose pair it is.

Both responses become text and tokens by one function, `factorized_reward.text_of`: nothing of their form may tell the
chosen one.
"""

import inspect
from types import SimpleNamespace
from typing import Iterable, Sequence

import wrapt

from openrlhf_pgrpo.core.robust import some
from openrlhf_pgrpo.host import reward_model
from openrlhf_pgrpo.models.factorized_reward import encode, end_of_text, text_of


class TaggedMargin(float):
    """A margin that knows its pair's user, as a row of the table, and the share of preference of the chosen response.

    Equal, hashed and used as the plain number.
    """

    user: int
    preference: float

    def __new__(cls, margin: float, user: int, preference: float):
        self = super().__new__(cls, margin)
        self.user, self.preference = user, preference
        return self

    def __reduce__(self):
        return TaggedMargin, (float(self), self.user, self.preference)


def install(module) -> None:
    """Makes `RewardDataset` keep user and preference of each pair, and treat both of its responses alike."""
    host_process_data, host_item = module.RewardDataset.process_data, module.RewardDataset.__getitem__

    def process_data(self, data):
        # A plain function: `datasets` pickles it for its worker processes, which no wrapper of wrapt survives.
        row = host_process_data(self, data)
        args = self.strategy.args
        if args.reward.factors is not None:
            preference = 1.0 if args.data.preference_key is None else float(data[args.data.preference_key])
            if preference < 0.5:  # the host counts a pair as right where it scores its chosen side higher
                row["chosen"], row["reject"], preference = row["reject"], row["chosen"], 1 - preference
            row["extra"] = {"margin": float(row["extra"]), "user": str(data[args.data.user_key]), "share": preference}
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
        host_args = call["strategy"].args
        if host_args.reward.factors is None:
            return wrapped(*args, **kwargs)
        _check(call["dataset"], host_args.data)
        known = reward_model.training.users
        check_known(map(str, call["dataset"][host_args.data.user_key]), known, "the training data")
        wrapped(*args, **kwargs)
        rows = {user: row for row, user in enumerate(known)}
        self.extras = [TaggedMargin(extra["margin"], rows[extra["user"]], extra["share"]) for extra in self.extras]

    module.RewardDataset.process_data = process_data
    module.RewardDataset.__getitem__ = item
    wrapt.wrap_function_wrapper(module, "RewardDataset.__init__", init)


def read_users(args) -> list[str]:
    """The users of the training data, sorted, by the host's own reading of it; nested host arguments."""
    from openrlhf.datasets.utils import blending_datasets

    data = args.data
    quiet = SimpleNamespace(args=args, print=lambda *words: None, is_rank_0=lambda: False)
    options = dict(max_count=data.max_samples, dataset_split=data.dataset_split)
    try:
        dataset = blending_datasets(data.dataset, data.dataset_probs, quiet, args.train.seed, **options)
    except StopIteration as error:  # all that `datasets` has to say of a file without rows
        raise ValueError(f"training needs at least one pair, got an empty dataset {data.dataset!r}") from error
    dataset = dataset.select(range(min(data.max_samples, len(dataset))))
    _check(dataset, data)
    return sorted(set(map(str, dataset[data.user_key])))


def check_known(users: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raises ValueError, naming them, for users that have no row in the table."""
    if unknown := sorted(set(users) - set(known)):
        found = some(unknown, 5)
        raise ValueError(f"every pair needs a user of {where}, got {found}: drop their pairs, or add them there first")


def _check(dataset, data) -> None:
    for flag in ("user_key", "preference_key"):
        key = getattr(data, flag)
        if key is not None and key not in dataset.column_names:
            raise ValueError(
                f"--data.{flag} needs a column of the dataset, got {key!r}; columns are "
                f"{sorted(dataset.column_names)}: correct the flag or add the column"
            )
    for row, user in enumerate(dataset[data.user_key]):
        if user is None or user == "":
            raise ValueError(
                f"every pair needs a value in {data.user_key!r} (--data.user_key), got {user!r} in row {row}: fill it "
                "in or drop the row"
            )
    if data.preference_key is not None:
        for row, share in enumerate(dataset[data.preference_key]):
            if not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise ValueError(
                    f"every pair needs a number from 0 to 1 in {data.preference_key!r} (--data.preference_key), got "
                    f"{share!r} in row {row}: correct it or drop the row"
                )
    # A response that is a list on one side and its printed form on the other has ruined a published result.
    chosen, rejected = (dataset.features.get(key) for key in (data.chosen_key, data.rejected_key))
    if chosen != rejected:
        raise ValueError(
            f"{data.chosen_key!r} and {data.rejected_key!r} need the same form, got {chosen} and {rejected}: a form of "
            "its own tells which response was chosen"
        )
