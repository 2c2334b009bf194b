"""The one way a text is made for a reward model, in training, scoring and serving alike.

Axes: B texts, S tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch


def text_of(prompt: str, response: str, end: str) -> str:
    """The text of a prompt and a response: without newlines at the end, closed by the token `end`.

    The host's `RewardDataset` makes texts in this form. Chosen and rejected responses are made alike.
    """
    text = (prompt + response).rstrip("\n")
    return text if text.endswith(end) else f"{text} {end}"


def end_of_text(tokenizer: Any) -> str:
    """The token that closes every text: the tokenizer's end of a sequence, or an encoder's separator."""
    end = tokenizer.eos_token or tokenizer.sep_token
    if end is None:
        raise ValueError(f"texts need a token that ends them, got neither eos nor sep in {type(tokenizer).__name__}")
    return end


def encode(texts: Sequence[str], tokenizer: Any, max_length: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, S), padded on the left. A cut text still ends with the end token."""
    end = tokenizer.convert_tokens_to_ids(end_of_text(tokenizer))
    rows = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=max_length)["input_ids"]
    length = max(map(len, rows))
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, row_ids, row_mask in zip(rows, ids, mask):
        row_ids[length - len(row) :] = torch.tensor([*row[:-1], end])
        row_mask[length - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
