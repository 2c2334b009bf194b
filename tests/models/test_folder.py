"""The folder of a factorized reward model: its files, its fingerprint, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from openrlhf_pgrpo.models import folder as folders
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


@pytest.mark.parametrize("name", ["users.json", "config.json", "model.safetensors"])
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

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, backbone, **{**GOOD, "users": ["c", "d"]})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
