"""A run that made no update leaves no model, and ends with an error; what is saved can be read as the umask says."""

from types import SimpleNamespace

import pytest
import torch

from openrlhf_pgrpo.host import saved_models

pytestmark = pytest.mark.host


def engine(steps, skipped=0, average=False, weights=()):
    return SimpleNamespace(
        global_steps=steps, skipped_steps=skipped, optimizer=None if average else "adam", parameters=lambda: weights
    )


@pytest.fixture
def save(tmp_path):
    """Saves as the host does at the end of a run, or in the middle. Returns what was printed."""

    def save(model, folder="out", averaged=0, elsewhere=0):
        printed = []
        strategy = SimpleNamespace(
            args=SimpleNamespace(ckpt=SimpleNamespace(output_dir=str(tmp_path / "out"))),
            time_steps={"ema": averaged},
            print=printed.append,
            is_rank_0=lambda: True,
            all_reduce=lambda number, op: max(number, elsewhere),
        )

        def host(model, tokenizer, output_dir, **kwargs):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "config.json").write_text("{}")
            weights = tmp_path / folder / "model.safetensors"
            weights.write_text("")
            weights.chmod(0o600)

        saved_models.save(host, strategy, (model, None, str(tmp_path / folder)), {})
        return printed

    return save


@pytest.mark.parametrize(
    "model, reason",
    [
        (engine(0), "were all samples filtered"),
        (engine(3, skipped=3), "3 steps were left out, because gradients were not finite"),
        (SimpleNamespace(model=engine(0)), "were all samples filtered"),  # the host's `Actor` around the engine
        (engine(0, average=True), "were all samples filtered"),
    ],
)
def test_a8_a_run_without_an_update_saves_nothing_and_fails(save, tmp_path, model, reason):
    with pytest.raises(RuntimeError, match=f"needs at least one update, got none .*{reason}.*nothing is saved to"):
        save(model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model, averaged", [(engine(1), 0), (engine(0, average=True), 1)])
def test_a_trained_model_is_saved(save, tmp_path, model, averaged):
    assert save(model, averaged=averaged) == [] and (tmp_path / "out" / "model.safetensors").exists()


def test_a12_updates_that_were_left_out_are_said_at_the_end(save, tmp_path):
    """DeepSpeed drops them silently: half of a run may have trained nothing."""
    (said,) = save(engine(6, skipped=3))
    assert "3 of 6 updates were left out, because their gradients were not finite" in said
    assert save(engine(6, skipped=3), folder="global_step6_hf") == []
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a8_a_copy_in_the_middle_is_left_out_until_there_was_an_update(save, tmp_path):
    (said,) = save(engine(0), folder="global_step1_hf")
    assert "no update has been made yet" in said and not (tmp_path / "global_step1_hf").exists()


def test_e2_weights_get_the_mode_of_the_other_files(save, tmp_path):
    save(engine(1))
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {
        (tmp_path / "out" / "config.json").stat().st_mode & 0o777
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("folder", ["out", "global_step2_hf"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_a12_weights_that_are_not_finite_are_never_saved(save, tmp_path, bad, folder, kind):
    """With bfloat16 DeepSpeed makes the update whatever the gradient is."""
    weights = [torch.full((300, 300), 500.0, dtype=kind), torch.ones(5, dtype=kind)]  # a sum beyond float16
    save(engine(2, weights=weights), folder="fine")
    weights[1][3] = bad
    with pytest.raises(
        RuntimeError, match="needs finite weights, got nan or inf after 2 updates: nothing is saved to"
    ):
        save(engine(2, weights=weights), folder=folder)
    assert not (tmp_path / folder).exists()


def test_a12_a_rank_looks_at_its_part_and_leaves_with_the_others(save, tmp_path):
    part = torch.ones(4)
    weight = SimpleNamespace(ds_tensor=part)  # what ZeRO-3 makes of a weight
    save(engine(2, weights=[weight]), folder="fine")
    with pytest.raises(RuntimeError, match="needs finite weights"):
        save(engine(2, weights=[weight]), elsewhere=1)
    part[0] = float("nan")
    with pytest.raises(RuntimeError, match="needs finite weights"):
        save(engine(2, weights=[weight]))
