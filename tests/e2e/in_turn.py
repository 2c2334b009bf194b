"""Runs a script once for each of several command lines, one after the other in one process: its imports take longer
than such a training.

in_turn.py MODULE_OR_FILE WORDS... then WORDS...
"""

import argparse
import runpy
import sys
from itertools import groupby


def main(script: str, *words: str) -> None:
    run = runpy.run_path if script.endswith(".py") else runpy.run_module
    parse_args = argparse.ArgumentParser.parse_args
    for between, argv in groupby(words, "then".__eq__):
        if not between:
            argparse.ArgumentParser.parse_args = parse_args  # a door replaces it for the one run of its process
            sys.argv[1:] = argv
            run(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
