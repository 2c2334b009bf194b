"""What the add-on adds to a sample on its way from dataset to advantage: bytes between processes, and time.

    python examples/benchmarks/transport.py [FOLDER] [--steps 12] [--characters 11] [--modes sync async] [--nodes 1 2]

It runs real OpenRLHF, Ray, vLLM and DeepSpeed with a tiny policy. Each mode and number of nodes gets one run of the
stock host (`group_norm`, no --data.pref_group_key) and one of `pgrpo` with preference groups and users. Two nodes are
two `ray start` on this machine. A probe in every process (`transport_probe.py`) counts the bytes that Ray serializes.
Answers have equal length, and the learning rate is 0, so that the two runs send the same data apart from ours. Without
Ray's own envelopes, the bytes of a leg cross the network if its two ends are on different nodes. "crossed" is the
share of such samples.

Times are processor time of one thread, medians over the calls of the run with `pgrpo`. In that run the stock host's
code also runs, on the same objects: prompts without tags are serialized and deserialized where tagged ones are sent,
and `group_norm` is computed where `pgrpo` is, both in random order. Two separate runs would differ by more than what
is measured here. ± is the standard error of the added time.

FOLDER (default transport-run) gets the runs with their logs.
"""

import argparse
import json
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tiny_run import PROMPTS, SAMPLES, flags, new_folder, run_to_the_end, tiny_policy, write_data
from two_nodes import two_nodes

HERE = Path(__file__).resolve().parent
OURS = ["--advantage_estimator", "pgrpo", "--data.pref_group_key", "persona", "--data.user_key", "user"]
RUNS = {"stock": ["--advantage_estimator", "group_norm"], "ours": OURS}
# Leg: what is sent, and how often it is serialized.
LEGS = {
    "prompts": ("prompt, label and parameters, to an engine", 1),
    "tokenizer": ("the tokenizer, with the first prompt", 1),
    "responses": ("responses, back from the engine", 1),
    "queue": ("samples, into the queue and out of it", 2),
    "tokens": ("tokens, to the ranks", 1),
    "log-probs": ("log-probs, back from the ranks", 1),
    "experiences": ("experiences, to the ranks", 1),
}
CONTROLS = ("tokenizer", "tokens", "log-probs")  # are the same in both runs: their added time is noise


class Measured(NamedTuple):
    """A number per sample with its standard error."""

    value: float
    error: float = 0.0

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(self.value + other.value, float(np.hypot(self.error, other.error)))

    def __sub__(self, other: "Measured") -> "Measured":
        return Measured(self.value - other.value, float(np.hypot(self.error, other.error)))


class Times(NamedTuple):
    """Seconds per sample. `added` is more exact than the difference of the other two."""

    stock: Measured
    ours: Measured
    added: Measured


NOTHING = Measured(0.0)
DATASET = ("dataset", "dataset, host")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("transport-run"))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--characters", type=int, default=11, help="of a prompt, 11 to 200")
    parser.add_argument("--modes", nargs="+", choices=("sync", "async"), default=["sync", "async"])
    parser.add_argument("--nodes", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    args = parser.parse_args()
    if args.steps < 3:
        parser.error(f"needs --steps of at least 3, for medians, got {args.steps}")
    if not 11 <= args.characters <= 200:
        parser.error(f"needs --characters from 11 to 200, got {args.characters}")
    folder = new_folder(parser, args.folder)
    policy = tiny_policy(folder / "policy")
    write_data(folder, args.steps * PROMPTS, args.characters)

    sums = []
    with ExitStack() as clusters:
        for nodes in args.nodes:
            address = clusters.enter_context(two_nodes(folder)) if nodes == 2 else None
            for mode in args.modes:
                title = f"{mode}, {nodes} node{'s'[: nodes - 1]}"
                found = {}
                for name, estimator in RUNS.items():
                    run = folder / f"{mode}-{nodes}-{name}"
                    train(policy, folder, run, [*estimator, *shape(mode, nodes)], address)
                    found[name] = read(run, args.steps * PROMPTS * SAMPLES, queue=mode == "async")
                text, added = table(found["stock"], found["ours"])
                print(f"\n{title}: {args.steps} steps of {PROMPTS} prompts x {SAMPLES} samples\n{text}", flush=True)
                sums.append((title, *added))
    print(f"\n{'added per sample':24}{'bytes':>10}{'us':>12}")
    for title, size, seconds in sums:
        print(f"{title:24}{size.value:10.1f}{1e6 * seconds.value:12.1f} ±{1e6 * seconds.error:5.1f}")


def shape(mode: str, nodes: int) -> list[str]:
    """A rank and an engine. On two nodes: in sync training both on each node, in async training one on each node."""
    words = ["--vllm.num_engines", "1"]
    if mode == "async":
        words += ["--train.async_enable"]
    elif nodes == 2:
        words = ["--vllm.num_engines", "2", "--train.colocate_all", "--actor.num_nodes", "2"]
    return [*words, "--actor.num_gpus_per_node", "1"]


def train(policy: Path, folder: Path, run: Path, words: list[str], address: str | None) -> None:
    probe = run / "probe"
    probe.mkdir(parents=True)
    command = [sys.executable, str(HERE / "transport_probe.py"), *flags(policy, folder, run), *words]
    cluster = {"RAY_ADDRESS": address} if address else {}
    run_to_the_end(
        [*command, "--pgrpo.device", "cpu"],
        run / "log.txt",
        {"TRANSPORT_PROBE": str(probe), "PYTHONPATH": str(HERE), **cluster},
    )


# ---- results --------------------------------------------------------------------------------------------------------


def read(run: Path, samples: int, queue: bool) -> list[dict]:
    """The rows of all processes of a run.

    Raises:
        SystemExit: a leg was not seen completely at one of its ends.
    """
    rows = [json.loads(line) for path in (run / "probe").iterdir() for line in path.read_text().splitlines()]
    seen = Counter()
    for row in rows:
        if row.get("side") in ("out", "in"):
            seen[row["leg"], row["side"]] += row["samples"]
    for leg, (_, hops) in LEGS.items():
        expected = samples * hops * (queue or leg != "queue")
        out, received = seen[leg, "out"], seen[leg, "in"]
        # The host may ask for the same object twice, as it does for log-probs when all is colocated.
        if out != expected or received < expected:
            raise SystemExit(
                f"{run.name} needs {expected} samples on the leg {leg!r}, got {out} sent and {received} received: the "
                "host sends them in a way that this benchmark does not know"
            )
    return rows


def table(stock: list[dict], ours: list[dict]) -> tuple[str, tuple[Measured, Measured]]:
    """The lines of one mode, and the bytes and seconds that the add-on adds to a sample."""
    head = f"{'':48}{'bytes/sample':>29}   {'us/sample':>30}"
    lines = [head, f"{'':48}" + f"{'stock':>9}{'ours':>10}{'added':>10}   " * 2 + f"{'':4}crossed"]
    size, seconds = NOTHING, NOTHING
    for leg, (what, hops) in LEGS.items():
        there, here = ([row for row in rows if row.get("leg") == leg] for rows in (stock, ours))
        if here:
            sizes, times = [leg_bytes(rows) for rows in (there, here)], leg_times(here, hops)
            size = size + (sizes[1] - sizes[0])
            if leg not in CONTROLS:
                seconds = seconds + times.added
            lines.append(line(what, sizes, times, crossed(here)))
    samples = sum(row["samples"] for row in ours if row.get("leg") == "prompts" and row["side"] == "out")
    for what, times in own_code(ours, samples).items():
        if not what.startswith(" "):
            seconds = seconds + times.added
        lines.append(line(what, None, times, None))
    return "\n".join(lines), (size, seconds)


def line(what: str, sizes, times: Times, share: float | None) -> str:
    text = f"{what:48}"
    if sizes:
        text += f"{sizes[0].value:9.1f}{sizes[1].value:10.1f}{(sizes[1] - sizes[0]).value:10.1f}   "
    else:
        text += " " * 32
    text += f"{1e6 * times.stock.value:9.1f}{1e6 * times.ours.value:10.1f}{1e6 * times.added.value:10.1f}"
    text += f" ±{1e6 * times.added.error:4.1f}"
    return text if share is None else f"{text}{share:8.0%}"


def leg_bytes(rows: list[dict]) -> Measured:
    """Bytes per sample, added over the kinds of process that send one after the other. Processes of a kind share."""
    total = NOTHING
    sent = [row for row in rows if row["side"] == "out"]
    for process in {row["process"] for row in sent}:
        own = [row for row in sent if row["process"] == process]
        each = [row["bytes"] / row["samples"] for row in own]
        mean = sum(row["bytes"] for row in own) / sum(row["samples"] for row in own)
        total = total + Measured(mean, float(np.std(each) / np.sqrt(len(each))))
    return total


def leg_times(rows: list[dict], hops: int) -> Times:
    pairs = [[hops * row[name] / row["samples"] for name in RUNS] for row in rows if row["side"] == "both"]
    return paired(*zip(*pairs))


def paired(stock: list[float], ours: list[float]) -> Times:
    return Times(median(stock), median(ours), median(np.subtract(ours, stock)))


def median(values) -> Measured:
    """The median with its standard error for normal noise, whose scale is taken from the median deviation."""
    middle = float(np.median(values))
    scale = 1.4826 * float(np.median(np.abs(np.asarray(values) - middle)))
    return Measured(middle, 1.2533 * scale / len(values) ** 0.5)


def crossed(rows: list[dict]) -> float:
    """Share of the samples whose two ends are on different nodes. One of the ends is always one process."""
    ends = {"out": Counter(), "in": Counter()}
    for row in rows:
        if row["side"] in ends:
            ends[row["side"]][row["node"]] += row["samples"]
    one, many = sorted(ends.values(), key=len)
    return 1 - sum(many[node] for node in one) / many.total()


def own_code(rows: list[dict], samples: int) -> dict[str, Times]:
    """Seconds of our code per sample, and of the host's code that it replaces. An indented line is part of the one
    above."""

    def seconds(part):
        return [row["seconds"] / (PROMPTS * SAMPLES) for row in rows if row.get("part") == part]

    def added(part):
        return Times(NOTHING, median(seconds(part)), median(seconds(part)))

    dataset = {part: sum(row["seconds"] for row in rows if row.get("part") == part) for part in DATASET}
    tags = Measured((dataset["dataset"] - dataset["dataset, host"]) / samples)
    return {
        "dataset: tags and checks": Times(NOTHING, tags, tags),
        "advantages and metrics": paired(seconds("advantages, host"), seconds("advantages")),
        "  reward batch": added("reward batch"),
        "  metrics of each preference group": added("metrics"),
        "  an answer of each preference group": added("samples"),
        "log": added("log"),
    }


if __name__ == "__main__":
    main()
