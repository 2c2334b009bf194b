"""Reward per preference group over steps, from a run's metrics.jsonl.

    python examples/personas/plot.py METRICS.jsonl REWARDS.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend must be chosen first
import numpy as np  # noqa: E402

WINDOW = 7  # steps in the running mean


def plot(metrics: Path, figure: Path) -> Path:
    """Draws one panel per preference group: a dot per step and a running mean, on the group's own scale."""
    rows = read(metrics)
    names = sorted({name for row in rows for name in row["pref_groups"]})
    columns = min(4, len(names))
    height = -(-len(names) // columns)
    fig, axes = plt.subplots(height, columns, figsize=(3.2 * columns, 2.4 * height), sharex=True, squeeze=False)
    for ax, name in zip(axes.flat, names):
        steps, means, counts = np.array(
            [
                (row["step"], row["pref_groups"][name]["reward_mean"], row["pref_groups"][name]["samples"])
                for row in rows
                if name in row["pref_groups"]
            ]
        ).T
        ax.scatter(steps, means, s=4 * counts, alpha=0.4, linewidths=0)
        ax.plot(steps, running_mean(steps, means, counts))
        ax.set_title(f"{name}, {100 * counts.sum() / sum(row['train']['rollout/num_samples'] for row in rows):.0f} %")
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    fig.supxlabel("step")
    fig.supylabel("reward, on each preference group's own scale")
    fig.suptitle(f"Reward per preference group and its share of the samples; line: mean over {WINDOW} steps")
    fig.tight_layout()
    fig.savefig(figure, dpi=110)
    plt.close(fig)
    return figure


def read(metrics: Path) -> list[dict]:
    """The steps logged so far; a run in progress may be in the middle of a line, or have none yet."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def running_mean(steps, means, counts):
    """Mean over all samples of the WINDOW steps around each step."""
    near = np.abs(steps[:, None] - steps) <= WINDOW // 2
    return (near * means * counts).sum(1) / (near * counts).sum(1)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
