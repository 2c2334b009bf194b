"""What the CPU stack gains by its own products of matrices in bfloat16, and by keeping memory.

    python examples/benchmarks/cpu_time.py [--tokens 128] [--steps 4]

Seconds of processor time on one thread, of a random Llama with the shape of SmolLM2-135M. First the forward and
backward of a training step, and the next token of 1, 8, 16 and 32 sequences, with PyTorch's products and with ours.
float32 is for comparison. On a CPU with instructions for bfloat16 nothing is replaced, and two columns are the same.
Then training steps in bfloat16, before and after memory is kept from one to the next: the last of --steps each, with
the pages that the system cleared in it.
"""

import argparse
import resource
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from openrlhf_pgrpo.host.cpu.bfloat16 import speed_up_bfloat16
from openrlhf_pgrpo.host.cpu.memory import keep_memory

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
    parser.add_argument("--steps", type=int, default=4, help="with and without memory kept")
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

    print(f"\n{'memory':12}" + "".join(f"{name:>12}" for name in ("forward", "backward", "pages")))
    for name, prepare in (("given back", lambda: None), ("kept", keep_memory)):
        prepare()
        *times, pages = [training_step(model, args.tokens) for _ in range(args.steps)][-1]
        print(f"{name:12}" + "".join(f"{value:12.3f}" for value in times) + f"{pages:12}", flush=True)


def seconds(model: LlamaForCausalLM, tokens: int) -> list[float]:
    """Of each of PARTS; every one is done once before it is timed, but for the training step, which is long."""
    *taken, _ = training_step(model, tokens)
    with torch.no_grad():
        for count in SEQUENCES:
            ids = torch.randint(SHAPE.vocab_size, (count, 1))
            model(ids)
            start = time.process_time()
            model(ids)
            taken.append(time.process_time() - start)
    return taken


def training_step(model: LlamaForCausalLM, tokens: int) -> tuple[float, float, int]:
    """Seconds of forward and of backward, and pages that the system has cleared for them."""
    ids, pages = torch.randint(SHAPE.vocab_size, (2, tokens // 2)), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    clock = [time.process_time()]
    loss = model(ids, labels=ids).loss
    clock.append(time.process_time())
    loss.backward()
    clock.append(time.process_time())
    model.zero_grad()
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages
    return clock[1] - clock[0], clock[2] - clock[1], pages


if __name__ == "__main__":
    main()
