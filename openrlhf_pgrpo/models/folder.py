"""The folder of a factorized reward model: plain files, written whole, and a fingerprint of everything in it.

    model.safetensors   the backbone, `<head>.weight` (D, H) and `coefficients` (U, D)
    users.json          the users' ids, in the order of rows
    config.json         the backbone's, with `base_rewards` D, `base_reward_users` U, `base_reward_pooling` (last or
                        mean) and `value_head_prefix`, the name of the head

Axes: U users, D base rewards, H embedding dimensions.
"""

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import cached_file

from openrlhf_pgrpo.models.network import HEAD, check_pooling

WEIGHTS, USERS, CONFIG = "model.safetensors", "users.json", "config.json"
CONFIG_KEYS = ("base_rewards", "base_reward_users", "base_reward_pooling")  # that a backbone's config lacks


def is_factorized(config: Any) -> bool:
    """Whether this is the config of a factorized reward model."""
    return getattr(config, CONFIG_KEYS[0], None) is not None


class Folder:
    """A factorized reward model by folder or hub name. Its weights are not loaded.

    Attributes:
        config. users: (U,) ids in the order of rows.

    Raises:
        ValueError: the folder holds another kind of model, or files of different models.
    """

    def __init__(self, name: str | Path):
        self.name = str(name)
        self.config: Any = AutoConfig.from_pretrained(self.name, trust_remote_code=True)
        if not is_factorized(self.config):
            raise ValueError(
                f"{self.name} needs to be a factorized reward model, got a config.json without {CONFIG_KEYS[0]}: "
                "train one with python -m openrlhf_pgrpo.cli.train_rm --reward.factors"
            )
        self.users: list[str] = json.loads(self.path(USERS).read_text(encoding="utf-8"))
        shape, found = (len(self.users), self.config.base_rewards), self.tensor("coefficients").shape
        if found != shape:
            raise ValueError(
                f"{self.name} needs coefficients of shape {shape}, as {USERS} and {CONFIG} say, got {found}: its "
                "files are of different models, write it again"
            )

    def path(self, file: str) -> Path:
        return Path(cached_file(self.name, file))  # type: ignore[arg-type]  # a missing file raises

    def tensor(self, name: str) -> np.ndarray:
        """One of the weights, float64."""
        with safe_open(self.path(WEIGHTS), "pt") as file:
            return file.get_tensor(name).double().numpy()

    @property
    def head_name(self) -> str:
        return getattr(self.config, "value_head_prefix", HEAD)

    @cached_property
    def coefficients(self) -> np.ndarray:
        """(U, D) float64."""
        return self.tensor("coefficients")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config, users and weights: everything that rewards depend on."""
        digest = hashlib.sha256()
        for file in (CONFIG, USERS, WEIGHTS):
            with open(self.path(file), "rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


def write(
    folder: str | Path,
    backbone: str | Path,
    head: np.ndarray,
    coefficients: np.ndarray,
    users: Sequence[str],
    pooling: str = "last",
) -> None:
    """Writes a factorized reward model made of a frozen backbone (folder or hub name), a head and coefficients.

    Args:
        head: (D, H), fitted on `scoring.embed(backbone, ...)`. coefficients: (U, D). users: (U,) ids by row.

    Raises:
        ValueError: shapes that do not fit, ids that are empty or appear twice, numbers that are not finite.
    """
    head, coefficients = np.asarray(head, np.float32), np.asarray(coefficients, np.float32)
    config: Any = AutoConfig.from_pretrained(backbone, trust_remote_code=True)
    check_pooling(pooling)
    if head.ndim != 2 or head.shape[1] != config.hidden_size or coefficients.shape != (len(users), len(head)):
        raise ValueError(
            f"this backbone and these users need a head of shape (D, {config.hidden_size}) and coefficients "
            f"({len(users)}, D), got {head.shape} and {coefficients.shape}"
        )
    if not (np.isfinite(head).all() and np.isfinite(coefficients).all()):
        raise ValueError("head and coefficients need finite numbers, got nan or inf: look at the fit they come from")
    model = AutoModel.from_pretrained(backbone, dtype="auto", trust_remote_code=True)
    weights = {f"{model.base_model_prefix}.{name}": weight for name, weight in model.state_dict().items()}
    weights |= {f"{HEAD}.weight": torch.from_numpy(head), "coefficients": torch.from_numpy(coefficients)}
    describe(config, len(head), len(users), pooling)
    config.value_head_prefix = HEAD
    save(folder, config, weights, users, AutoTokenizer.from_pretrained(backbone, trust_remote_code=True))


def describe(config: Any, base_rewards: int, users: int, pooling: str) -> None:
    """Turns a backbone's config into that of a factorized reward model."""
    config.base_rewards, config.base_reward_users, config.base_reward_pooling = base_rewards, users, pooling
    config.architectures = ["FactorizedRewardModel"]


def save(
    folder: str | Path, config: Any, weights: dict[str, torch.Tensor], users: Sequence[str], tokenizer: Any
) -> None:
    """Writes a complete folder. Each file is replaced as a whole or keeps its content; config.json comes last.

    Raises:
        ValueError: ids of users that are not strings, are empty or appear twice.
    """
    users = list(users)
    wrong = [user for user, count in Counter(users).items() if count > 1 or not isinstance(user, str) or not user]
    if wrong:
        raise ValueError(f"every user needs an id of their own, a string that is not empty, got {wrong[0]!r}")
    write_files(folder, config, weights, tokenizer, **{USERS: json.dumps(users, ensure_ascii=False, indent=0)})


def write_files(
    folder: str | Path, config: Any, weights: dict[str, torch.Tensor], tokenizer: Any, **texts: str
) -> None:
    """Writes the files of any model, and `texts` by file name, as `save` does.

    All files are written to a temporary folder first, so that a full disk leaves the old ones.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as made:
        new = Path(made)
        tokenizer.save_pretrained(new)
        save_file({name: weight.contiguous() for name, weight in weights.items()}, new / WEIGHTS, {"format": "pt"})
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        config.save_pretrained(new)
        for path in sorted(new.iterdir(), key=lambda path: (path.name == CONFIG, path.name)):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, folder / path.name)
