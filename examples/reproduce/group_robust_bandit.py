"""The synthetic experiment of group-robust preference optimisation (arXiv 2405.20304), reproduced in ten seconds.

    python examples/reproduce/group_robust_bandit.py [--seeds 20] [--iterations 10000] [--out FIGURE.png]

Two preference groups share one policy. A state x is drawn from [0,1]^2, an answer y is one of 8 actions, and with
s = y/8 + 1

    phi_i(x, y, g) = s cos(pi x_[i/2]) if i mod 2 = g, else sin(pi x_[i/2]) / s,    i = 0 ... 3
    reward = <phi, theta*_g>,    theta*_0 = (1, 3, 1, 3),    theta*_1 = (3, 1, 3, 1)
    policy = softmax over y of <phi, theta>,    the reference policy is uniform

so what one theta can do for both preference groups is limited. Of the two actions of a pair the one with the higher
reward is chosen. "Uneven" pairs are neighbouring actions for preference group 0, which is hard, and actions four apart
for preference group 1, which is easy; "even" pairs are any two actions. With h the difference of the log-ratios of a
pair, which is <phi(chosen) - phi(rejected), theta> here, the loss is -log sigmoid(beta h) for DPO, minimised by
gradient descent, and (h - 1/(2 beta))^2 for IPO, minimised in closed form for given weights.

    plain   every pair counts the same: fixed weights N_g / N on the preference groups' mean losses
    IS      fixed weights 1 / G, importance sampling
    GR      weights by mirror ascent, from `openrlhf_pgrpo.core.group_weights`: first the weights, then the policy

As in the paper, the script reports the larger of the two preference groups' validation losses and reward errors (the
part of the best action's reward that the policy's best action misses), per seed and then averaged; ± standard error.

Axes: C scenarios, S seeds, R = C S runs, B pairs, F = 4 features, M methods, G = 2 preference groups.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from openrlhf_pgrpo.core.group_weights import RobustOptions, ascend, trade_off
from shown import arguments, error, number, save, subplots

ACTIONS = 8
BEST = np.array([[1.0, 3.0, 1.0, 3.0], [3.0, 1.0, 3.0, 1.0]])  # theta* of either preference group
VALIDATION, STATES = 500, 1000  # pairs of each preference group, states
FIRST_SEED = 2021
ITERATIONS = {"DPO": 10_000, "IPO": 100}
BETA = {"DPO": 1.0, "IPO": 0.1}
RATE = 0.9  # of gradient descent on the loss of DPO
ETA = {"DPO": 0.5, "IPO": 0.01}
WEIGHTS = {"": {"chi": 0.0, "mu": "share"}, "IS-": {"chi": 0.0, "mu": "uniform"}, "GR-": {}}
FIGURE = Path(__file__).with_suffix(".png")
COLOURS = {"": "#000000", "IS-": "#E69F00", "GR-": "#0072B2"}  # Okabe and Ito's, for the colour-blind too


class Scenario(NamedTuple):
    title: str
    pairs: tuple[int, int]  # of preference group 0 and of 1
    uneven: bool


SCENARIOS = {
    "i": Scenario("even, imbalanced 60/240", (60, 240), False),
    "ii": Scenario("uneven, balanced 150/150", (150, 150), True),
    "iii": Scenario("uneven, imbalanced 60/240", (60, 240), True),
}

# MEASURES of an earlier implementation with other random draws, as far as they are known. In scenario iii its IS-DPO
# has the full step. In i and ii it has the step of the authors' code, which is smaller and gets as far in the end.
REFERENCE = {
    "i": {
        "DPO": (".865±.034", ".0855"),
        "IS-DPO": (".483±.015", ".0500"),
        "GR-DPO": (".459±.010", ".0451"),
        "IPO": ("24.72±.46", ".0953"),
        "IS-IPO": ("17.10±.33", ".0529"),
        "GR-IPO": ("16.67±.21", ".0502"),
    },
    "ii": {
        "DPO": (".543", ".0882"),
        "IS-DPO": (".541", ".0882"),
        "GR-DPO": (".480±.013", ".0479"),
        "IPO": ("20.21", ".1062"),
        "IS-IPO": ("20.21", ".1062"),
        "GR-IPO": ("17.88±.25", ".0580"),
    },
    "iii": {
        "DPO": (".639±.011", ".0993±.0016", ".348"),
        "IS-DPO": (".557", ".0891"),
        "GR-DPO": (".468±.011", ".0519±.0023", ".421", ".784"),
        "IPO": ("21.01±.16", ".1149±.0018", "13.19"),
        "IS-IPO": ("20.33±.18", ".1069±.0024", "13.14"),
        "GR-IPO": ("17.82±.24", ".0673±.0037", "16.85", ".841"),
    },
}
MEASURES = ("max loss", "max reward error", "average loss", "alpha, preference group 0")


# --- data ------------------------------------------------------------------------------------------------------------


def features(x: np.ndarray, action: np.ndarray, pref_group: int) -> np.ndarray:
    """phi (..., F) of states x (..., 2) and actions (...)."""
    s = (action / ACTIONS + 1)[..., None]
    own, other = s * np.cos(np.pi * x), np.sin(np.pi * x) / s
    return np.stack([own, other] if pref_group == 0 else [other, own], -1).reshape(*own.shape[:-1], 4)


def draw_actions(rng, size: int, pref_group: int, uneven: bool) -> tuple[np.ndarray, np.ndarray]:
    """Two distinct actions for each of `size` pairs."""
    first = rng.integers(ACTIONS, size=size)
    if not uneven:
        return first, (first + rng.integers(1, ACTIONS, size=size)) % ACTIONS
    if pref_group == 1:
        return first, (first + ACTIONS // 2) % ACTIONS
    last = ACTIONS - 1
    return first, last - np.abs(last - np.abs(first + rng.choice([-1, 1], size)))  # reflected at both ends


def draw_pairs(rng, size: int, pref_group: int, uneven: bool) -> np.ndarray:
    """phi(chosen) - phi(rejected), (size, F)."""
    x = rng.random((size, 2))
    one, other = (features(x, action, pref_group) for action in draw_actions(rng, size, pref_group, uneven))
    return np.where((one - other) @ BEST[pref_group] > 0, 1, -1)[:, None] * (one - other)


class World(NamedTuple):
    """Everything random: start (R, F); training pairs (R, B, F) and their mean over each preference group as a
    matrix, member (R, B, G); validation pairs (R, G, 500, F); states (R, 1000, 2)."""

    start: np.ndarray
    pairs: np.ndarray
    member: np.ndarray
    validation: np.ndarray
    states: np.ndarray

    @classmethod
    def draw(cls, scenarios: list[Scenario], seeds: int) -> "World":
        """Runs in the order of scenarios, then seeds; a seed has the same start and states in all scenarios."""
        return cls(*map(np.stack, zip(*(cls._run(s, FIRST_SEED + seed) for s in scenarios for seed in range(seeds)))))

    @staticmethod
    def _run(scenario: Scenario, seed: int):
        rng, pref_groups = np.random.default_rng(seed), range(len(BEST))
        yield rng.uniform(0, 5, 4)
        states = rng.random((STATES, 2))
        yield np.concatenate([draw_pairs(rng, scenario.pairs[g], g, scenario.uneven) for g in pref_groups])
        yield np.repeat(np.eye(len(BEST)) / scenario.pairs, scenario.pairs, axis=0)
        yield np.stack([draw_pairs(rng, VALIDATION, g, scenario.uneven) for g in pref_groups])
        yield states


# --- learning --------------------------------------------------------------------------------------------------------


def loss_of(kind: str, h: np.ndarray) -> np.ndarray:
    if kind == "IPO":
        return np.square(h - 0.5 / BETA[kind])
    x = -BETA[kind] * h
    return np.log1p(np.exp(x, out=x), out=x)  # in place: new memory costs more than the arithmetic


def descend(theta: np.ndarray, h: np.ndarray, pairs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One step of gradient descent on the weighted loss of DPO, whose derivative by h is -beta sigmoid(-beta h)."""
    x = BETA["DPO"] * h
    np.exp(x, out=x)
    x += 1
    return theta + RATE * BETA["DPO"] * (pairs.swapaxes(1, 2) @ np.divide(weights, x, out=x))


def minimise(theta: np.ndarray, h: np.ndarray, pairs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The theta of least weighted loss of IPO: 1/(2 beta) (S'WS)^-1 S'W 1, with S the pairs and W the weights."""
    target = np.einsum("rbf,rbm->rmf", pairs, weights)
    square = np.einsum("rbf,rbm,rbe->rmfe", pairs, weights, pairs, optimize=True)
    return 0.5 / BETA["IPO"] * np.linalg.solve(square, target[..., None])[..., 0].swapaxes(1, 2)


def learn(world: World, kind: str, iterations: int, keep=()) -> tuple[np.ndarray, np.ndarray, dict]:
    """theta (R, F, M) and alpha (R, M, G) at the end, and a dictionary with theta after the iterations in `keep`.

    Every method sees the same data, so all of them are one array. `member` carries 1 / N_g, so the losses that move
    the weights are means over a preference group and need no N / N_g, as in the paper's Algorithm 2.
    """
    step = descend if kind == "DPO" else minimise
    options = [RobustOptions(eta=ETA[kind], **weights) for weights in WEIGHTS.values()]
    eta, chi = options[0].eta, np.array([[o.chi] for o in options])  # chi (M, 1)
    share = 1 / world.member.max(1)
    share /= share.sum(1, keepdims=True)
    mu = np.stack([share if o.mu == "share" else np.full_like(share, 1 / len(BEST)) for o in options], 1)
    theta = np.repeat(world.start[..., None], len(options), -1)
    log_alpha, kept = np.full(mu.shape, -np.log(len(BEST))), {}
    for iteration in range(1, iterations + 1):
        h = world.pairs @ theta
        losses = loss_of(kind, h).swapaxes(1, 2) @ world.member
        log_alpha = ascend(log_alpha, eta * losses)
        alpha = trade_off(np.exp(log_alpha), mu, chi)
        theta = step(theta, h, world.pairs, world.member @ alpha.swapaxes(1, 2))
        if iteration in keep:
            kept[iteration] = theta
    return theta, alpha, kept


def validation_losses(world: World, kind: str, theta: np.ndarray) -> np.ndarray:
    """(R, M, G)"""
    return loss_of(kind, world.validation @ theta[:, None]).mean(2).swapaxes(1, 2)


def reward_errors(world: World, theta: np.ndarray) -> np.ndarray:
    """(R, M, G): (reward of the best action - reward of the policy's) / reward of the best action. Each reward is a
    mean over states, because in some states even the best is negative."""
    errors = []
    for pref_group, best in enumerate(BEST):
        phi = features(world.states[:, :, None], np.arange(ACTIONS)[None, None], pref_group)
        reward = phi @ best
        chosen = (phi @ theta[:, None]).argmax(2)  # (R, states, M)
        got = np.take_along_axis(reward, chosen, 2).mean(1)
        most = reward.max(2).mean(1)[:, None]
        errors.append((most - got) / most)
    return np.stack(errors, -1)


# --- report ----------------------------------------------------------------------------------------------------------


def run(names: list[str], seeds: int, iterations: dict[str, int]) -> tuple[dict, dict]:
    """Two dictionaries, scenario -> method -> MEASURES (4, S), and scenario -> method of DPO -> iteration ->
    validation losses (G,), means over seeds."""
    world = World.draw([SCENARIOS[name] for name in names], seeds)
    measured, curves = {name: {} for name in names}, {name: {} for name in names}
    points = {int(point) for point in np.geomspace(1, iterations["DPO"], 60)}
    for kind in ITERATIONS:
        theta, alpha, kept = learn(world, kind, iterations[kind], points if kind == "DPO" else ())
        losses, errors = validation_losses(world, kind, theta), reward_errors(world, theta)
        values = np.stack([losses.max(-1), errors.max(-1), losses.mean(-1), alpha[..., 0]])
        paths = {point: validation_losses(world, kind, theta) for point, theta in kept.items()}
        for c, name in enumerate(names):
            own = slice(c * seeds, (c + 1) * seeds)
            for m, prefix in enumerate(WEIGHTS):
                measured[name][prefix + kind] = values[:, own, m]
                if paths:
                    curves[name][prefix + kind] = {point: path[own, m].mean(0) for point, path in paths.items()}
    return measured, curves


def report(measured: dict) -> None:
    for name, methods in measured.items():
        print(f"\nscenario {name}: {SCENARIOS[name].title}")
        print(f"{'':8}" + "".join(f"{title:28}" for title in MEASURES).rstrip())
        print(f"{'':8}" + (f"{'here':14}{'reference':14}" * len(MEASURES)).rstrip())
        for method, measures in methods.items():
            loss_digits = 3 if method.endswith("DPO") else 2
            here = [number(values, digits) for values, digits in zip(measures, (loss_digits, 4, loss_digits, 3))]
            here[3] = here[3] if method.startswith("GR") else ""  # the others' weights are fixed
            there = [*REFERENCE[name][method], "", ""]
            print(f"{method:8}" + "".join(f"{a:14}{b:14}" for a, b in zip(here, there)).rstrip())


def draw(measured: dict, curves: dict, path: Path) -> None:
    """The two losses and the reward error by scenario, and the paths of the losses in the last one."""
    fig, ((dpo, ipo), (reward, path_of_loss)) = subplots(2, 2, figsize=(9, 7.5))
    panels = [
        (dpo, {"DPO": "o"}, 0, "DPO: validation loss of the worse preference group"),
        (ipo, {"IPO": "s"}, 0, "IPO: validation loss of the worse preference group"),
        (reward, {"DPO": "o", "IPO": "s"}, 1, "Reward error of the worse preference group"),
    ]
    for ax, kinds, measure, title in panels:
        for k, (kind, marker) in enumerate(kinds.items()):
            for m, (prefix, colour) in enumerate(COLOURS.items()):
                values = [methods[prefix + kind][measure] for methods in measured.values()]
                means, errors = [value.mean() for value in values], [error(value) for value in values]
                places = np.arange(len(values)) + 0.16 * (m - 1) + 0.07 * k
                face = colour if kind == "DPO" else "white"
                ax.errorbar(places, means, errors, fmt=marker, color=colour, mfc=face, capsize=2, label=prefix + kind)
        ax.set_xticks(range(len(measured)), [SCENARIOS[name].title.replace(", ", "\n") for name in measured])
        ax.tick_params(axis="x", labelsize=8)
        ax.set_title(title, fontsize=10)
        ax.grid(axis="y", alpha=0.3)
    name, methods = [*curves.items()][-1]
    for prefix, colour in COLOURS.items():
        losses = methods[prefix + "DPO"]
        for pref_group, style in enumerate("-:"):
            path_of_loss.plot([*losses], [loss[pref_group] for loss in losses.values()], style, color=colour)
    path_of_loss.set_xscale("log")
    path_of_loss.set_ylim(0, 0.8)
    path_of_loss.set_xlabel("iteration")
    title = "validation loss of the\nhard (solid) and the easy (dotted) preference group"
    path_of_loss.set_title(f"DPO, {SCENARIOS[name].title}: {title}", fontsize=10)
    path_of_loss.grid(alpha=0.3)
    fig.legend(*reward.get_legend_handles_labels(), loc="lower center", ncols=6, frameon=False)
    fig.tight_layout(rect=(0, 0.04, 1, 1))
    save(fig, path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20, help="runs of each method in each scenario")
    parser.add_argument("--iterations", type=int, default=ITERATIONS["DPO"], help="of gradient descent, for DPO")
    parser.add_argument("--out", type=Path, help=f"the figure; without arguments {FIGURE.name} beside this file")
    args = arguments(parser, argv, FIGURE)
    if args.iterations < 1:
        parser.error(f"--iterations needs at least 1, got {args.iterations}")
    measured, curves = run([*SCENARIOS], args.seeds, {**ITERATIONS, "DPO": args.iterations})
    report(measured)
    if args.out:
        draw(measured, curves, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
