"""What the host's script asserts is refused before it starts, with a sentence."""

import argparse
import ast
import importlib.metadata
import runpy

import pytest

from openrlhf_pgrpo.host.ppo import assertions
from openrlhf_pgrpo.host.script import path_of

pytestmark = pytest.mark.host

SCRIPT = "openrlhf.cli.train_ppo_ray"
FINE = (
    "--rollout.n_samples_per_prompt 2 --vllm.num_engines 1 --reward.remote_url reward.py "
    "--actor.model_name_or_path policy"
).split()
FILTERING = "--algo.dynamic_filtering_enable"
REFUSED = {
    "group_norm needs --rollout.n_samples_per_prompt of at least 2, got 1": (
        *("--advantage_estimator", "group_norm", "--rollout.n_samples_per_prompt", "1"),
    ),
    "group_robust, whose base is group_norm, needs --rollout.n_samples_per_prompt of at least 2": (
        *("--advantage_estimator", "group_robust", "--data.pref_group_key", "persona"),
        *("--rollout.n_samples_per_prompt", "1"),
    ),
    "is_correction_threshold needs HIGH or LOW HIGH, got 3": (
        *("--algo.advantage.is_correction_threshold", "1", "2", "3"),
    ),
    "needs an estimator without a critic, got gae": ("--data.max_images_per_prompt", "1"),
    "needs samples in rows of their own": (
        *("--data.max_images_per_prompt", "1", "--advantage_estimator", "rloo", "--ds.packing_samples"),
    ),
    "needs engines that stay awake": ("--train.async_enable", "--vllm.enable_sleep", "--train.colocate_all"),
    "--train.partial_rollout_enable needs --train.async_enable": ("--train.partial_rollout_enable",),
    "--eval.dataset needs rewards of": ("--eval.dataset", "rows.jsonl", "--reward.remote_url", ""),
    "above --rollout.batch_size needs --train.async_enable, got 9 and 4": (
        *("--rollout.vllm_generate_batch_size", "9", "--rollout.batch_size", "4"),
    ),
    "needs a lower and a higher number, got 1.0 0.0": (FILTERING, "--algo.dynamic_filtering_range", "1", "0"),
    "got a local reward model: leave it out, or change": (FILTERING, "--reward.remote_url", ""),
    "got 1 answer: leave it out, or change these": (FILTERING, "--rollout.n_samples_per_prompt", "1"),
}
ELSEWHERE = 2  # engines for packed samples (`look.ppo`), and batches for every rank (`plan.ppo`)
newest = pytest.mark.skipif(importlib.metadata.version("openrlhf") != "0.11.2", reason="asserts other things")


def parsed(host_parser, words):
    """The flat namespace of a command."""
    from openrlhf_pgrpo.host.ppo import flags

    parser = host_parser()
    flags.extend(parser)
    args = parser.parse_args([*FINE, *words])
    flags.check(args)
    return args


@newest
@pytest.mark.parametrize("sentence, words", REFUSED.items())
def test_what_the_host_asserts_is_a_sentence(sentence, words, host_parser, tiny, monkeypatch):
    from openrlhf.utils.config import hierarchize

    args = parsed(host_parser, (*words, "--reward.model_name_or_path", str(tiny / "model")))
    with pytest.raises(ValueError) as refusal:
        assertions.check(hierarchize(args))
    assert sentence in str(refusal.value)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self: args)
    with pytest.raises(AssertionError):
        runpy.run_module(SCRIPT, run_name="__main__")


@newest
def test_there_is_a_sentence_for_every_assertion():
    *_, run_as_script = ast.parse(path_of(SCRIPT).read_bytes()).body
    found = [node for node in ast.walk(run_as_script) if isinstance(node, ast.Assert)]
    both_about_samples = 1  # of a robust estimator, and of its base
    assert len(found) == len(REFUSED) - both_about_samples + ELSEWHERE


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--advantage_estimator", "pgrpo", "--data.pref_group_key", "persona", "--rollout.n_samples_per_prompt", "1"),
        ("--vllm.enable_sleep", "--train.async_enable"),  # the host takes it back
        ("--train.partial_rollout_enable", "--train.async_enable", "--rollout.vllm_generate_batch_size", "999"),
        (FILTERING, "--eval.dataset", "rows.jsonl"),
    ],
)
def test_what_the_host_takes_is_not_refused(words, host_args):
    assertions.check(host_args(*FINE, *words))
