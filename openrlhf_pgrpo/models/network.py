"""A reward model for many users (arXiv 2503.06358): D base rewards shared by all, D coefficients for each user.

    r_u(x, y) = lambda_u . phi(x, y),  phi(x, y) = head h(x, y)                                    (Eq. 3)

h is the last hidden state of a Hugging Face backbone at the last token of the text, or its mean over the text.

Axes: B texts, S tokens, U users, D base rewards, H embedding dimensions.
"""

import sys
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

POOLINGS = ("last", "mean")
HEAD = "score"  # the name of the head, unless the config has another
# Names of weights that no state depends on: those of a pooler, which makes something else of a state. Many checkpoints
# of encoders lack theirs, and its numbers would be drawn anew each time.
UNUSED = r"(^|\.)pooler\."


class Head(nn.Module):
    """H -> D without bias, computed in float32.

    Not an `nn.Linear`: an adapter on "all-linear" would freeze it and train an adapter instead.
    """

    def __init__(self, hidden_size: int, base_rewards: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(base_rewards, hidden_size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.float() @ self.weight.float().T


def check_pooling(pooling: str) -> None:
    if pooling not in POOLINGS:
        raise ValueError(f"pooling needs to be {' or '.join(POOLINGS)}, got {pooling!r}")


def first_position(backbone: Any) -> int:
    """The position of the first token. Relatives of RoBERTa start after the position that they keep for padding."""
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def longest_text(backbone: Any) -> int:
    """The number of tokens that the backbone has positions for."""
    positions = getattr(backbone.config.get_text_config(), "max_position_embeddings", None)
    # Some configs say -1 for "as many as you like".
    return (positions if positions and positions > 0 else sys.maxsize) - first_position(backbone)


def skeleton(config: Any) -> Any:
    """The backbone of this config without numbers: names, shapes and positions, in a fraction of a second."""
    with torch.device("meta"):
        # Not `from_config`, which would split it over ranks where ZeRO-3 is at work.
        backbone: Any = AutoModel._model_mapping[type(config)]
        return backbone(deepcopy(config))


def hidden_size(config: Any) -> int:
    """H. A config of several parts (text, images) has it in the part for text."""
    return config.get_text_config().hidden_size


def positions(backbone: Any, attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, S) for texts that are padded on either side."""
    counted = attention_mask.long().cumsum(-1) - 1 + first_position(backbone)
    return counted.masked_fill(attention_mask == 0, 1)


def states(backbone: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, pooling: str):
    """The state (B, H) of each text that the head sees, and the backbone's outputs; padding may be on either side."""
    outputs = backbone(input_ids, attention_mask=attention_mask, position_ids=positions(backbone, attention_mask))
    hidden = outputs["last_hidden_state"]
    if pooling == "mean":
        mask = attention_mask[..., None].float()
        return (hidden.float() * mask).sum(1) / mask.sum(1), outputs
    last = attention_mask.size(1) - 1 - attention_mask.long().fliplr().argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last], outputs


def factorized_reward_model(
    base_pretrained_model: Any, base_llm_model: Any, value_head_prefix: str = HEAD, packing_samples: bool = False
) -> Any:
    """The class of a reward model with D outputs on this backbone; it takes the arguments of the host's own factory.

    D, U and the pooling come from the config. Head and coefficients stay float32, whatever the backbone's dtype.

    Raises:
        ValueError: packed samples. Several texts then share a row, and each needs its own.
    """
    if packing_samples:
        raise ValueError("base rewards need one text in a row, got packed samples: leave --ds.packing_samples out")

    class FactorizedRewardModel(base_pretrained_model):
        supports_gradient_checkpointing = True
        _keep_in_fp32_modules_strict = {value_head_prefix, "coefficients"}
        _keys_to_ignore_on_load_missing = [UNUSED]

        def __init__(self, config):
            super().__init__(config)
            setattr(self, self.base_model_prefix, base_llm_model(config))
            setattr(self, value_head_prefix, Head(hidden_size(config), config.base_rewards))
            self.coefficients = nn.Parameter(torch.zeros(config.base_reward_users, config.base_rewards))
            self.value_head_prefix = value_head_prefix
            self.packing_samples = packing_samples
            # Mean and deviation of users' rewards, not of base rewards. The host prints them.
            self.mean, self.std = getattr(config, "mean", 0.0), getattr(config, "std", 1.0)
            self.post_init()

        def _init_weights(self, module):
            # Without this, weights that a checkpoint lacks would be uninitialised memory.
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
            """Base rewards (B, D) float32.

            With rows `users` (B,) also their coefficients (B, D) and the backbone's outputs. Coefficients are read
            here because ZeRO-3 gathers a split parameter only inside forward.
            """
            pooled, outputs = states(self.base_model, input_ids, attention_mask, self.config.base_reward_pooling)
            base_rewards = getattr(self, self.value_head_prefix)(pooled)
            if users is not None:
                return base_rewards, self.coefficients[users].float(), outputs
            return (base_rewards, outputs) if return_output else base_rewards

    return FactorizedRewardModel
