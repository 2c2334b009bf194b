"""How long `factorize` takes on real data, if it chooses the number of base rewards and the penalty itself.

    python examples/benchmarks/factorize_time.py [--data FOLDER] [--only votes styles] [--rows 1000]

    votes     a Polis conversation (San Juan): 12,320 pairs of 186 statements, all answers to one prompt, SmolLM2-135M
    styles    the DSP data: who wants one of five styles prefers it to the others; 10,422 pairs of some 3,000 answers
              that are short enough for MiniLM

Wall seconds and processor seconds of the whole command: imports, reading texts, choosing, fitting, writing. FOLDER
(default: shared/data beside the repository) has `polis/san_juan` and `dsp_test.jsonl.gz`. Without them nothing is
measured.
"""

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "personas"), str(HERE.parent / "road")]

from votes import is_polis, ratings  # noqa: E402

from models import build_policy, minilm_folder  # noqa: E402
from openrlhf_pgrpo.files import write_rows  # noqa: E402

DATA = HERE.parents[2] / "shared" / "data"
STYLES, PAIRS_OF_STYLES, LONGEST = "dsp_test.jsonl.gz", 10_422, 1500  # characters
PROMPT = "Say in one sentence what should be done with the land on the islands."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="a folder with polis/san_juan and dsp_test.jsonl.gz")
    parser.add_argument("--only", nargs="+", choices=("votes", "styles"), default=("votes", "styles"))
    parser.add_argument("--rows", type=int, help="of each data set, the first ones; default: all")
    args = parser.parse_args()
    polis, styles = args.data / "polis" / "san_juan", args.data / STYLES
    for name, path, there in (("votes", polis, is_polis(polis)), ("styles", styles, styles.is_file())):
        if name in args.only and not there:
            print(f"skipped: --only {name} needs {path}, which is not there; name its folder by --data")
            return
    cases = {
        "votes": (lambda: votes(polis), build_policy, ("--pairs", "40")),
        "styles": (lambda: styles_preferred(styles), minilm_folder, ("--pooling", "mean")),
    }
    print(f"{'data':8}{'rows':>8}{'texts':>7}{'wall s':>8}{'processor s':>13}")
    for name in args.only:
        rows, backbone, words = cases[name]
        print(measured(name, rows()[: args.rows], backbone(), words), flush=True)


def votes(folder: Path) -> list[dict]:
    return [{**row, "prompt": PROMPT} for row in ratings(folder)]


def styles_preferred(file: Path) -> list[dict]:
    """Pairs drawn of all in which the user, named like a style, prefers it to an answer that MiniLM, which knows
    neither capitals nor line breaks, can tell from it."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        records = [*map(json.loads, lines)]
    pairs = [
        {"user": style, "prompt": record["query"], "chosen": own, "rejected": other}
        for record in records
        for style, own in record["responses"].items()
        for other in record["responses"].values()
        if spoken(own) != spoken(other) and all(0 < len(text.strip()) < LONGEST for text in (own, other))
    ]
    return [pairs[row] for row in np.random.default_rng(0).permutation(len(pairs))[:PAIRS_OF_STYLES]]


def spoken(text: str) -> list[str]:
    return text.lower().split()


def measured(name: str, rows: list[dict], backbone: Path, words: tuple[str, ...]) -> str:
    """A line of the table."""
    texts = {(row["prompt"], row[key]) for row in rows for key in ("response", "chosen", "rejected") if key in row}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        write_rows(data, rows)
        command = ["factorize", "--data", data, "--backbone", backbone, "--output", Path(folder) / "rewards", *words]
        before, began = processor_seconds(), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "openrlhf_pgrpo.cli.main", *map(str, command)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        wall, processor = time.perf_counter() - began, processor_seconds() - before
    if done.returncode:
        raise SystemExit(f"factorize failed:\n{done.stdout}")
    return f"{name:8}{len(rows):8}{len(texts):7}{wall:8.1f}{processor:13.1f}"


def processor_seconds() -> float:
    """Of all processes that this one started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
