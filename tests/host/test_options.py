"""Our flags on the host's own parser."""

import pytest

from openrlhf_pgrpo.core import registry
from openrlhf_pgrpo.host import options

pytestmark = pytest.mark.host

GROUP = ("--pgrpo.group_key", "persona")
PGRPO = ("--advantage_estimator", "pgrpo", *GROUP)


@pytest.mark.parametrize("flag", ["--advantage_estimator", "--algo.advantage.estimator"])
@pytest.mark.parametrize("name", ["pgrpo", "pgrpo_eb", "pgrpo_centered", "pgrpo_global", "pref_group_norm"])
def test_both_flags_accept_our_names(host_args, flag, name):
    args = host_args(flag, name, *GROUP, "--rollout.n_samples_per_prompt", "2")
    assert args.algo.advantage.estimator == name and args.pgrpo.group_key == "persona"


def test_without_our_flags_the_host_is_as_it_was(host_parser, host_args):
    from openrlhf.utils.config import hierarchize

    ours, host = host_args(), hierarchize(host_parser().parse_args([]))
    del ours.pgrpo, ours.robust, ours.reward.unknown_user, ours.reward.profiles
    ours.ckpt.output_dir = host.ckpt.output_dir
    assert ours == host


def test_help_lists_everything(host_parser):
    parser = host_parser()
    options.extend(parser)
    text = parser.format_help()
    for flag in ("group_key", "user_key", "update", "half_life", "variance", "eps", "min_count", "center", "plugin",
                 "device", "fresh_history", "metrics_path"):
        assert f"--pgrpo.{flag}" in text
    assert "--advantage_estimator" in text and "pgrpo_eb" in text


REFUSALS = {
    "pgrpo needs --pgrpo.group_key, got none": ("--advantage_estimator", "pgrpo"),
    "--pgrpo.user_key needs --pgrpo.group_key": ("--pgrpo.user_key", "who"),
    "needs --rollout.n_samples_per_prompt >= 2, got 1": (*PGRPO, "--pgrpo.center", "prompt"),
    "user_key needs --pgrpo.group_key": ("--advantage_estimator", "pgrpo_global", "--pgrpo.user_key", "who"),
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


def test_centered_needs_two_samples_whatever_the_flag_says(host_args):
    with pytest.raises(ValueError, match="pgrpo_centered .* needs --rollout.n_samples_per_prompt >= 2, got 1"):
        host_args("--advantage_estimator", "pgrpo_centered", *GROUP)


def test_argparse_refuses_a_name_nobody_registered(host_args, capsys):
    with pytest.raises(SystemExit):
        host_args("--advantage_estimator", "pgrpoo")
    assert "invalid choice: 'pgrpoo'" in capsys.readouterr().err


def test_a_plugin_brings_its_own_name(host_args, tmp_path, monkeypatch):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from openrlhf_pgrpo.core.registry import AdvantageEstimator, register_advantage_estimator\n"
        "@register_advantage_estimator('mine')\n"
        "class Mine(AdvantageEstimator):\n"
        "    uses_pref_groups = False\n"
    )
    monkeypatch.setattr(registry, "_estimators", registry.advantage_estimators())
    monkeypatch.chdir(tmp_path)
    registry.load_plugin("mine.py")
    args = host_args("--advantage_estimator", "mine", "--pgrpo.plugin", "mine.py")
    assert args.pgrpo.plugin == str(plugin)  # a Ray worker has another working directory
    assert type(options.make_estimator(args)).__name__ == "Mine"


@pytest.mark.parametrize("name", ["rloo", "group_robust"])
def test_a_name_of_the_host_or_of_a_robust_estimator_cannot_be_taken(name, host_parser, monkeypatch):
    monkeypatch.setattr(registry, "_estimators", registry.advantage_estimators())
    registry.register_advantage_estimator(name)(registry.AdvantageEstimator)
    with pytest.raises(ValueError, match=f"a name that is not in use, got {name}"):
        options.extend(host_parser())
