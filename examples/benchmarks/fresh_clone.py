"""How long the installation, `make demo` and `make test` take on a fresh clone of the commit that is checked out.

    python examples/benchmarks/fresh_clone.py FOLDER [--only demo test]

The clone lies in FOLDER, with a link to the folder `shared` beside this repository if there is one, and what the
commands print goes into files there. The installation is `make venv`, which either command would begin with.
"""

import argparse
import subprocess
import time
from pathlib import Path

from tiny_run import new_folder, started, tail

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("demo", "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=COMMANDS)
    args = parser.parse_args()
    folder = new_folder(parser, args.folder)
    clone = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    if (shared := ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(shared)
    for name in ("venv", *args.only):
        began, log = time.perf_counter(), folder / f"{name}.log"
        with started(["make", "-C", str(clone), name], log, {}) as process:
            code = process.wait()
        if code != 0:
            raise SystemExit(f"needs `make {name}` to succeed, got {code}; {tail(log)}")
        minutes, seconds = divmod(round(time.perf_counter() - began), 60)
        print(f"make {name:6}{minutes:3} min {seconds:2} s", flush=True)


if __name__ == "__main__":
    main()
