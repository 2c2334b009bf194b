"""The sections of a page in order: the figures and words of each. A section without recorded data is left out."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import plotly.graph_objects as go

from openrlhf_pgrpo.report import figures
from openrlhf_pgrpo.report.selection import RunView, View

GROUP_METRICS = {  # key -> title, sentence
    "advantage_mean": (
        "Mean advantage",
        "Above zero, the policy is pushed towards the answers of this preference group; below, away from them.",
    ),
    "advantage_std": (
        "Spread of advantages",
        "How hard a preference group pulls on the policy, answer for answer: equal lines mean an equal say.",
    ),
    "history_mean": ("Mean of the history", "A new reward of the preference group is compared with it."),
    "history_std": ("Standard deviation of the history", "A new reward is divided by it: the group's own scale."),
    "history_count": ("Samples in the history", "With forgetting, the sum of their weights, which levels off."),
    "history_within_std": ("Spread within prompts", "How much answers to one prompt differ in reward."),
    "history_between_std": ("Spread between prompts", "How much prompts differ in their mean reward."),
    "weight": ("Weight of the preference group", "How much its samples count; the worst off should count more."),
    "robust_alpha": ("Alpha of the preference group", "The adversary's weights, which add up to 1."),
    "robust_loss": (
        "Loss of the preference group",
        "Minus the mean loss of all groups: above zero, its weight grows.",
    ),
    "response_length_mean": ("Response length", "Tokens of an answer, running mean."),
}
ADVANTAGES = ("advantage_mean", "advantage_std")
HISTORY = ("history_mean", "history_std", "history_count", "history_within_std", "history_between_std")
WEIGHTS = ("weight", "robust_alpha", "robust_loss")
SHOWN_ELSEWHERE = {"samples", "share", "reward_mean", "reward_std", *ADVANTAGES, *HISTORY, *WEIGHTS}
TRAIN_METRICS = {
    "rollout/reward_mean": "Reward",
    "kl": "KL to the reference policy",
    "vllm_kl": "KL between rollout and training",
    "policy_loss": "Policy loss",
    "actor_grad_norm": "Gradient norm",
    "actor_lr": "Learning rate",
    "rollout/response_length_mean": "Response length, tokens",
    "rollout/truncated_rate": "Truncated answers, share",
}


@dataclass(frozen=True)
class Plot:
    figure: go.Figure
    title: str = ""
    sentence: str = ""
    colour: str = ""
    badge: str = ""
    worst: str = ""  # a red badge


@dataclass(frozen=True)
class Section:
    title: str
    sentence: str
    plots: list[Plot] = field(default_factory=list)
    wide: bool = True  # one plot in a row; False: as many small plots as fit
    more: list[Plot] = field(default_factory=list)  # folded away
    table: str = ""  # the name of a table in the template

    @property
    def anchor(self) -> str:
        return "-".join(self.title.lower().replace(",", "").split())


def sections(view: View) -> list[Section]:
    """The sections of the page in order, without the empty ones."""
    return list(filter(None, (build(view) for build in BUILDERS)))


def at_a_glance(view: View) -> Section | None:
    if not _has_rewards(view):
        return None
    plots = []
    if _anybody_gained(view):
        plots.append(
            Plot(
                figures.gain_from_first_to_last(view),
                "Who gained",
                "A dot right of zero is a preference group whose rewards rose, measured in the standard deviation of "
                "its own rewards, so that groups with different scales can be compared. Bars are standard errors.",
            )
        )
    sentence = "Mean reward in the first and in the last quarter of the steps."
    return Section("At a glance", sentence, plots, table="summary")


def how_the_runs_differ(view: View) -> Section | None:
    sentence = "Settings and versions that differ between runs. All others are the same."
    return Section("How the runs differ", sentence, table="differences") if view.several else None


def reward(view: View) -> Section | None:
    if not _anybody_gained(view):
        return None
    plot = Plot(
        figures.gain_over_steps(view),
        "Reward gained since the first quarter",
        "Running means; zero is a preference group's mean in the first quarter of the steps, and one is the standard "
        "deviation of its own rewards. The thick line gained least. Click a name to hide its line.",
    )
    return Section("Reward per preference group", "", [plot])


def reward_panels(view: View) -> Section | None:
    if not _has_rewards(view):
        return None
    if view.several:
        sentence = "Running means of the reward, a line per run."
    else:
        sentence = (
            "A dot is the mean of one step, larger for more samples; the line is a running mean, the band the "
            "standard deviation of the rewards around it."
        )
    panels = []
    for name in view.drawn:
        has = [run for run in view.runs if name in run.run.pref_groups]
        worst = [run for run in has if run.worst == name]
        panels.append(
            Plot(
                figures.reward_panel(view, name),
                name,
                colour=view.colour(name),
                badge=f"only in {_names(has)}" if len(has) < len(view.runs) else "",
                worst=("gained least" + (f" in {_names(worst)}" if view.several else "")) if worst else "",
            )
        )
    if view.total > len(view.drawn):
        others = f"the other {view.total - len(view.drawn):,}"
        panels.append(Plot(figures.others_panel(view), others, "10, 50 and 90 % of them", colour=figures.GREY))
    return Section("Rewards, each on its own scale", sentence, panels, wide=False)


def _has_rewards(view: View) -> bool:
    """False for preference training, which has losses instead."""
    return any(np.isfinite(run.run.value("reward_mean")).any() for run in view.runs)


def _anybody_gained(view: View) -> bool:
    """Whether there is a gain to show. It may be negative."""
    return any(np.isfinite(run.summary.gain).any() for run in view.runs)


def _names(runs: list[RunView]) -> str:
    return ", ".join(run.run.name for run in runs)


def before_and_after(view: View) -> Section | None:
    if not any(len(run.run.samples.step) for run in view.runs):
        return None
    sentence = (
        "Answers recorded early and late in the run, to the same prompt if one was recorded in both halves; "
        "otherwise the earliest and the latest."
    )
    return Section("Before and after", sentence, table="samples")


def advantages(view: View) -> Section | None:
    sentence = "The numbers that the estimator made from the rewards; running means over samples."
    return _metrics(view, "Advantages", sentence, ADVANTAGES, figures.metric)


def history(view: View) -> Section | None:
    sentence = "What the estimator remembers about each preference group, after each step with samples of the group."
    return _metrics(view, "History", sentence, HISTORY, figures.state)


def shares(view: View) -> Section | None:
    if not view.total:
        return None
    sentence = "The part of all samples that belongs to each preference group, over a running window of steps."
    return Section("Shares", sentence, [Plot(figures.share(view))])


def weights(view: View) -> Section | None:
    return _metrics(view, "Weights", "", WEIGHTS, figures.state)


def other_group_metrics(view: View) -> Section | None:
    keys = list({key: None for run in view.runs for key in run.run.values if key not in SHOWN_ELSEWHERE})
    sentence = "Running means over samples, or over the pairs of an evaluation."
    return _metrics(view, "More per preference group", sentence, keys, figures.metric)


def the_whole_batch(view: View) -> Section | None:
    keys = [key for key in _train_keys(view) if not key.startswith("timing/")]
    known = [Plot(figures.train_panel(view, key), title) for key, title in TRAIN_METRICS.items() if key in keys]
    more = [Plot(figures.train_panel(view, key), key) for key in sorted(keys) if key not in TRAIN_METRICS]
    sentence = "The host's numbers of each step, all preference groups together: faint as recorded, and smoothed."
    return Section("The whole batch", sentence, known, wide=False, more=more) if known or more else None


def timings(view: View) -> Section | None:
    keys = [key for key in _train_keys(view) if key.startswith("timing/")]
    if not keys:
        return None
    if view.several:
        figure, sentence = figures.timing_by_run, "The mean step of each run."
    else:
        figure, sentence = figures.timing_over_steps, "The seconds of each part of a step."
    plots = [Plot(figure(view))] if any(key in figures.PARTS for key in keys) else []
    more = [Plot(figures.train_panel(view, key), f"{key.removeprefix('timing/')}, seconds") for key in sorted(keys)]
    return Section("Timings", sentence, plots, more=more)


def settings(view: View) -> Section:
    return Section("Settings and versions", "As the run recorded them.", table="settings")


BUILDERS: tuple[Callable[[View], Section | None], ...] = (
    at_a_glance,
    how_the_runs_differ,
    reward,
    reward_panels,
    before_and_after,
    advantages,
    history,
    shares,
    weights,
    other_group_metrics,
    the_whole_batch,
    timings,
    settings,
)


def _metrics(view: View, title: str, sentence: str, keys, figure) -> Section | None:
    known = [key for key in keys if any(np.isfinite(run.run.value(key)).any() for run in view.runs)]
    plots = [Plot(figure(view, key), *GROUP_METRICS.get(key, (key, ""))) for key in known]
    return Section(title, sentence, plots) if plots else None


def _train_keys(view: View) -> list[str]:
    return list({key: None for run in view.runs for key in run.run.train})
