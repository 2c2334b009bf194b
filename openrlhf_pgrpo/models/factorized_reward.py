"""A reward model for many users (arXiv 2503.06358): D base rewards shared by all, D coefficients of each user.

    r_u(x, y) = lambda_u . phi(x, y),  phi(x, y) = head h(x, y)                                    (Eq. 3)

h is the last hidden state of a Hugging Face backbone at the last token of the text, or its mean over the text. A
folder holds the backbone, `<head>.weight` (D, H) and `coefficients` (U, D) in model.safetensors, the users' ids in
users.json in the order of rows, and in config.json `base_rewards` D, `base_reward_users` U, `base_reward_pooling`,
which is last or mean, and `value_head_prefix`, the name of the head.

Axes: B texts, S tokens, U users, D base rewards, H embedding dimensions, N pairs of prompt and response.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import cached_file

POOLINGS = ("last", "mean")
HEAD, WEIGHTS, USERS, CONFIG = "score", "model.safetensors", "users.json", "config.json"
OURS = ("base_rewards", "base_reward_users", "base_reward_pooling")  # keys of config.json


# ---------------------------------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------------------------------


def text_of(prompt: str, response: str, end: str) -> str:
    """The text that is scored for a response: every response of a pair passes here, chosen and rejected alike.

    It is what the host's `RewardDataset` makes of one: without newlines at the end, and closed by the token `end`.
    """
    text = (prompt + response).rstrip("\n")
    return text if text.endswith(end) else f"{text} {end}"


def end_of_text(tokenizer) -> str:
    """The token that closes every text: the end of a sequence, or for an encoder its separator."""
    end = tokenizer.eos_token or tokenizer.sep_token
    if end is None:
        raise ValueError(f"texts need a token that ends them, got neither eos nor sep in {type(tokenizer).__name__}")
    return end


def encode(texts: Sequence[str], tokenizer, max_length: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, S), padded on the left; a text that is cut still ends with its end token."""
    end = tokenizer.convert_tokens_to_ids(end_of_text(tokenizer))
    rows = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=max_length)["input_ids"]
    length = max(map(len, rows))
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (of_ids, of_mask) in zip(rows, zip(ids, mask)):
        of_ids[length - len(row) :] = torch.tensor([*row[:-1], end])
        of_mask[length - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """H -> D without bias, computed in float32.

    Not an `nn.Linear`: "all-linear" adapters would freeze it and train beside it.
    """

    def __init__(self, hidden_size: int, base_rewards: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(base_rewards, hidden_size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.float() @ self.weight.float().T


def first_position(backbone) -> int:
    """Where the backbone counts from: relatives of RoBERTa begin after the position that they keep for padding."""
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def longest(backbone) -> int:
    """How many positions the backbone knows; encoders have a table of them that ends."""
    return (getattr(backbone.config, "max_position_embeddings", None) or sys.maxsize) - first_position(backbone)


def states(backbone, input_ids, attention_mask, pooling: str):
    """What the head sees of each text, (B, H), and all that the backbone returned; padding on either side."""
    positions = (attention_mask.long().cumsum(-1) - 1 + first_position(backbone)).masked_fill(attention_mask == 0, 1)
    outputs = backbone(input_ids, attention_mask=attention_mask, position_ids=positions)
    hidden = outputs["last_hidden_state"]
    if pooling == "mean":
        mask = attention_mask[..., None].float()
        return (hidden.float() * mask).sum(1) / mask.sum(1), outputs
    last = attention_mask.size(1) - 1 - attention_mask.long().fliplr().argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last], outputs


def factorized_reward_model(base_pretrained_model, base_llm_model, value_head_prefix=HEAD, packing_samples=False):
    """The class of a reward model with D outputs on this backbone; the parameters are those of the host's factory.

    Its config says D, U and the pooling. Head and coefficients stay float32 where the backbone is loaded in less.

    Raises:
        ValueError: packed samples, which have no row of their own.
    """
    if packing_samples:
        raise ValueError("base rewards need one text in a row, got packed samples: leave --ds.packing_samples out")

    class FactorizedRewardModel(base_pretrained_model):
        supports_gradient_checkpointing = True
        _keep_in_fp32_modules_strict = {value_head_prefix, "coefficients"}

        def __init__(self, config):
            super().__init__(config)
            setattr(self, self.base_model_prefix, base_llm_model(config))
            setattr(self, value_head_prefix, Head(config.hidden_size, config.base_rewards))
            self.coefficients = nn.Parameter(torch.zeros(config.base_reward_users, config.base_rewards))
            self.value_head_prefix = value_head_prefix
            self.packing_samples = packing_samples
            # Of rewards, not of base rewards: whoever reduces to rewards normalises them. The host prints these.
            self.mean, self.std = getattr(config, "mean", 0.0), getattr(config, "std", 1.0)
            self.post_init()

        def _init_weights(self, module):
            # What a checkpoint lacks arrives as memory that nobody wrote to.
            if isinstance(module, Head):
                nn.init.zeros_(module.weight)
            elif module is self:
                nn.init.zeros_(module.coefficients)
            else:
                super()._init_weights(module)

        def forward(
            self,
            input_ids=None,
            attention_mask=None,
            return_output=False,
            ring_attn_group=None,
            pad_sequence=False,
            packed_seq_lens=None,
            users=None,
        ):
            """Base rewards (B, D) float32. With rows `users` (B,) also their coefficients (B, D), and the outputs of
            the backbone: read here, where a trainer that splits parameters over ranks has them whole."""
            pooled, outputs = states(self.base_model, input_ids, attention_mask, self.config.base_reward_pooling)
            base_rewards = getattr(self, self.value_head_prefix)(pooled)
            if users is not None:
                return base_rewards, self.coefficients[users].float(), outputs
            return (base_rewards, outputs) if return_output else base_rewards

    return FactorizedRewardModel


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


def is_factorized(config) -> bool:
    """Whether this config is that of a factorized reward model."""
    return getattr(config, OURS[0], None) is not None


class Folder:
    """A folder, or hub name, with a factorized reward model, its weights not loaded yet.

    Attributes:
        config, users (U,) in order of rows, fingerprint: of everything that rewards depend on.

    Raises:
        ValueError: it holds another kind of model, or its parts do not belong together.
    """

    def __init__(self, name: str | Path):
        self.name = str(name)
        self.config = AutoConfig.from_pretrained(self.name, trust_remote_code=True)
        if not is_factorized(self.config):
            raise ValueError(
                f"{self.name} needs to be a factorized reward model, got a config.json without {OURS[0]}: train one "
                "with python -m openrlhf_pgrpo.cli.train_rm --reward.factors"
            )
        self.users: list[str] = json.loads(self.path(USERS).read_text(encoding="utf-8"))
        shape, found = (len(self.users), self.config.base_rewards), self.tensor("coefficients").shape
        if found != shape:
            raise ValueError(
                f"{self.name} needs coefficients of shape {shape}, as {USERS} and {CONFIG} say, got {found}: its files "
                "are of different models, write it again"
            )

    def path(self, file: str) -> Path:
        return Path(cached_file(self.name, file))

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
        """sha256 over config, users and weights, head and coefficients among them."""
        digest = hashlib.sha256()
        for file in (CONFIG, USERS, WEIGHTS):
            with open(self.path(file), "rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


class RewardModel(Folder):
    """A factorized reward model, ready to score on the device at hand."""

    def __init__(self, name: str | Path, dtype: torch.dtype = torch.float32):
        super().__init__(name)
        self.tokenizer = AutoTokenizer.from_pretrained(self.name, trust_remote_code=True)
        llm = AutoModel._model_mapping[type(self.config)]
        model = factorized_reward_model(llm.__base__, llm, self.head_name)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, report = model.from_pretrained(
            self.name, config=self.config, dtype=dtype, trust_remote_code=True, output_loading_info=True
        )
        if report["missing_keys"]:
            raise ValueError(f"{self.name} needs all weights, got none for {', '.join(sorted(report['missing_keys']))}")
        self.model = self.model.eval().to(self.device)

    def base_rewards(
        self, prompts: Sequence[str], responses: Sequence[str], batch_size: int = 16, max_length: int = 2048
    ) -> np.ndarray:
        """phi (N, D) float64 of each response to its prompt."""
        length = min(max_length, longest(self.model.base_model))
        return _of_texts(self.model, prompts, responses, self.tokenizer, self.device, batch_size, length)

    def prior(self):
        """What these users say of a new one, an `elicitation.Prior`."""
        from openrlhf_pgrpo.core.elicitation import Prior  # scipy, which scoring does without

        return Prior.of(self.coefficients)


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> RewardModel:
    """A factorized reward model from its folder or hub name; the backbone in `dtype`, head and sums in float32.

    Raises:
        ValueError: it holds another kind of model, or a broken one.
    """
    return RewardModel(folder, dtype)


def embed(
    backbone: str | Path,
    prompts: Sequence[str],
    responses: Sequence[str],
    pooling: str = "last",
    batch_size: int = 16,
    max_length: int = 2048,
) -> np.ndarray:
    """h (N, H) float64 of each response, from a frozen backbone: what a head that `write` puts on it will see."""
    _check_pooling(pooling)
    tokenizer = AutoTokenizer.from_pretrained(backbone, trust_remote_code=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModel.from_pretrained(backbone, dtype=torch.float32, trust_remote_code=True).eval().to(device)

    def pooled(input_ids, attention_mask):
        return states(model, input_ids, attention_mask, pooling)[0]

    length = min(max_length, longest(model))
    return _of_texts(pooled, prompts, responses, tokenizer, device, batch_size, length)


@torch.no_grad()
def _of_texts(score, prompts, responses, tokenizer, device, batch_size, max_length) -> np.ndarray:
    """What `score` says of each text, long texts with long ones, in the order they came."""
    end = end_of_text(tokenizer)
    texts = [text_of(prompt, response, end) for prompt, response in zip(prompts, responses, strict=True)]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = encode([texts[i] for i in rows], tokenizer, max_length)
        scores = score(**{name: tensor.to(device) for name, tensor in batch.items()})
        found.update(zip(rows, scores.double().cpu().numpy()))
    return np.array([found[i] for i in range(len(texts))])


def write(
    folder: str | Path,
    backbone: str | Path,
    head: np.ndarray,
    coefficients: np.ndarray,
    users: Sequence[str],
    pooling: str = "last",
) -> None:
    """Makes a factorized reward model from a frozen backbone (folder or hub name), a head and coefficients.

    Args:
        head: (D, H), fitted on `embed(backbone, ...)`. coefficients: (U, D). users: (U,), ids in order of rows.

    Raises:
        ValueError: shapes, ids or numbers that do not fit.
    """
    head, coefficients = np.asarray(head, np.float32), np.asarray(coefficients, np.float32)
    config = AutoConfig.from_pretrained(backbone, trust_remote_code=True)
    _check_pooling(pooling)
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


def describe(config, base_rewards: int, users: int, pooling: str) -> None:
    """Makes a backbone's config that of a factorized reward model."""
    config.base_rewards, config.base_reward_users, config.base_reward_pooling = base_rewards, users, pooling
    config.architectures = ["FactorizedRewardModel"]


def save(folder: str | Path, config, weights: dict[str, torch.Tensor], users: Sequence[str], tokenizer) -> None:
    """Writes a complete folder; each of its files is whole or untouched, config.json last.

    Raises:
        ValueError: ids of users that are not strings, or not unique.
    """
    users = list(users)
    wrong = [user for user, count in Counter(users).items() if count > 1 or not isinstance(user, str) or not user]
    if wrong:
        raise ValueError(f"every user needs an id of their own, a string that is not empty, got {wrong[0]!r}")
    place(folder, config, weights, tokenizer, **{USERS: json.dumps(users, ensure_ascii=False, indent=0)})


def place(folder: str | Path, config, weights: dict[str, torch.Tensor], tokenizer, **texts: str) -> None:
    """Writes the files of any model, and `texts` by name, beside their places first."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as made:
        made = Path(made)
        tokenizer.save_pretrained(made)
        save_file({name: weight.contiguous() for name, weight in weights.items()}, made / WEIGHTS, {"format": "pt"})
        for name, text in texts.items():
            (made / name).write_text(text, encoding="utf-8")
        config.save_pretrained(made)
        for path in sorted(made.iterdir(), key=lambda path: (path.name == CONFIG, path.name)):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, folder / path.name)


def _check_pooling(pooling: str) -> None:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling needs to be {' or '.join(POOLINGS)}, got {pooling!r}")
