"""The estimator's state in the host's checkpoints."""

import numpy as np
import pytest

from openrlhf_pgrpo.host.resume import KEY

pytestmark = pytest.mark.host

N = 4
STOCK_RUN = ("--rollout.n_samples_per_prompt", str(N), "--data.pref_group_key", "persona")
RUN = (*STOCK_RUN, "--pgrpo.min_count", "4")


@pytest.fixture
def trained(host_args, make_maker, make_experiences):
    """A maker after two steps, for a command line."""

    def train(*argv):
        maker = make_maker(host_args(*argv, *(STOCK_RUN if "group_norm" in argv else RUN)))
        for step in range(2):
            maker.compute_advantages_and_returns(make_experiences(np.random.default_rng(step).normal(size=(6, N))))
        return maker

    return train


def save(maker, **client_states):
    maker.actor_model_group.async_run_method("save_checkpoint", client_states=client_states)
    return maker.actor_model_group.saved


def resume(maker, saved):
    maker.actor_model_group.saved = saved
    return maker.actor_model_group.async_run_method(method_name="get_checkpoint_states")


@pytest.mark.parametrize("name", ["pgrpo", "pgrpo_eb", "pgrpo_global"])
def test_a_resumed_run_goes_on_bit_by_bit(name, trained, host_args, make_maker, make_experiences):
    maker = trained("--advantage_estimator", name)
    saved = save(maker, global_step=2)
    assert saved["global_step"] == 2  # the host's own states stay
    resumed = make_maker(host_args("--advantage_estimator", name, *RUN))
    resume(resumed, saved)

    def step(maker):
        return maker.compute_advantages_and_returns(make_experiences(np.ones((6, N)) + np.arange(N)))

    for one, other in zip(step(maker), step(resumed), strict=True):
        assert (one.advantages == other.advantages).all()


@pytest.mark.parametrize("name", ["pgrpo", "group_norm"])
def test_an_adapted_kl_coefficient_goes_on(name, trained, host_args, make_maker):
    maker = trained("--advantage_estimator", name, "--algo.kl.target", "6")
    maker.kl_ctl.value = 0.03
    saved = save(maker)
    run = ("--advantage_estimator", name, *(STOCK_RUN if name == "group_norm" else RUN))
    resumed = make_maker(host_args(*run, "--algo.kl.target", "6"), kl_coef=0.01)
    fixed = make_maker(host_args(*run), kl_coef=0.01)
    for one in (resumed, fixed):
        resume(one, saved)
    assert (resumed.kl_ctl.value, fixed.kl_ctl.value) == (0.03, 0.01)


def test_the_saved_state_is_a_copy(trained, make_experiences):
    maker = trained("--advantage_estimator", "pgrpo")
    saved = save(maker)
    before = saved[KEY]["estimator"]["history"]["mean"].copy()
    maker.compute_advantages_and_returns(make_experiences(np.full((6, N), 9.0)))
    assert (saved[KEY]["estimator"]["history"]["mean"] == before).all()


def test_the_hosts_dictionary_is_not_written_to(trained):
    maker, states = trained("--advantage_estimator", "pgrpo"), {"episode": 1}
    maker.actor_model_group.async_run_method("save_checkpoint", client_states=states)
    assert states == {"episode": 1}


def test_other_settings_are_refused_with_both_values(trained, host_args, make_maker):
    saved = save(trained("--advantage_estimator", "pgrpo"))
    other = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN, "--pgrpo.half_life", "64"))
    with pytest.raises(ValueError, match=r"--pgrpo.half_life None in the checkpoint, 64.0 now.*--pgrpo.fresh_history"):
        resume(other, saved)
    assert len(other.estimator.history) == 0


def test_another_estimator_is_refused(trained, host_args, make_maker):
    saved = save(trained("--advantage_estimator", "pgrpo"))
    other = make_maker(host_args("--advantage_estimator", "pgrpo_eb", *RUN))
    with pytest.raises(ValueError, match="advantage_estimator 'pgrpo' in the checkpoint, 'pgrpo_eb' now"):
        resume(other, saved)


def test_an_unknown_schema_is_refused(trained, host_args, make_maker):
    saved = save(trained("--advantage_estimator", "pgrpo"))
    saved[KEY]["schema"] = 99
    with pytest.raises(ValueError, match="the state of pgrpo in schema 2, got schema 99"):
        resume(make_maker(host_args("--advantage_estimator", "pgrpo", *RUN)), saved)


def test_a_checkpoint_without_history_is_refused_unless_asked_for(host_args, make_maker):
    maker = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN))
    with pytest.raises(ValueError, match="got one without: .* or pass --pgrpo.fresh_history"):
        resume(maker, {"global_step": 3})
    fresh = make_maker(
        host_args("--advantage_estimator", "pgrpo", *RUN, "--pgrpo.fresh_history", "--ckpt.load_enable")
    )
    assert resume(fresh, {"global_step": 3}) == [{"global_step": 3}]


def test_fresh_history_leaves_the_saved_one_aside(trained, host_args, make_maker):
    saved = save(trained("--advantage_estimator", "pgrpo"))
    fresh = make_maker(
        host_args("--advantage_estimator", "pgrpo_eb", *RUN, "--pgrpo.fresh_history", "--ckpt.load_enable")
    )
    resume(fresh, saved)
    assert len(fresh.estimator.history) == 0


def test_stock_estimators_resume_from_any_checkpoint(trained, host_args, make_maker):
    saved = save(trained("--advantage_estimator", "pgrpo"))
    stock = make_maker(host_args("--advantage_estimator", "group_norm", *STOCK_RUN))
    resume(stock, saved)
    resume(stock, {"global_step": 1})
    assert save(stock)[KEY]["settings"] == {"advantage_estimator": "group_norm"}


def test_a_stock_checkpoint_is_refused_for_pgrpo_with_both_names(trained, host_args, make_maker):
    saved = save(trained("--advantage_estimator", "group_norm"))
    with pytest.raises(ValueError, match="'group_norm' in the checkpoint, 'pgrpo' now"):
        resume(make_maker(host_args("--advantage_estimator", "pgrpo", *RUN)), saved)


def test_d1_without_a_whole_checkpoint_the_run_starts_anew(host_args, make_maker):
    """The host's trainer asks for the states of a checkpoint that its actors did not find."""
    maker = make_maker(host_args("--advantage_estimator", "pgrpo", *RUN))
    (states,) = resume(maker, {})
    assert states == {"episode": 0, "global_step": 0, "total_consumed_prompts": 0, "data_loader_state_dict": {}}
