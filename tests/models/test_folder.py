"""The folder of a factorized reward model: its files, its fingerprint, and what is refused."""

import errno
import fcntl
import json
import os
import shutil
from contextlib import suppress
from itertools import count
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from openrlhf_pgrpo.host import one_run
from openrlhf_pgrpo.models import folder as folders
from openrlhf_pgrpo.models import output_folder
from openrlhf_pgrpo.models.folder import Folder, write
from openrlhf_pgrpo.models.scoring import load

pytestmark = pytest.mark.core


def test_a_folder_is_plain_files(made):
    folder, _, _, pooling = made
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in ("base_rewards", "base_reward_users", "base_reward_pooling")} == {
        "base_rewards": 2,
        "base_reward_users": 3,
        "base_reward_pooling": pooling,
    }
    weights = load_file(folder / "model.safetensors")
    assert weights["score.weight"].shape == (2, 64) and weights["coefficients"].shape == (3, 2)
    assert {"model.embed_tokens.weight", "model.norm.weight"} < weights.keys()  # the host's names
    assert json.loads((folder / "users.json").read_text()) == ["ana", "Łukasz", "3"]
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl") or path.is_dir()]


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("name", ["users.json", "config.json", "model.safetensors", "tokenizer.json"])
def test_the_fingerprint_is_of_all_that_rewards_depend_on(made, tmp_path, name):
    mine = copied(made[0], tmp_path / "copy")
    assert Folder(mine).fingerprint == Folder(made[0]).fingerprint
    if name == "model.safetensors":
        weights = load_file(mine / name)
        weights["score.weight"][0, 0] += 1
        save_file(weights, mine / name, {"format": "pt"})
    else:
        (mine / name).write_text((mine / name).read_text() + "\n")
    assert Folder(mine).fingerprint != Folder(made[0]).fingerprint


def test_folders_that_do_not_fit_are_refused(made, backbone, tmp_path):
    with pytest.raises(ValueError, match="to be a factorized reward model, got a config.json without base_rewards"):
        load(backbone)
    other = copied(made[0], tmp_path / "users")
    (other / "users.json").write_text('["ana"]')
    with pytest.raises(ValueError, match=r"coefficients of shape \(1, 2\), .*, got \(3, 2\): its files are of diff"):
        load(other)
    lacking = copied(made[0], tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="needs all weights, got none for score.weight"):
        load(lacking)


GOOD = dict(head=np.ones((2, 64)), coefficients=np.ones((2, 2)), users=["a", "b"], pooling="last")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(head=np.ones((2, 63))), r"a head of shape \(D, 64\) and coefficients \(2, D\), got \(2, 63\)"),
        (dict(coefficients=np.ones((2, 3))), r"got \(2, 64\) and \(2, 3\)"),
        (dict(coefficients=np.ones((3, 2))), r"got \(2, 64\) and \(3, 2\)"),
        (dict(head=np.full((2, 64), np.nan)), "need finite numbers, got nan or inf"),
        (dict(users=["a", "a"]), "an id of their own, .*, got 'a'"),
        (dict(users=["a", ""]), "got ''"),
        (dict(users=["a", 2]), "got 2"),
        (dict(pooling="first"), "pooling needs to be last or mean, got 'first'"),
    ],
)
def test_what_does_not_fit_is_not_written(backbone, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "new", backbone, **{**GOOD, **change})
    assert not (tmp_path / "new").exists()


def test_writing_that_fails_leaves_the_old_folder(backbone, tmp_path, monkeypatch):
    write(tmp_path, backbone, **GOOD)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, backbone, **{**GOOD, "users": ["c", "d"]})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- how long a text may be ----


def with_config(folder: Path, to: Path, **change) -> Path:
    copied(folder, to)
    content = json.loads((to / "config.json").read_text()) | change
    (to / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return to


def test_a4_a_folder_knows_how_long_its_texts_may_be(made, tmp_path):
    """256 positions; a record of more is not believed, and a folder without one falls back to the positions."""
    folder = made[0]
    assert json.loads((folder / "config.json").read_text())["base_reward_max_length"] == 256
    assert Folder(folder).max_length == 256
    for number, (recorded, found) in enumerate(((100, 100), (10**6, 256), (None, 256))):
        assert Folder(with_config(folder, tmp_path / f"{number}", base_reward_max_length=recorded)).max_length == found


def test_a4_a_tokenizer_may_say_less_than_the_backbone(backbone, tmp_path):
    mine = copied(backbone, tmp_path / "short")
    (mine / "tokenizer_config.json").write_text(
        json.dumps(json.loads((mine / "tokenizer_config.json").read_text()) | {"model_max_length": 77})
    )
    write(tmp_path / "made", mine, **GOOD)
    assert Folder(tmp_path / "made").max_length == 77


# ---- where a model may be written ----


def test_b1_a_folder_with_another_model_is_refused(backbone, made, tmp_path):
    for folder in (copied(backbone, tmp_path / "policy"), copied(made[0], tmp_path / "rm")):
        with pytest.raises(
            ValueError, match="--output needs a folder without a model, got .* which would be replaced"
        ):
            output_folder.check_output(folder, "--output")
        output_folder.check_output(folder, "--output", again=True)
    for name in ("adapter_config.json", "pytorch_model.bin", "model-00001-of-00002.safetensors", "users.json"):
        other = tmp_path / f"with {name}"
        other.mkdir()
        (other / name).touch()
        with pytest.raises(ValueError, match="would be replaced"):
            output_folder.check_output(other, "--output")


def test_b1_a_model_that_is_read_is_refused_however_it_is_spelled(backbone, tmp_path, monkeypatch):
    mine = copied(backbone, tmp_path / "policy")
    (tmp_path / "link").symlink_to(mine)
    monkeypatch.chdir(tmp_path)
    for folder in (mine, "policy", "./policy/", "link", "x/../policy", tmp_path / "link" / ".." / "policy"):
        (tmp_path / "x").mkdir(exist_ok=True)
        for given in (str(mine), "policy", "link"):
            for again in (False, True):
                with pytest.raises(ValueError, match="needs a folder of its own, got .* the model that is read"):
                    output_folder.check_output(folder, "--output", [None, "a/hub-name", given], again)


def test_b1_a_folder_of_checkpoints_and_logs_takes_a_model(tmp_path):
    (tmp_path / "checkpoints_ppo_ray" / "_actor").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").touch()
    output_folder.check_output(tmp_path, "--ckpt.output_dir", ["a/hub-name"])
    output_folder.check_output(tmp_path / "new" / "folder", "--ckpt.output_dir")


def test_b1_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for folder, message in (("file", "which is something else"), ("nowhere", "else"), ("file/new", "can be written")):
        with pytest.raises(ValueError, match=message):
            output_folder.check_output(tmp_path / folder, "--output")


def test_b1_a_fitted_model_may_be_fitted_again_and_nothing_else_is_replaced(made, backbone, tmp_path):
    """A model that `write` made came of a file and flags in minutes. One that was trained is never replaced."""
    fitted = copied(made[0], tmp_path / "fitted")
    output_folder.check_new(fitted, "--output", refit=True)
    output_folder.check_new(tmp_path / "new", "--output")
    refused = [copied(backbone, tmp_path / "policy")]
    refused.append(with_config(made[0], tmp_path / "trained", base_reward_fitted=False))
    refused.append(with_config(made[0], tmp_path / "of an older version", base_reward_fitted=None))
    notes = copied(made[0], tmp_path / "with notes")
    (notes / "notes.txt").touch()
    for folder in (*refused, notes):
        with pytest.raises(
            ValueError, match="--output needs a new or empty folder, or one with a model that factorize"
        ):
            output_folder.check_new(folder, "--output", refit=True)
    with pytest.raises(ValueError, match="--output needs a new or empty folder, got"):
        output_folder.check_new(fitted, "--output")


def test_of_a_model_that_is_fitted_again_no_file_stays(made, backbone, tmp_path):
    """The chat template of the old backbone counted as that of the new one, which has none."""
    folder = copied(made[0], tmp_path / "fitted")
    (folder / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja", "notes.txt"):
        (folder / name).write_text("of the old")
    write(folder, backbone, np.ones((1, 64)), np.ones((1, 1)), ["ana"])
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {
        *(path.name for path in made[0].iterdir()),
        "notes.txt",
    }
    trained = with_config(made[0], tmp_path / "trained", base_reward_fitted=False)
    (trained / "vocab.csv").write_text("somebody's, beside checkpoints")
    write(trained, backbone, np.ones((1, 64)), np.ones((1, 1)), ["ana"])
    assert (trained / "vocab.csv").exists()


@pytest.mark.parametrize("refit", [True, False])
def test_e2_what_a_killed_writer_left_is_written_again_and_goes(made, tmp_path, refit):
    """It was killed before or between the files; the config is the last one."""
    folder = copied(made[0], tmp_path / "half")
    (folder / "config.json").unlink()
    (folder / f"{output_folder.NEW}other").mkdir()
    with pytest.raises(ValueError, match="--output needs a new or empty folder"):  # not by a writer that was killed
        output_folder.check_new(folder, "--output", refit=refit)
    (folder / output_folder.UNFINISHED).touch()
    killed, alive = folder / f"{output_folder.NEW}killed", folder / f"{output_folder.NEW}alive"
    for left in (killed, alive):
        left.mkdir()
        (left / "config.json").touch()
    output_folder.check_new(folder, "--output", refit=refit)
    model = load(made[0])
    with output_folder._held(alive) as held:
        assert held
        folders.save(folder, model.config, model.model.state_dict(), model.users, model.texts.tokenizer)
    assert Folder(folder).users == model.users and not killed.exists() and alive.exists()
    (folder / "config.json").unlink()
    (folder / "notes.txt").touch()
    with pytest.raises(ValueError, match="--output needs a new or empty folder, .*with 'notes.txt'"):
        output_folder.check_new(folder, "--output", refit=refit)


def test_b1_training_takes_the_mark_of_a_fitted_model_away(made, tmp_path):
    model = load(made[0])
    folders.save(tmp_path / "trained", model.config, model.model.state_dict(), model.users, model.texts.tokenizer)
    assert Folder(tmp_path / "trained").config.base_reward_fitted is False


# ---- how it is written ----


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_e2_files_have_the_mode_that_the_umask_gives(backbone, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write(tmp_path / "made", backbone, **GOOD)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "made").iterdir()} == {mode}


def test_e4_links_in_the_folder_are_replaced_and_not_followed(backbone, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    folder = tmp_path / "made"
    folder.mkdir()
    for name in ("model.safetensors", "users.json", "config.json", "tokenizer.json"):
        (folder / name).symlink_to(precious)
    write(folder, backbone, **GOOD)
    assert precious.read_text() == "keep me" and Folder(folder).users == ["a", "b"]
    assert not [path for path in folder.iterdir() if path.is_symlink() or path.name.startswith(output_folder.NEW)]


def test_weights_that_share_memory_are_written(tmp_path, made):
    """As a backbone that ties some of its own has them; safetensors would refuse them."""
    model = load(made[0])
    weights = dict(model.model.state_dict())
    weights["model.tied.weight"] = weights["model.embed_tokens.weight"]
    folders.save(tmp_path / "tied", model.config, weights, model.users, model.texts.tokenizer)
    found = load_file(tmp_path / "tied" / "model.safetensors")
    assert (found["model.tied.weight"] == found["model.embed_tokens.weight"]).all()


def stop_at(number, how, patch):
    """Stops at this change of a name on the disk, counted from 0, by calling `how`."""
    changes = count()

    def stopping(change):
        def stop_or_change(*given, **more):
            if next(changes) == number:
                how()
            return change(*given, **more)

        return stop_or_change

    for name in ("replace", "unlink"):
        patch.setattr(os, name, stopping(getattr(os, name)))


def stop_by(error):
    def raise_it():
        raise error

    return raise_it


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(output_folder.NEW)}


@pytest.fixture
def two(made, backbone, tmp_path):
    """The folders of two models, and what writes the second one. Their tokenizers have files of other names."""
    old, new, rng = copied(made[0], tmp_path / "old"), tmp_path / "new", np.random.default_rng(1)
    (old / "chat_template.jinja").write_text("of the old")
    write(new, backbone, rng.normal(size=(2, 64)), rng.normal(size=(3, 2)), ["cy", "dee", "eve"], made[3])
    model = Folder(new)
    weights, tokenizer = load_file(new / "model.safetensors"), model._tokenizer
    return old, new, lambda to: folders.save(to, model.config, weights, model.users, tokenizer, fitted=True)


@pytest.mark.parametrize("how", ["signal", "error", "kill"])
@pytest.mark.parametrize("again", [True, False])
def test_a_writer_that_is_stopped_leaves_the_old_model_the_new_one_or_none(two, tmp_path, monkeypatch, how, again):
    """Weights of the new one with users of the old gave people the coefficients of others. The same command begins
    again, and nothing of the old model or of the half one stays."""
    old, new, save = two
    before, after, stop = content(old), content(new), stop_by(KeyboardInterrupt() if how == "signal" else OSError(5))
    refused = 0
    for number in count():
        folder = tmp_path / f"{number}"
        copied(old, folder) if again else folder.mkdir()
        if how == "kill":
            if not (child := os.fork()):
                with suppress(BaseException):
                    stop_at(number, lambda: os._exit(1), monkeypatch)
                    save(folder)
                    os._exit(0)
                os._exit(2)
            if not (ended := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])):
                break
            assert ended == 1
        else:
            with monkeypatch.context() as patch, suppress(KeyboardInterrupt, OSError):
                stop_at(number, stop, patch)
                save(folder)
                break
        if (folder / "config.json").exists():
            assert content(folder) in (before, after)
            assert Folder(folder).fingerprint == Folder(old if content(folder) == before else new).fingerprint
        else:
            refused += 1
            with pytest.raises(ValueError, match="a model needs a config.json, got none in .* half of one: write it"):
                Folder(folder)
            output_folder.check_new(folder, "--output")
        output_folder.check_new(folder, "--output", refit=True)
        save(folder)
        assert content(folder) == after and not [*folder.glob(f"{output_folder.NEW}*")]
    assert content(folder) == after and refused >= 4 and number > 5


def test_two_writers_at_once_leave_the_model_of_one(two, tmp_path, monkeypatch):
    old, new, save = two
    folder, replace, model = tmp_path / "both", os.replace, Folder(old)
    weights, tokenizer = load_file(old / "model.safetensors"), model._tokenizer
    other = Thread(target=lambda: folders.save(folder, model.config, weights, model.users, tokenizer, fitted=True))

    def replace_while_another_begins(*names):
        replace(*names)
        if names[1] == folder / "model.safetensors" and not other.ident:
            other.start()
            other.join(1)

    monkeypatch.setattr(os, "replace", replace_while_another_begins)
    save(folder)
    other.join()
    assert Folder(folder).fingerprint in (Folder(old).fingerprint, Folder(new).fingerprint)


def test_a_training_that_holds_its_folder_can_write_its_model_there(two, tmp_path, monkeypatch):
    """It waited for itself for ever."""
    monkeypatch.setattr(one_run, "_held", {})
    _, _, save = two
    one_run.hold_folders(SimpleNamespace(ckpt=SimpleNamespace(path=tmp_path / "ckpt", output_dir=tmp_path / "out")))
    writer = Thread(target=lambda: save(tmp_path / "out"), daemon=True)
    writer.start()
    writer.join(30)
    assert not writer.is_alive() and Folder(tmp_path / "out").users
    for descriptor in one_run._held.values():
        os.close(descriptor)


def test_a_file_system_without_locks_keeps_the_model(two, tmp_path, monkeypatch):
    """The work is done by then."""
    old, _, save = two

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    save(tmp_path / "out")
    assert Folder(tmp_path / "out").users != Folder(old).users


def test_what_is_read_of_a_folder_is_of_one_model(two, tmp_path):
    """A fingerprint that is taken after the scores was that of another model."""
    old, new, _ = two
    mine = copied(old, tmp_path / "mine")
    folder, untouched = Folder(mine), Folder(mine)
    assert untouched.fingerprint == Folder(old).fingerprint
    shutil.rmtree(mine)
    copied(new, mine)
    for one in (folder, untouched):
        with pytest.raises(ValueError, match="mine needs to stay as it is while it is read, got other files: begin"):
            one.fingerprint  # noqa: B018
    (mine / "config.json").unlink()
    with pytest.raises(ValueError, match="needs to stay as it is"):
        folder.check_unchanged()


def test_mean_and_deviation_of_another_models_rewards_are_not_taken_over(backbone, tmp_path):
    """The host writes those of a reward model into its config, and it may be the backbone of this one."""
    other = with_config(backbone, tmp_path / "other", mean=5.0, std=2.0)
    write(tmp_path / "made", other, **GOOD)
    assert not {"mean", "std"} & json.loads((tmp_path / "made" / "config.json").read_text()).keys()
