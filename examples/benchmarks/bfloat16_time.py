"""What bfloat16 costs on this CPU, with PyTorch's own products of matrices and with those of the CPU stack.

    python examples/benchmarks/bfloat16_time.py [--tokens 128]

Seconds of processor time on one thread, of a random Llama with the shape of SmolLM2-135M: forward and backward of a
training step, and the next token of 1, 8, 16 and 32 sequences. float32 is for comparison. On a CPU with instructions
for bfloat16 nothing is replaced, and two columns are the same.
"""

import argparse
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from openrlhf_pgrpo.host.cpu.bfloat16 import speed_up_bfloat16

SHAPE = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
SEQUENCES = (1, 8, 16, 32)
PARTS = ("forward", "backward", *(f"next of {count}" for count in SEQUENCES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=128, help="of a training step, in two sequences")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = LlamaForCausalLM(SHAPE)
    found = {"float32": seconds(model, args.tokens)}
    model.bfloat16()
    found["PyTorch"] = seconds(model, args.tokens)
    speed_up_bfloat16()
    found["CPU stack"] = seconds(model, args.tokens)
    print(f"{'':12}" + "".join(f"{name:>12}" for name in (*found, "ratio")))
    for part, *times in zip(PARTS, *found.values()):
        print(f"{part:12}" + "".join(f"{value:12.3f}" for value in (*times, times[1] / times[2])), flush=True)


def seconds(model: LlamaForCausalLM, tokens: int) -> list[float]:
    """Of each of PARTS; every one is done once before it is timed, but for the training step, which is long."""
    ids = torch.randint(SHAPE.vocab_size, (2, tokens // 2))
    clock = [time.process_time()]
    loss = model(ids, labels=ids).loss
    clock.append(time.process_time())
    loss.backward()
    clock.append(time.process_time())
    taken = [after - before for before, after in zip(clock, clock[1:])]
    with torch.no_grad():
        for count in SEQUENCES:
            ids = torch.randint(SHAPE.vocab_size, (count, 1))
            model(ids)
            start = time.process_time()
            model(ids)
            taken.append(time.process_time() - start)
    return taken


if __name__ == "__main__":
    main()
