"""Our flags on the host's own parser."""

from dataclasses import dataclass

import pytest

from openrlhf_pgrpo.core import estimator as registry
from openrlhf_pgrpo.core import pgrpo
from openrlhf_pgrpo.host.flags import nest
from openrlhf_pgrpo.host.ppo import estimators, flags

pytestmark = pytest.mark.host

GROUP = ("--data.pref_group_key", "persona")
PGRPO = ("--advantage_estimator", "pgrpo", *GROUP)


@pytest.mark.parametrize("flag", ["--advantage_estimator", "--algo.advantage.estimator"])
@pytest.mark.parametrize("name", ["pgrpo", "pgrpo_eb", "pgrpo_global", "pref_group_norm"])
def test_both_flags_accept_our_names(host_args, flag, name):
    args = host_args(flag, name, *GROUP, "--rollout.n_samples_per_prompt", "2")
    assert args.algo.advantage.estimator == name and args.data.pref_group_key == "persona"


def test_without_our_flags_the_host_is_as_it_was(host_parser, host_args):
    from openrlhf.utils.config import hierarchize

    ours, host = host_args(), hierarchize(host_parser().parse_args([]))
    del ours.pgrpo, ours.robust, ours.trust_remote_code, ours.reward.unknown_user, ours.reward.profiles
    del ours.reward.chat_template
    del ours.data.pref_group_key, ours.data.user_key, ours.logger.metrics_path
    ours.ckpt.output_dir = host.ckpt.output_dir
    assert ours == host


def test_help_lists_everything(host_parser):
    parser = host_parser()
    flags.extend(parser)
    text = parser.format_help()
    for flag in ("update", "half_life", "eps", "min_count", "center", "plugin", "device", "fresh_history"):
        assert f"--pgrpo.{flag}" in text
    assert "--data.pref_group_key" in text and "--data.user_key" in text and "--logger.metrics_path" in text
    assert "--advantage_estimator" in text and "pgrpo_eb" in text


REFUSALS = {
    "pgrpo needs --data.pref_group_key, got none": ("--advantage_estimator", "pgrpo"),
    "needs --rollout.n_samples_per_prompt >= 2, got 1": (*PGRPO, "--pgrpo.center", "prompt"),
    "--pgrpo.eps needs a finite number >= 0, got -1.0": ("--pgrpo.eps", "-1"),
    "--pgrpo.half_life needs a positive number": ("--pgrpo.half_life", "0"),
    "levels the history off at 2.9 samples": ("--pgrpo.half_life", "2"),
    "--pgrpo.min_count needs a finite number >= 2, got 1.0": ("--pgrpo.min_count", "1"),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_bad_values_are_refused(host_args, message):
    with pytest.raises(ValueError) as refusal:
        host_args(*REFUSALS[message])
    assert message in str(refusal.value)


WITHOUT_EFFECT = {
    "--pgrpo.half_life needs --advantage_estimator pgrpo or pgrpo_global or .*, got group_norm": (
        *("--advantage_estimator", "group_norm", "--rollout.n_samples_per_prompt", "2", "--pgrpo.half_life", "64"),
    ),
    "--pgrpo.min_count, --pgrpo.center needs .*, got gae": ("--pgrpo.min_count", "5", "--pgrpo.center", "prompt"),
    "--pgrpo.update needs .*, got group_norm": (
        *("--advantage_estimator", "group_robust", *GROUP, "--pgrpo.update", "after"),
    ),
    "--robust.reference_samples needs --robust.signal excess, got quantiles": (
        *("--advantage_estimator", "pgrpo_robust", *GROUP, "--robust.reference_samples", "8"),
    ),
    "--robust.improvement_lambda needs --robust.signal improvement, got quantiles": (
        *("--advantage_estimator", "pgrpo_robust", *GROUP, "--robust.improvement_lambda", "0.2"),
    ),
    "--robust.mu needs --robust.chi below 1, got 1.0, with which it does nothing": (
        *("--advantage_estimator", "pgrpo_robust", *GROUP, "--robust.mu", "share"),
    ),
    "--robust.eta needs --robust.chi above 0, got 0.0, with which it does nothing": (
        *("--advantage_estimator", "pgrpo_robust", *GROUP, "--robust.eta", "5", "--robust.chi", "0"),
    ),
    "--robust.outliers needs --robust.signal quantiles or excess or improvement, got bounds": (
        *("--advantage_estimator", "pgrpo_robust", *GROUP, "--robust.outliers", "clip"),
        *("--robust.signal", "bounds", "--robust.bounds", "[0, 1]"),
    ),
    "--pgrpo.fresh_history needs --ckpt.load_enable, got a new run": (*PGRPO, "--pgrpo.fresh_history"),
    "--pgrpo.fresh_history needs an estimator that remembers rewards, got gae": (
        *("--pgrpo.fresh_history", "--ckpt.load_enable"),
    ),
    "--pgrpo.fresh_history needs an estimator that remembers rewards, got pref_group_norm": (
        *("--advantage_estimator", "pref_group_norm", *GROUP, "--pgrpo.fresh_history", "--ckpt.load_enable"),
    ),
}


@pytest.mark.parametrize("message", WITHOUT_EFFECT)
def test_d18_a_flag_that_would_do_nothing_is_refused(host_args, message):
    """Half-lives beside an estimator of the host, histories that nobody reads, references that nobody asks for."""
    with pytest.raises(ValueError, match=message):
        host_args(*WITHOUT_EFFECT[message])


def test_d18_the_base_of_a_robust_estimator_takes_its_options(host_args):
    """They belong to pgrpo, which is the base of pgrpo_robust."""
    args = host_args("--advantage_estimator", "pgrpo_robust", *GROUP, "--pgrpo.half_life", "64")
    assert args.pgrpo.half_life == 64
    assert host_args("--advantage_estimator", "group_robust", *GROUP, "--pgrpo.fresh_history", "--ckpt.load_enable")


@pytest.mark.parametrize("name", ["pgrpo_global", "group_norm"])
def test_users_need_no_preference_group(host_args, name):
    args = host_args("--advantage_estimator", name, "--data.user_key", "who")
    assert args.data.user_key == "who" and args.data.pref_group_key is None


def test_argparse_refuses_a_name_nobody_registered(host_args, capsys):
    with pytest.raises(SystemExit):
        host_args("--advantage_estimator", "pgrpoo")
    assert "invalid choice: 'pgrpoo'" in capsys.readouterr().err


def test_a_plugin_brings_its_own_name(host_args, tmp_path, monkeypatch):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from openrlhf_pgrpo.core.estimator import AdvantageEstimator, register_advantage_estimator\n"
        "@register_advantage_estimator('mine')\n"
        "class Mine(AdvantageEstimator):\n"
        "    uses_pref_groups = False\n"
    )
    monkeypatch.setattr(registry, "_estimators", dict(registry._estimators))
    monkeypatch.chdir(tmp_path)
    registry.load_plugin("mine.py")
    args = host_args("--advantage_estimator", "mine", "--pgrpo.plugin", "mine.py")
    assert args.pgrpo.plugin == str(plugin)  # a Ray worker has another working directory
    assert type(estimators.make_estimator(args)).__name__ == "Mine"


@pytest.mark.parametrize("name", ["rloo", "group_robust"])
def test_a_name_of_the_host_or_of_a_robust_estimator_cannot_be_taken(name, host_parser, monkeypatch):
    monkeypatch.setattr(registry, "_estimators", dict(registry._estimators))
    registry.register_advantage_estimator(name)(registry.AdvantageEstimator)
    with pytest.raises(ValueError, match=f"a name that is not in use, got {name}"):
        flags.extend(host_parser())


PLUGIN = """
from dataclasses import dataclass
from typing import Literal

import numpy as np

from openrlhf_pgrpo import AdvantageEstimator, register_advantage_estimator


@dataclass(frozen=True)
class ClipOptions:
    limit: float = 3.0
    side: Literal["both", "upper"] = "both"
    strict: bool = False
    first: int | None = None

    def __post_init__(self):
        if self.limit <= 0:
            raise ValueError(f"limit needs a number above 0, got {self.limit}")


@register_advantage_estimator("clip", options=ClipOptions)
class Clip(AdvantageEstimator):
    uses_pref_groups = False

    def __call__(self, batch):
        return np.clip(batch.rewards, -self.options.limit, self.options.limit)
"""


@pytest.fixture
def clip(tmp_path, monkeypatch):
    """An estimator with options of its own, as a user's file registers it."""
    monkeypatch.setattr(registry, "_estimators", dict(registry._estimators))
    monkeypatch.setattr(registry, "_option_classes", registry.option_classes())
    (tmp_path / "clip.py").write_text(PLUGIN)
    registry.load_plugin(str(tmp_path / "clip.py"))
    return ("--advantage_estimator", "clip")


def test_an_estimator_brings_its_options(host_args, clip):
    args = host_args(*clip, "--clip.limit", "2", "--clip.side", "upper", "--clip.strict", "--clip.first", "7")
    options = estimators.make_estimator(args).options
    assert (options.limit, options.side, options.strict, options.first) == (2.0, "upper", True, 7)
    defaults = estimators.make_estimator(host_args(*clip)).options
    assert (defaults.limit, defaults.side, defaults.strict, defaults.first) == (3.0, "both", False, None)


def test_its_options_are_checked(host_args, clip, capsys):
    with pytest.raises(ValueError, match="--clip.limit needs a number above 0, got -1.0"):
        host_args(*clip, "--clip.limit", "-1")
    with pytest.raises(SystemExit):
        host_args(*clip, "--clip.side", "lower")
    assert "argument --clip.side: invalid choice: 'lower'" in capsys.readouterr().err


def test_its_options_are_settings_of_a_checkpoint(host_args, clip):
    settings = estimators.settings(host_args(*clip, "--clip.limit", "2"))
    assert settings["clip.limit"] == 2.0 and not [name for name in settings if name.startswith("pgrpo.")]


def test_the_options_of_an_estimator_need_a_namespace_of_their_own(host_parser, monkeypatch):
    monkeypatch.setattr(registry, "_estimators", dict(registry._estimators))
    monkeypatch.setattr(registry, "_option_classes", registry.option_classes())
    options = dataclass(type("Options", (), {"limit": 3.0, "__annotations__": {"limit": float}}))
    registry.register_advantage_estimator("data", options=options)(type("Data", (registry.AdvantageEstimator,), {}))
    with pytest.raises(ValueError, match="needs a name that begins no flag, got data"):
        flags.extend(host_parser())


def test_options_may_extend_ours_with_a_plain_field(host_parser, monkeypatch):
    monkeypatch.setattr(registry, "_estimators", dict(registry._estimators))
    monkeypatch.setattr(registry, "_option_classes", registry.option_classes())

    @dataclass(frozen=True)
    class Wider(pgrpo.PGRPOOptions):
        limit: float = 3.0

    registry.register_advantage_estimator("wider", options=Wider)(type("Wide", (pgrpo.PGRPO,), {}))
    parser = host_parser()
    flags.extend(parser)
    words = ("--advantage_estimator", "wider", "--wider.limit", "2", "--wider.eps", "0.1", *GROUP)
    args = parser.parse_args(words)
    flags.check(args)
    options = estimators.make_estimator(nest(args)).options
    assert (options.limit, options.eps, options.update) == (2.0, 0.1, "before")
