"""Base rewards of texts, from a factorized reward model or from a frozen backbone whose head is yet to be fitted.

Axes: B texts, D base rewards, H embedding dimensions, N pairs of prompt and response.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.network import check_pooling, factorized_reward_model, longest_text, states
from openrlhf_pgrpo.models.texts import encode, end_of_text, text_of


class RewardModel(Folder):
    """A factorized reward model with its weights loaded, on the GPU if there is one."""

    def __init__(self, name: str | Path, dtype: torch.dtype = torch.float32):
        super().__init__(name)
        self.tokenizer = AutoTokenizer.from_pretrained(self.name, trust_remote_code=True)
        llm: Any = AutoModel._model_mapping[type(self.config)]
        model = factorized_reward_model(llm.__base__, llm, self.head_name)
        self.device = _device()
        self.model, report = model.from_pretrained(
            self.name, config=self.config, dtype=dtype, trust_remote_code=True, output_loading_info=True
        )
        if report["missing_keys"]:
            missing = ", ".join(sorted(report["missing_keys"]))
            raise ValueError(f"{self.name} needs all weights, got none for {missing}")
        self.model = self.model.eval().to(self.device)

    def base_rewards(
        self, prompts: Sequence[str], responses: Sequence[str], batch_size: int = 16, max_length: int = 2048
    ) -> np.ndarray:
        """phi (N, D) float64 of each response to its prompt."""
        length = min(max_length, longest_text(self.model.base_model))
        return _score(self.model, prompts, responses, self.tokenizer, self.device, batch_size, length)


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> RewardModel:
    """A factorized reward model from its folder or hub name; the backbone in `dtype`, head and sums in float32.

    Raises:
        ValueError: the folder holds another kind of model, or a broken one.
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
    """h (N, H) float64 of each response, from a frozen backbone: what a head sees once `write` has put it there."""
    check_pooling(pooling)
    tokenizer = AutoTokenizer.from_pretrained(backbone, trust_remote_code=True)
    device = _device()
    model = AutoModel.from_pretrained(backbone, dtype=torch.float32, trust_remote_code=True).eval().to(device)

    def pooled(input_ids, attention_mask):
        return states(model, input_ids, attention_mask, pooling)[0]

    length = min(max_length, longest_text(model))
    return _score(pooled, prompts, responses, tokenizer, device, batch_size, length)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def _score(
    score: Callable[..., torch.Tensor],
    prompts: Sequence[str],
    responses: Sequence[str],
    tokenizer: Any,
    device: torch.device,
    batch_size: int,
    max_length: int,
) -> np.ndarray:
    """`score` of each text (N, ...) float64, in the given order. Texts of similar length share a batch."""
    end = end_of_text(tokenizer)
    texts = [text_of(prompt, response, end) for prompt, response in zip(prompts, responses, strict=True)]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = encode([texts[i] for i in rows], tokenizer, max_length)
        scores = score(**{name: tensor.to(device) for name, tensor in batch.items()})
        found.update(zip(rows, scores.double().cpu().numpy()))
    return np.array([found[i] for i in range(len(texts))])
