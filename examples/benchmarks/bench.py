"""Runs the benchmarks, keeps what they print in one JSON file, and says which numbers changed since the last time.

    python examples/benchmarks/bench.py [bench.json] [--only factorization_time serve_time ...] [--noticed 1.25]

Each benchmark runs alone, in a folder of its own. The file is written after each of them, with its seconds and the
commit. Those that were not run, fail or lack their data keep what they printed last, and the others go on. A number is
named if it is above or below the last one by more than the factor --noticed: other work on the machine changes times
by as much, so run a benchmark again before you believe it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import zip_longest
from pathlib import Path

from openrlhf_pgrpo.files import write_whole

HERE = Path(__file__).resolve().parent
BENCHMARKS = (
    "factorization_time",
    "factorize_time",
    "elicitation_time",
    "cpu_time",
    "group_weights",
    "history_file",
    "long_run",
    "estimator_time",
    "controller_limit",
    "dpo_step_time",
    "serve_time",
    "server_load",
    "step_time",
    "transport",
    "demo_time",
)
NUMBER = re.compile(r"(?<![\w.])-?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?(?![\w.])")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=Path("bench.json"))
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, metavar="BENCHMARK")
    parser.add_argument("--noticed", type=float, default=1.25, help="factor by which a number has to differ")
    args = parser.parse_args()
    results = read(args.file) if args.file.exists() else {}
    machine = {"cores": os.cpu_count(), "commit": commit()}
    without = []  # figures
    for name in args.only:
        print(f"{name} ...", flush=True)
        began = time.perf_counter()
        try:
            lines = run(name)
        except RuntimeError as failure:
            print(f"  ! {failure}", flush=True)
            without.append(name)
            continue
        seconds = round(time.perf_counter() - began)
        print("".join(f"    {line}\n" for line in lines) + f"  {seconds} s")
        for line in changes(results.get(name, {}).get("lines"), lines, args.noticed):
            print(f"  ! {line}")
        results[name] = {"at": time.strftime("%Y-%m-%d %H:%M"), "seconds": seconds, **machine, "lines": lines}
        write_whole(args.file, json.dumps(results, indent=1))
    if without:
        raise SystemExit(f"no figures of {', '.join(without)}: see above")


def read(file: Path) -> dict[str, dict]:
    """What was kept last time.

    Raises:
        SystemExit: the file is none of this script, which would replace it.
    """
    try:
        results = json.loads(file.read_text())
        if results.keys() <= {*BENCHMARKS} and all(isinstance(result["lines"], list) for result in results.values()):
            return results
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        pass
    raise SystemExit(f"this needs a file that it wrote before, or a new one, got {file}: name another")


def commit() -> str:
    """The commit that is checked out, with a + if files differ from it."""
    words = ["git", "-C", HERE, "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"


def run(name: str) -> list[str]:
    """What a benchmark prints.

    Raises:
        RuntimeError: it failed, or says that its data are absent; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, HERE / f"{name}.py"], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    lines = done.stdout.splitlines()
    if skipped := [line for line in lines if line.startswith("skipped")]:
        raise RuntimeError(f"{name}: {skipped[0]}")
    return lines


def changes(last: list[str] | None, lines: list[str], noticed: float) -> list[str]:
    """The lines in which a number is another one than last time, with both."""
    found = []
    for before, line in zip_longest(last or lines, lines, fillvalue=""):
        if NUMBER.sub("#", before).split() != NUMBER.sub("#", line).split():
            found.append(f"another line than last time: {before!r}, now {line!r}")
            continue
        pairs = [(float(old), float(new)) for old, new in zip(NUMBER.findall(before), NUMBER.findall(line))]
        far = [f"{old:g} -> {new:g}" for old, new in pairs if old != new and not close(old, new, noticed)]
        if far:
            found.append(f"{' '.join(line.split())}: {', '.join(far)}")
    return found


def close(old: float, new: float, noticed: float) -> bool:
    return old * new > 0 and 1 / noticed <= new / old <= noticed


if __name__ == "__main__":
    main()
