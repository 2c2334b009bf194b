"""How the reproductions and the labs take their arguments, and show numbers and figures."""

import argparse
import re
from pathlib import Path

import numpy as np

from openrlhf_pgrpo.files import whole_file


def arguments(parser: argparse.ArgumentParser, argv: list[str], figure: Path) -> argparse.Namespace:
    """Checks --seeds and --out. Without any argument, the figure is the one beside the script."""
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds needs at least 2 for a standard error, got {args.seeds}")
    check_figure(parser, args.out)
    args.out = args.out or (None if argv else figure)
    return args


def check_figure(parser: argparse.ArgumentParser, out: Path | None) -> None:
    if out and (out.suffix not in (".png", ".svg", ".pdf") or not out.parent.is_dir()):
        parser.error(f"--out needs a .png, .svg or .pdf in a folder that exists, got {out}")


def error(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over seeds, the first axis."""
    return values.std(0, ddof=1) / np.sqrt(len(values))


def number(values: np.ndarray, digits: int = 3) -> str:
    """Mean and standard error over seeds: `.468±.011`."""
    return with_error(values.mean(), error(values), digits)


def with_error(value: float, error: float, digits: int = 3) -> str:
    return re.sub(r"\b0\.", ".", f"{value:.{digits}f}±{error:.{digits}f}")


def subplots(*shape: int, **options):
    """A figure and its axes, where there is no screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(*shape, **options)


def save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    with whole_file(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=100)
    plt.close(figure)
    print(f"\nfigure: {path}")
