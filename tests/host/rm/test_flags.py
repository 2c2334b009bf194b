"""Flags of the door that trains factorized reward models."""

import pytest

from openrlhf_pgrpo.host import doors
from openrlhf_pgrpo.host.rm import flags

pytestmark = pytest.mark.host

FACTORS = ("--reward.factors", 3, "--data.user_key", "user")


def test_flags_and_defaults(parse):
    args = parse(*FACTORS)
    assert (args.reward.factors, args.reward.l2, args.reward.coefficients_lr) == (3, 0.02, 0.01)
    assert args.reward.pooling is None and args.logger.metrics_path is None and args.data.preference_key is None
    assert args.ds.attn_implementation == "sdpa"
    assert parse(*FACTORS, "--reward.pooling", "mean").reward.pooling == "mean"
    assert parse().reward.factors is None
    assert flags.settings(args, "last") == {
        "reward.factors": 3,
        "reward.pooling": "last",
        "reward.l2": 0.02,
        "data.user_key": "user",
        "data.preference_key": None,
    }


REFUSED = {
    "--reward.factors needs a number of base rewards >= 1, got 0": ("--reward.factors", 0, "--data.user_key", "user"),
    "--reward.factors needs --data.user_key, got none": ("--reward.factors", 2),
    "--reward.l2 needs a finite number >= 0, got -1.0": (*FACTORS, "--reward.l2", -1),
    "--reward.l2 needs a finite number >= 0, got nan": (*FACTORS, "--reward.l2", "nan"),
    "--reward.coefficients_lr needs a finite number > 0, got 0.0": (*FACTORS, "--reward.coefficients_lr", 0),
    "argument --reward.pooling: invalid choice: 'first'": (*FACTORS, "--reward.pooling", "first"),
    "--reward.l2 needs --reward.factors, got none": ("--reward.l2", 0.1),
    "--ds.lora.rank 4 needs --reward.factors, got none": ("--ds.lora.rank", 4),
    "--data.user_key needs --reward.factors, got none": ("--data.user_key", "user"),
    "--logger.metrics_path needs --reward.factors, got none": ("--logger.metrics_path", "m.jsonl"),
    "--model.loss_type logexp needs the loss of one reward": (*FACTORS, "--model.loss_type", "logexp"),
    "--model.margin_loss_enable True needs a margin on one": (*FACTORS, "--model.margin_loss_enable"),
    "--optim muon needs a matrix for Muon": (*FACTORS, "--optim", "muon"),
    "--ds.load_in_4bit True needs adapters that stay apart from": (*FACTORS, "--ds.load_in_4bit"),
    "--model.margin_loss_enable needs --model.loss_type sigmoid, got logexp": (
        *("--model.margin_loss_enable", "--model.loss_type", "logexp"),
    ),
    # Old names, and abbreviations, which argparse would take.
    "--reward.metrics_path is now called --logger.metrics_path": (*FACTORS, "--reward.metrics_path", "m.jsonl"),
    "--reward.user_key is now called --data.user_key": ("--reward.factors", 3, "--reward.user_key=who"),
    "--reward.fact needs its whole name": ("--reward.fact", 3, "--data.user_key", "user"),
    "--data.user needs its whole name": ("--reward.factors", 3, "--data.user", "user"),
    "--pgrpo.dev needs its whole name": ("--pgrpo.dev", "cpu"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_values_are_a_usage_message(parse, capsys, message):
    with pytest.raises(SystemExit):
        parse(*REFUSED[message])
    assert f"error: {message}" in capsys.readouterr().err


def test_help_lists_everything(host_parser):
    parser = host_parser(doors.RM.script)
    doors.RM.extend(parser)
    text = parser.format_help()
    for flag in ("--reward.factors", "--reward.pooling", "--reward.l2", "--data.user_key", "--data.preference_key"):
        assert flag in text
    assert "--logger.metrics_path" in text and "--pgrpo.device" in text
