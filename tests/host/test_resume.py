"""A resume loads a checkpoint that is whole, or says that there is none and starts anew."""

import shutil
import zipfile
from types import SimpleNamespace

import pytest

from openrlhf_pgrpo.host import resume, whole_checkpoints

pytestmark = pytest.mark.host


def write(folder, tag, whole=True):
    (folder / tag).mkdir(parents=True)
    weights = folder / tag / "mp_rank_00_model_states.pt"
    if whole:
        with zipfile.ZipFile(weights, "w"):
            pass
    else:
        weights.write_bytes(b"PK\x03\x04 half")
    (folder / "latest").write_text(tag)


@pytest.fixture
def load(tmp_path):
    """The states that a rank gets from the host's `load_ckpt`, and what was printed."""

    def load():
        printed = []
        strategy = SimpleNamespace(use_ds_universal_ckpt=False, print=printed.append)

        def host(model, load_dir, tag=None):
            return load_dir, {"episode": 1}

        _, states = whole_checkpoints.load_whole(host, strategy, (None, str(tmp_path)), {})
        return states, printed

    return load


def test_d1_a_run_killed_in_its_first_checkpoint_starts_anew(load, tmp_path):
    (tmp_path / whole_checkpoints.UNFINISHED).mkdir()
    states, (said,) = load()
    assert states == {} and f"there is no complete checkpoint in {tmp_path}" in said and "starting anew" in said


@pytest.mark.parametrize("tag", ["global_step1", "best_global_step1"])
def test_d1_a_half_checkpoint_is_none(load, tmp_path, tag):
    write(tmp_path, tag, whole=False)
    assert load()[0] == {}


def test_d1_an_absent_checkpoint_is_none(load, tmp_path):
    (tmp_path / "latest").write_text("global_step3")
    assert load()[0] == {}


def test_d1_whole_ones_are_not_thrown_away_for_a_half_one(load, tmp_path):
    write(tmp_path, "global_step1")
    write(tmp_path, "global_step2", whole=False)
    with pytest.raises(ValueError, match="got 'global_step2', which is not whole; whole ones are global_step1: write"):
        load()


def test_a_whole_checkpoint_is_loaded(load, tmp_path):
    write(tmp_path, "global_step1")
    assert load() == ({"episode": 1}, [])


def test_b3_a_mistyped_path_is_named_with_what_is_found_there(tmp_path):
    (tmp_path / "exp1").mkdir()
    assert resume.nothing_to_load(tmp_path / "exp2" / "_actor") == (
        f"--ckpt.load_enable: there is no folder {tmp_path}/exp2/_actor ({tmp_path} holds exp1): starting anew"
    )


@pytest.mark.parametrize("trainer", ["ppo", "pairs"])
def test_b3_it_is_said_at_the_start(tmp_path, capsys, trainer):
    args = SimpleNamespace(
        ckpt=SimpleNamespace(load_enable=True, path=str(tmp_path / "exp2")), train=SimpleNamespace()
    )
    if trainer == "ppo":
        args.rollout = None
    strategy = SimpleNamespace(args=args, use_ds_universal_ckpt=False)
    whole_checkpoints.announce(lambda: None, strategy, (), {})
    assert f"there is no folder {tmp_path}/exp2" in capsys.readouterr().out
    args.ckpt.load_enable = False
    whole_checkpoints.announce(lambda: None, strategy, (), {})
    assert capsys.readouterr().out == ""


# ---- what a checkpoint does not hold --------------------------------------------------------------------------------


@pytest.fixture
def resume_ppo(tmp_path):
    """Begins PPO on the checkpoints in `tmp_path`, in the driver and on a rank of each model."""

    def resume_ppo(ema=False, estimator="pgrpo"):
        args = SimpleNamespace(
            ckpt=SimpleNamespace(load_enable=True, path=str(tmp_path)),
            train=SimpleNamespace(enable_ema=ema),
            algo=SimpleNamespace(advantage=SimpleNamespace(estimator=estimator)),
            rollout=None,
            pgrpo=None,
        )
        strategy = SimpleNamespace(args=args, use_ds_universal_ckpt=False, print=print)
        whole_checkpoints.announce(lambda: None, strategy, (), {})
        for part in ("_actor", "_critic")[: 1 + (estimator == "gae")]:
            whole_checkpoints.load_whole(
                lambda model, load_dir: (load_dir, {}), strategy, (None, str(tmp_path / part)), {}
            )

    return resume_ppo


def test_an_average_of_weights_is_not_resumed(resume_ppo, tmp_path):
    """No checkpoint holds it: after a resume, what was saved was mostly the untrained model."""
    (tmp_path / "_actor").mkdir()
    resume_ppo(ema=True)  # there is nothing yet
    write(tmp_path / "_actor", "global_step2")
    resume_ppo()
    with pytest.raises(
        ValueError, match="--train.enable_ema needs a run that begins anew, got a checkpoint to resume"
    ):
        resume_ppo(ema=True)


def test_policy_and_critic_go_on_from_one_step(resume_ppo, tmp_path, capsys):
    """A run that is killed between the two saves leaves a newer policy."""
    for part in ("_actor", "_critic"):
        (tmp_path / part).mkdir()
        write(tmp_path / part, "global_step2")
    resume_ppo(estimator="gae")
    write(tmp_path / "_actor", "global_step4")
    resume_ppo()  # without a critic, what lies beside does not matter
    with pytest.raises(
        ValueError, match="policy and critic of one step, got {'_actor': 'global_step4', '_critic': 'gl"
    ):
        resume_ppo(estimator="gae")
    (tmp_path / "_actor" / "latest").write_text("global_step2")
    resume_ppo(estimator="gae")
    capsys.readouterr()
    (tmp_path / "_actor" / "latest").write_text("global_step4")
    shutil.rmtree(tmp_path / "_actor" / "global_step2")  # --ckpt.max_num 1
    resume_ppo(estimator="gae")
    assert (
        "warning: policy and critic go on from different steps, {'_actor': 'global_step4'" in capsys.readouterr().out
    )
