"""An engine is sent a reference to the tokenizer, and builds it once."""

import pickle
from types import SimpleNamespace as Space

import pytest

pytestmark = pytest.mark.host


class Words(dict):
    """A tokenizer."""


class Engine:
    """A rollout engine that keeps the arguments of its calls, in the place of Ray."""

    def __init__(self):
        self.calls = []
        self.get_num_unfinished_requests = Space(remote=lambda: 0)
        self.generate_responses = Space(remote=lambda **call: self.calls.append(call))


@pytest.fixture
def dispatch(monkeypatch, host_args):
    """Sends two prompts at a time, with a tokenizer; gives what the engine was sent and what the store holds."""
    from openrlhf.trainer.ppo_utils import samples_generator

    engine, store = Engine(), []
    monkeypatch.setattr(
        samples_generator, "ray", Space(get=lambda values: values, put=lambda value: store.append(value) or len(store))
    )

    def dispatch(*tokenizers, args=None):
        strategy = Space(args=args or host_args("--advantage_estimator", "pgrpo", "--data.pref_group_key", "persona"))
        generator = samples_generator.SamplesGenerator(strategy, None, None, None, [engine])
        for tokenizer in tokenizers:
            generator.tokenizer = tokenizer
            generator._dispatch_prompts_to_vllm(["a", "b"], ["", ""])
            assert generator.tokenizer is tokenizer
        return [call["hf_tokenizer"] for call in engine.calls], store

    return dispatch


def test_calls_name_the_one_tokenizer_in_the_store(dispatch):
    one, other = Words(a=1), Words(b=2)
    sent, store = dispatch(one, one, other)
    assert sent == [1, 1, 1, 1, 2, 2] and len(store) == 2


def test_a_process_builds_each_tokenizer_once(dispatch):
    first, second = dispatch(Words(a=1), Words(b=2))[1]
    arrived = [pickle.loads(pickle.dumps(sent)) for sent in (first, first, second)]
    assert arrived[0] is arrived[1] and [type(one) for one in arrived] == [Words] * 3
    assert [dict(one) for one in arrived] == [{"a": 1}, {"a": 1}, {"b": 2}]


def test_runs_that_came_through_no_door_send_what_the_host_sends(dispatch, host_args):
    args, tokenizer = host_args("--advantage_estimator", "reinforce"), Words(a=1)
    del args.pgrpo
    sent, store = dispatch(tokenizer, args=args)
    assert sent == [tokenizer, tokenizer] and store == []
