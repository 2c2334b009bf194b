"""The same Llama with wider attention heads, for engines that refuse narrow ones: vLLM's on a CPU wants 32 dimensions.

    python examples/wider_heads.py MODEL OUTPUT [--head_dim 32]

Rotary embeddings turn dimension i of a head's first half together with dimension i of its second half, by an angle of
theta^(-2i/d) a position. In a head w times as wide, these two become dimension w i of both halves, where the angle is
the same; all others are zero. Scores are divided by a larger root there, so queries are multiplied by sqrt(w).
Logits are those of the narrow model, up to rounding.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCALED = {"q_proj": True, "k_proj": False, "v_proj": False}  # projections into heads: is it the queries'?


def widen(model: Path, output: Path, head_dim: int = 32) -> None:
    """Writes the wider model and its tokenizer into a new folder, float32.

    Raises:
        ValueError: heads would not be a whole number of times as wide. FileExistsError: there is such a folder.
    """
    narrow = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    old = getattr(narrow.config, "head_dim", None) or narrow.config.hidden_size // narrow.config.num_attention_heads
    if head_dim % old:
        raise ValueError(f"--head_dim needs a multiple of {old}, got {head_dim}: heads become a whole number wider")
    times = head_dim // old
    place = torch.arange(old // 2) * times
    place = torch.cat([place, head_dim // 2 + place])  # of each old dimension in the wider head
    weights = narrow.state_dict()
    for name, weight in weights.items():
        projection = name.split(".")[-2]
        if projection in SCALED:
            wide = weight.new_zeros(len(weight) // old, head_dim, weight.shape[1])
            wide[:, place] = weight.view(-1, old, weight.shape[1]) * (times**0.5 if SCALED[projection] else 1)
            weights[name] = wide.flatten(0, 1)
        elif projection == "o_proj":
            wide = weight.new_zeros(len(weight), weight.shape[1] // old, head_dim)
            wide[..., place] = weight.view(len(weight), -1, old)
            weights[name] = wide.flatten(1)
    config = narrow.config
    config.head_dim = head_dim
    widened = type(narrow)(config)
    widened.load_state_dict(weights)
    widened.generation_config = narrow.generation_config
    output.mkdir(parents=True)  # when all is known, and before anything is written
    widened.save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path, help="a new folder")
    parser.add_argument("--head_dim", type=int, default=32)
    args = parser.parse_args()
    try:
        widen(args.model, args.output, args.head_dim)
    except (ValueError, FileExistsError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
