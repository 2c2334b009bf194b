"""Checkpoints are whole, replaced in the right order, and survive a save that fails. The engine writes one file."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from openrlhf_pgrpo.host import whole_checkpoints

pytestmark = pytest.mark.host

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
NO_SPACE_FOR_TORCH = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


@pytest.fixture
def engine():
    import deepspeed

    class Engine(deepspeed.DeepSpeedEngine):
        """Writes what DeepSpeed would write on the first rank; `failure` is raised after the first file."""

        def __init__(self):
            self.failure, self.seen = None, []

        def save_checkpoint(self, save_dir, tag, client_state, save_latest):
            whole = [path for path in Path(save_dir).parent.glob("*/weights") if path.parent.parent.name == "_actor"]
            self.seen.append({path.parent.name for path in whole})
            (Path(save_dir) / tag).mkdir()
            (Path(save_dir) / tag / "weights").write_text(client_state["content"])
            if self.failure:
                raise self.failure
            if save_latest:
                (Path(save_dir) / "latest").write_text(tag)

    return Engine.__new__(Engine), Engine.__init__


@pytest.fixture
def save(engine, tmp_path, monkeypatch):
    """Saves as the host's actor does, into `save.folder`; `save.by_the_host` does so without us."""
    from openrlhf.utils.deepspeed import deepspeed as module

    engine, init = engine
    init(engine)
    monkeypatch.setattr(module, "torch_dist_barrier_and_cuda_sync", lambda: None)
    monkeypatch.setattr(module, "gc", SimpleNamespace(collect=lambda: None))  # a third of a second for every save
    strategy = object.__new__(module.DeepspeedStrategy)
    strategy.args = SimpleNamespace()
    monkeypatch.setattr(module.DeepspeedStrategy, "is_rank_0", lambda strategy: True)
    ours = module.DeepspeedStrategy.save_ckpt
    hosts = ours.__wrapped__

    def save(step, content="", best=False, metric=None, most=3, gib=1000, method=ours, folder=tmp_path / "_actor"):
        tag = f"{'best_' if best else ''}global_step{step}"
        method(strategy, engine, str(folder), tag, most, gib, {"content": content}, metric_value=metric)

    save.engine, save.folder, save.by_the_host = engine, tmp_path / "_actor", hosts
    return save


def found(folder):
    return {path.name for path in folder.iterdir() if path.is_dir()}


def latest(folder):
    return (folder / "latest").read_text()


def test_the_older_one_goes_after_the_newer_one_is_whole(save):
    for step in (1, 2, 3):
        save(step, most=1)
    assert save.engine.seen == [set(), {"global_step1"}, {"global_step2"}]  # each was there while the next was written
    assert found(save.folder) == {"global_step3"} and latest(save.folder) == "global_step3"
    assert (save.folder / "global_step3" / "weights").is_file()


@pytest.mark.parametrize("failure", [NO_SPACE, NO_SPACE_FOR_TORCH])
def test_a_save_that_fails_leaves_the_one_before_and_is_explained(save, failure):
    save(1, "one", most=1)
    save.engine.failure = failure
    with pytest.raises(
        RuntimeError, match=r"global_step2 could not be written to .*_actor, where [\d.]+ GiB are free"
    ):
        save(2, "two", most=1)
    assert latest(save.folder) == "global_step1"
    assert (save.folder / "global_step1" / "weights").read_text() == "one" and "global_step2" not in found(save.folder)

    save.engine.failure = None
    save(2, "again", most=2)
    assert found(save.folder) == {"global_step1", "global_step2"} and latest(save.folder) == "global_step2"
    assert (save.folder / "global_step2" / "weights").read_text() == "again"


def test_the_death_of_another_rank_is_not_taken_for_a_full_disk(save):
    save.engine.failure = RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError, match="^Connection closed by peer$"):
        save(1)


def test_a_best_checkpoint_that_a_resume_would_load_outlives_a_failing_better_one(save):
    save(1, best=True)
    assert latest(save.folder) == "best_global_step1"
    save.engine.failure = NO_SPACE
    with pytest.raises(RuntimeError, match="could not be written"):
        save(2, best=True)
    assert latest(save.folder) == "best_global_step1" and found(save.folder) >= {"best_global_step1"}
    save.engine.failure = None
    save(3, best=True)
    assert latest(save.folder) == "best_global_step3" and found(save.folder) == {"best_global_step3"}


def test_a_run_into_the_folder_of_an_older_one_replaces_its_checkpoint(save):
    save(1, "old")
    save(1, "new")
    assert (save.folder / "global_step1" / "weights").read_text() == "new"
    assert found(save.folder) == {"global_step1"}


def test_the_newest_stays_however_low_its_metric(save):
    for step, metric in ((1, 0.9), (2, 0.8), (3, 0.1)):
        save(step, metric=metric, most=2)
    assert found(save.folder) == {"global_step1", "global_step3"} and latest(save.folder) == "global_step3"


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("metrics", [(None,) * 6, (0.5, 0.6, 0.7, 0.8, 0.9, 1.0), (None, 0.2, None, 0.4, 0.5, 0.6)])
def test_what_remains_is_what_the_host_keeps(save, most, metrics, tmp_path):
    """With metrics that never make the host delete the newest."""
    hosts = tmp_path / "host" / "_actor"
    for step, metric in enumerate(metrics):
        for best in (True, False) if step in (1, 4) else (False,):
            save(step, best=best, metric=metric, most=most)
            save(step, best=best, metric=metric, most=most, method=save.by_the_host, folder=hosts)
            assert found(save.folder) == found(hosts) and latest(save.folder) == latest(hosts)


def test_room_is_made_when_all_together_are_too_large(save):
    for step in (1, 2, 3):
        save(step, "x" * 2**20, gib=2.5 / 1024)
    assert found(save.folder) == {"global_step2", "global_step3"}


@pytest.mark.parametrize("name", ["exp_of_a_colleague", "global_step1_hf", "best_hf", "global_step", "unfinished"])
def test_b2_folders_of_others_are_neither_counted_nor_deleted(save, name):
    save(1)
    (save.folder / name).mkdir()
    (save.folder / name / "thesis").write_text("x" * 2**20)
    for step in (2, 3, 4):
        save(step, most=2, gib=0.5 / 1024)  # theirs alone is larger
        save(step, best=True)
    assert found(save.folder) == {name, "global_step3", "global_step4", "best_global_step4"}
    assert (save.folder / name / "thesis").exists()


def test_b2_links_are_not_followed(save, tmp_path):
    (tmp_path / "theirs").mkdir()
    save(1)
    (save.folder / "global_step0").symlink_to(tmp_path / "theirs")
    for step in (2, 3):
        save(step, most=1)
    assert (tmp_path / "theirs").is_dir() and found(save.folder) == {"global_step0", "global_step3"}


def test_every_way_into_the_host_saves_whole_checkpoints():
    from openrlhf.utils.deepspeed.deepspeed import DeepspeedStrategy

    assert DeepspeedStrategy.save_ckpt._self_wrapper is whole_checkpoints.save_whole
