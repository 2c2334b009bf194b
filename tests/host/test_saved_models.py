"""A run that made no update leaves no model, and ends with an error; what is saved can be read as the umask says."""

from types import SimpleNamespace

import pytest

from openrlhf_pgrpo.host import saved_models

pytestmark = pytest.mark.host


def engine(steps, skipped=0, average=False):
    return SimpleNamespace(global_steps=steps, skipped_steps=skipped, optimizer=None if average else "adam")


@pytest.fixture
def save(tmp_path):
    """Saves as the host does at the end of a run, or in the middle. Returns what was printed."""

    def save(model, folder="out", averaged=0, resumed=False):
        printed = []
        strategy = SimpleNamespace(
            args=SimpleNamespace(ckpt=SimpleNamespace(output_dir=str(tmp_path / "out"))),
            time_steps={"ema": averaged},
            resumed=resumed,
            print=printed.append,
            is_rank_0=lambda: True,
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


@pytest.mark.parametrize("model, averaged", [(engine(1), 0), (engine(3, 2), 0), (engine(0, average=True), 1)])
def test_a_trained_model_is_saved(save, tmp_path, model, averaged):
    assert save(model, averaged=averaged) == [] and (tmp_path / "out" / "model.safetensors").exists()


def test_a8_a_copy_in_the_middle_is_left_out_until_there_was_an_update(save, tmp_path):
    (said,) = save(engine(0), folder="global_step1_hf")
    assert "no update has been made yet" in said and not (tmp_path / "global_step1_hf").exists()


def test_a10_the_average_of_a_complete_run_that_is_started_again_stays(save, tmp_path):
    (said,) = save(engine(0, average=True), resumed=True)
    assert "stays as it is" in said and not (tmp_path / "out").exists()


def test_e2_weights_get_the_mode_of_the_other_files(save, tmp_path):
    save(engine(1))
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {
        (tmp_path / "out" / "config.json").stat().st_mode & 0o777
    }
