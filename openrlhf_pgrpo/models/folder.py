"""The folder of a factorized reward model: plain files, written whole, and a fingerprint of everything in it.

    model.safetensors   the backbone, `<head>.weight` (D, H) and `coefficients` (U, D)
    users.json          the users' ids, in the order of rows
    config.json         the backbone's, with `base_rewards` D, `base_reward_users` U, `base_reward_pooling` (last or
                        mean), `base_reward_max_length` (the longest text in tokens), `base_reward_form` (how texts
                        are written), `base_reward_fitted` (whether `write` made it) and `value_head_prefix`, the name
                        of the head

Axes: U users, D base rewards, H embedding dimensions.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import cached_file

from openrlhf_pgrpo.files import reading, to_disk
from openrlhf_pgrpo.models import backbone as backbones
from openrlhf_pgrpo.models.backbone import is_unused
from openrlhf_pgrpo.models.form import KEY as FORM
from openrlhf_pgrpo.models.form import PLAIN, Form, Writer
from openrlhf_pgrpo.models.messages import Text
from openrlhf_pgrpo.models.network import HEAD, POOLINGS, check_pooling, hidden_size, longest_text, skeleton
from openrlhf_pgrpo.models.output_folder import (
    CONFIG,
    FITTED,
    TOKENIZER_FILES,
    USERS,
    WEIGHTS,
    new_files,
    put_in_place,
)
from openrlhf_pgrpo.models.texts import Texts, Tokens
from openrlhf_pgrpo.progress import progress

COEFFICIENTS = "coefficients"
READ = (CONFIG, USERS, WEIGHTS, *sorted(set(TOKENIZER_FILES) - {"chat_template.jinja"}))  # the form has the template
LENGTH = "base_reward_max_length"
SCALE = ("mean", "std")  # of rewards, in the config of a reward model that the host has evaluated
# No backbone has them.
CONFIG_KEYS = ("base_rewards", "base_reward_users", "base_reward_pooling", LENGTH, FORM, FITTED)


def is_factorized(config: Any) -> bool:
    """Whether this is the config of a factorized reward model."""
    return getattr(config, CONFIG_KEYS[0], None) is not None


class Folder:
    """A factorized reward model by folder or hub name. Its weights are not loaded.

    Args:
        chat_template: says how texts are written, for a model from before that was recorded; as `form.read`.

    Attributes:
        config. users: (U,) ids in the order of rows. coefficients: (U, D) float64.

    Raises:
        ValueError, OSError: the folder holds another kind of model, files of different models, or a broken file;
            names the file.
    """

    def __init__(self, name: str | Path, chat_template: str | None = None):
        self.name, self._chat_template = str(name), chat_template
        self._found = self._files()
        self.config: Any = backbones.read_config(self.name)
        if not is_factorized(self.config):
            raise ValueError(
                f"{self.name} needs to be a factorized reward model, got a config.json without {CONFIG_KEYS[0]}: "
                "train one with python -m openrlhf_pgrpo.cli.train_rm --reward.factors"
            )
        self._check_config()
        with reading(f"{self.name}/{USERS}"):
            users = json.loads(self.path(USERS).read_text(encoding="utf-8"))
            _check_users(users)
        self.users: list[str] = users
        self.coefficients = self._check_weights()
        self.check_unchanged()

    def path(self, file: str) -> Path:
        return Path(cached_file(self.name, file))  # type: ignore[arg-type]  # a missing file raises

    def tensor(self, name: str) -> np.ndarray:
        """One of the weights, float64."""
        with reading(f"{self.name}/{WEIGHTS}"), safe_open(self.path(WEIGHTS), "pt") as file:
            return file.get_tensor(name).double().numpy()

    @property
    def head_name(self) -> str:
        return getattr(self.config, "value_head_prefix", HEAD)

    @cached_property
    def max_length(self) -> int:
        """The longest text in tokens that the model reads: what its texts were cut to when it was made, and never more
        than its backbone has positions for."""
        positions = longest_text(self._skeleton)
        return min(getattr(self.config, LENGTH, None) or positions, positions)

    @cached_property
    def form(self) -> Form:
        """How the model's texts are written.

        Raises:
            ValueError: as `Form.of_model`.
        """
        return Form.of_model(self.config, self.name, self._chat_template)

    @cached_property
    def _tokenizer(self) -> Any:
        return backbones.read_tokenizer(self.name)

    @cached_property
    def writer(self) -> Writer:
        """Writes prompts and responses, texts or messages, in the model's form."""
        return Writer(self.form, self._tokenizer)

    @cached_property
    def texts(self) -> Texts:
        """Makes the tokens that the model reads. Ask it which prompts are cut, and which texts are equal then."""
        return Texts(self._tokenizer, self.max_length, self.writer.ends)

    def tokens(self, prompts: Sequence[Text], responses: Sequence[Text]) -> Tokens:
        """The tokens of each response to its prompt, both (N,), in the model's form.

        Raises:
            ValueError: they cannot be written in that form, or no tokens can be made of them; with their number.
        """
        return self.texts.tokens(*self.writer.pairs(prompts, responses))

    @property
    def fingerprint(self) -> str:
        """sha256 over config, users, weights and tokenizer: everything that rewards depend on. Where the config does
        not record the form of texts and somebody has told it, that form follows, after a +.

        Raises:
            ValueError: as `check_unchanged`, so it is that of the model that was read.
        """
        digest = self._digest
        self.check_unchanged()
        if self._chat_template is None:
            return digest
        form = json.dumps(self.form.record(), sort_keys=True)
        return f"{digest}+{hashlib.sha256(form.encode()).hexdigest()[:16]}"

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for file in READ:
            path = cached_file(self.name, file, _raise_exceptions_for_missing_entries=False)
            if path is None:  # a tokenizer has some of its files
                continue
            digest.update(f"{file}\0".encode())
            with open(path, "rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """For those who have read a model, and are about to keep what came of it.

        Raises:
            ValueError: its files are not those that were there when this was made. Some may have been read before
                that, and some after it.
        """
        if self._files() != self._found:
            raise ValueError(f"{self.name} needs to stay as it is while it is read, got other files: begin again")

    def _files(self) -> list[tuple]:
        """What tells the files of this model from others by these names, without reading them."""
        folder = Path(self.name)
        with suppress(OSError, ValueError):  # whoever reads what is missing says so
            if not folder.is_dir():  # a commit on the hub never changes, but the name may lead to a newer one
                return [(self.path(CONFIG).parent,)]
            stats = {file: (folder / file).stat() for file in READ if (folder / file).exists()}
            return [(file, of.st_size, of.st_mtime_ns) for file, of in stats.items()]
        return []

    def check_shapes(self) -> None:
        """Raises ValueError if the backbone's weights are not of the shapes that config.json says, or are missing.

        For those that load the weights: `transformers` would draw missing ones at random.
        """
        prefix, needed = self._skeleton.base_model_prefix, self._skeleton.state_dict()
        backbones.check_complete({f"{prefix}.{name}" for name in needed} - self._shapes.keys(), self.path(WEIGHTS))
        for name, weight in needed.items():
            found = self._shapes.get(f"{prefix}.{name}")
            if found not in (None, tuple(weight.shape)):
                raise ValueError(
                    f"{self.name}/{WEIGHTS} needs {prefix}.{name} of shape {tuple(weight.shape)}, as {CONFIG} says, "
                    f"got {found}: its files are of different models, write it again"
                )

    @cached_property
    def _skeleton(self) -> Any:
        with reading(f"{self.name}/{CONFIG}"):
            return skeleton(self.config)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        with reading(f"{self.name}/{WEIGHTS}"), safe_open(self.path(WEIGHTS), "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in [*file.keys()]}

    def _check_config(self) -> None:
        """Raises ValueError if config.json has a value that no factorized model has."""
        backbones.check_config(self.config, self.name)
        mean, std = getattr(self.config, "mean", 0.0), getattr(self.config, "std", 1.0)
        head = self.head_name
        usable = isinstance(head, str) and head.isidentifier() and not hasattr(PreTrainedModel, head)
        for key, need, good in (
            ("base_rewards", "a number above 0", _is_count(self.config.base_rewards)),
            ("base_reward_users", "a number above 0", _is_count(getattr(self.config, "base_reward_users", None))),
            ("base_reward_pooling", " or ".join(POOLINGS), getattr(self.config, CONFIG_KEYS[2], None) in POOLINGS),
            (LENGTH, "a number above 0", _is_count(getattr(self.config, LENGTH, None) or 1)),
            ("value_head_prefix", "the name of a head", usable and head != COEFFICIENTS),
            ("mean", "a finite number", _is_finite(mean)),
            ("std", "a finite number above 0", _is_finite(std) and std > 0),
        ):
            if not good:
                found = getattr(self.config, key, None)
                raise ValueError(f"{self.name}/{CONFIG} needs {need} as {key}, got {found!r}: write it again")

    def _check_weights(self) -> np.ndarray:
        """The coefficients. Raises ValueError unless head and coefficients are there, in the shapes of the other
        files, and finite."""
        base_rewards, head = self.config.base_rewards, f"{self.head_name}.weight"
        for name, shape, as_said in (
            (COEFFICIENTS, (len(self.users), base_rewards), f"{USERS} and {CONFIG} say"),
            (head, (base_rewards, hidden_size(self.config)), f"{CONFIG} says"),
        ):
            found = self._shapes.get(name)
            if found is None:
                raise ValueError(f"{self.name}/{WEIGHTS} needs all weights, got none for {name}: write it again")
            if found != shape:
                raise ValueError(
                    f"{self.name} needs {name} of shape {shape}, as {as_said}, got {found}: its files are of "
                    "different models, write it again"
                )
            if not np.isfinite(self.tensor(name)).all():
                raise ValueError(f"{self.name}/{WEIGHTS} needs finite {name}, got nan or inf: train it again")
        if self.config.base_reward_users != len(self.users):
            raise ValueError(
                f"{self.name} needs {self.config.base_reward_users} users, as {CONFIG} says, got {len(self.users)} in "
                f"{USERS}: its files are of different models, write it again"
            )
        layers = getattr(self.config.get_text_config(), "num_hidden_layers", 1)
        if not isinstance(layers, int) or layers > 100 + len(self._shapes):  # to build a million takes an hour
            raise ValueError(
                f"{self.name} needs no more layers than it has weights, got {layers} in {CONFIG} and "
                f"{len(self._shapes)} weights in {WEIGHTS}: its files are of different models, write it again"
            )
        return self.tensor(COEFFICIENTS)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(float(value)))


def _check_users(users: Any) -> None:
    """Raises ValueError unless these are the ids of users: distinct strings that are not empty, one at least."""
    if not isinstance(users, list) or not users:
        raise ValueError(f"users need to be a list of ids, got {str(users)[:80]}")
    if wrong := [user for user in users if not isinstance(user, str) or not user]:
        raise ValueError(f"every user needs an id of their own, a string that is not empty, got {repr(wrong[0])[:80]}")
    if twice := [user for user, count in Counter(users).items() if count > 1]:
        raise ValueError(f"every user needs an id of their own, a string that is not empty, got {twice[0]!r} twice")


# ---- writing ----


def write(
    folder: str | Path,
    backbone: str | Path,
    head: np.ndarray,
    coefficients: np.ndarray,
    users: Sequence[str],
    pooling: str = "last",
    form: Form = PLAIN,
) -> None:
    """Writes a factorized reward model made of a frozen backbone (folder or hub name), a head and coefficients.

    The longest text is what the backbone and its tokenizer say.

    Args:
        head: (D, H), fitted on `scoring.embed(backbone, ...)`. coefficients: (U, D). users: (U,) ids by row.
        form: how the texts that were embedded are written.

    Raises:
        ValueError: shapes that do not fit, ids that are empty or appear twice, numbers that are not finite, or a
            backbone that is none or lacks weights.
    """
    head, coefficients = np.asarray(head, np.float32), np.asarray(coefficients, np.float32)
    config: Any = backbones.read_config(backbone)
    backbones.check(config, backbone)
    check_pooling(pooling)
    size = hidden_size(config)
    if head.ndim != 2 or head.shape[1] != size or coefficients.shape != (len(users), len(head)):
        raise ValueError(
            f"this backbone and these users need a head of shape (D, {size}) and coefficients "
            f"({len(users)}, D), got {head.shape} and {coefficients.shape}"
        )
    if not (np.isfinite(head).all() and np.isfinite(coefficients).all()):
        raise ValueError("head and coefficients need finite numbers, got nan or inf: look at the fit they come from")
    model, tokenizer = backbones.load(backbone, "auto"), backbones.read_tokenizer(backbone)
    weights = {f"{model.base_model_prefix}.{name}": weight for name, weight in model.state_dict().items()}
    weights |= {f"{HEAD}.weight": torch.from_numpy(head), COEFFICIENTS: torch.from_numpy(coefficients)}
    describe(config, len(head), len(users), pooling, form, backbones.max_length(model, tokenizer))
    config.value_head_prefix = HEAD
    save(folder, config, weights, users, tokenizer, fitted=True)


def describe(
    config: Any, base_rewards: int, users: int, pooling: str, form: Form, max_length: int | None = None
) -> None:
    """Turns a backbone's config into that of a factorized reward model, whose texts are written in one form and have
    at most `max_length` tokens.

    Without it, they may be as long as the backbone has positions for.
    """
    forget_scale(config)
    config.base_rewards, config.base_reward_users, config.base_reward_pooling = base_rewards, users, pooling
    config.base_reward_max_length, config.base_reward_form = max_length, form.record()
    config.hidden_size = hidden_size(config)  # The host reads it; a config of several parts has it in one of them.
    config.architectures = ["FactorizedRewardModel"]


def forget_scale(config: Any) -> None:
    """Removes the mean and deviation of rewards: they are of the model that had this config before."""
    for key in SCALE:
        config.__dict__.pop(key, None)


def save(
    folder: str | Path,
    config: Any,
    weights: dict[str, torch.Tensor],
    users: Sequence[str],
    tokenizer: Any,
    fitted: bool = False,
) -> None:
    """Writes a complete folder. Who is stopped leaves the old model or none, as `put_in_place`.

    Weights that no reward depends on are left out: a backbone whose checkpoint lacks them has random ones.

    Args:
        fitted: on a frozen backbone, in minutes, and not trained.

    Raises:
        ValueError: ids of users that are not strings, are empty or appear twice.
    """
    users = list(users)
    _check_users(users)
    config.base_reward_fitted = fitted
    weights = {name: weight for name, weight in weights.items() if not is_unused(name)}
    write_files(folder, config, weights, tokenizer, **{USERS: json.dumps(users, ensure_ascii=False, indent=0)})


def write_files(
    folder: str | Path, config: Any, weights: dict[str, torch.Tensor], tokenizer: Any, **texts: str
) -> None:
    """Writes the files of any model, and `texts` by file name, as `save` does.

    All files are written to a temporary folder first, so that a full disk leaves the old ones. They get the mode that
    the umask gives.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with progress(f"writing {folder}"), new_files(folder) as new:
        tokenizer.save_pretrained(new)
        save_file(_apart(weights), new / WEIGHTS, {"format": "pt"})
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        config.save_pretrained(new)
        mode = (new / CONFIG).stat().st_mode  # safetensors writes files for its user alone
        files = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
        for file in files:  # before the first is replaced, because it may take long and be interrupted
            (new / file).chmod(mode)
            to_disk(new / file)
        put_in_place(new, folder, files)


def _apart(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that share no memory, as safetensors wants them: a backbone may tie some of its own."""
    seen: set[int] = set()
    apart = {}
    for name, weight in weights.items():
        shared = weight.untyped_storage().data_ptr() in seen
        seen.add(weight.untyped_storage().data_ptr())
        apart[name] = weight.clone(memory_format=torch.contiguous_format) if shared else weight.contiguous()
    return apart
