"""Seconds and memory to resume and to report a long run with many preference groups.

    python examples/benchmarks/long_run.py [--steps 100000] [--pref-groups 10000] [--each 16]

The metrics file has `--steps` rows, each with `--each` of the preference groups and as many recorded samples. Each
part runs in a process of its own: "resume" is what a run does with the file before and at its first row, "report" is
`openrlhf-pgrpo report`. Memory is the peak above that of the same process on a file of one row.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

RESUME = """
import sys
from openrlhf_pgrpo.host.run_log import JSONLines
JSONLines(sys.argv[1]).append({"step": int(sys.argv[2])})
"""
REPORT = """
import sys
from pathlib import Path
from openrlhf_pgrpo.report import write_report
write_report([Path(sys.argv[1])], Path(sys.argv[1]).with_suffix(".html"))
"""
MEASURED = """
import resource, time
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
METRICS = (
    *("samples", "share", "reward_mean", "reward_std", "advantage_mean", "advantage_std", "history_count"),
    *("history_mean", "history_std", "response_length_mean"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10**5)
    parser.add_argument("--pref-groups", type=int, default=10**4)
    parser.add_argument("--each", type=int, default=16, help="preference groups of a step")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        short, long = Path(folder, "short.jsonl"), Path(folder, "long.jsonl")
        write(short, 1, args.pref_groups, args.each)
        write(long, args.steps, args.pref_groups, args.each)
        print(f"{args.steps} steps, {args.pref_groups} preference groups: {long.stat().st_size / 2**20:.0f} MiB")
        print(f"{'':10}{'seconds':>10}{'MiB':>10}")
        for name, code in {"resume": RESUME, "report": REPORT}.items():
            _, least = measured(code, short, 2)
            seconds, most = measured(code, long, args.steps + 1)
            print(f"{name:10}{seconds:10.1f}{most - least:10.0f}", flush=True)


def write(path: Path, steps: int, pref_groups: int, each: int) -> None:
    """A metrics file with numbers at random."""
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        for step in range(1, steps + 1):
            names = [f"preference group {g}" for g in rng.choice(pref_groups, each, replace=False)]
            values = rng.normal(size=(each, len(METRICS))).round(6).tolist()
            sample = {"prompt": "Who deserves far more fame?", "response": "The band next door. " * 4, "reward": 1.0}
            row = {
                "step": step,
                "time": 1e9 + step,
                "estimator": "pgrpo",
                "train": {"reward": values[0][0], "policy_loss": values[0][1]},
                "pref_groups": {name: dict(zip(METRICS, own)) for name, own in zip(names, values)},
                "samples": [{"pref_group": name, **sample} for name in names],
            }
            file.write(json.dumps(row) + "\n")


def measured(code: str, *words) -> tuple[float, float]:
    """Seconds after the imports, and the peak of memory in MiB, of a process of its own."""
    imports, _, last = code.strip().rpartition("\n")
    program = f"{imports}\nimport time; began = time.perf_counter()\n{last}\n{MEASURED}"
    command = [sys.executable, "-c", program, *map(str, words)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds, memory = said.split()[-2:]
    return float(seconds), float(memory)


if __name__ == "__main__":
    main()
