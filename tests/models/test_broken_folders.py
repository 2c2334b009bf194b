"""Broken folders of a factorized reward model: every reader says in a sentence which file is broken."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from openrlhf_pgrpo.models.folder import Folder, write
from openrlhf_pgrpo.models.scalar_reward import export_user
from openrlhf_pgrpo.models.scoring import embed, load

pytestmark = pytest.mark.core

WEIGHTS, USERS, CONFIG = "model.safetensors", "users.json", "config.json"


def config(**change):
    """The config with other values; None takes a key away."""

    def broken(folder: Path):
        content = json.loads((folder / CONFIG).read_text())
        content |= change
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return CONFIG, broken


def weights(**change):
    """The weights with others in their place; None takes one away. `__` in a name stands for a dot."""

    def broken(folder: Path):
        content = load_file(folder / WEIGHTS)
        content |= {name.replace("__", "."): weight for name, weight in change.items()}
        content = {name: weight for name, weight in content.items() if weight is not None}
        save_file(content, folder / WEIGHTS, {"format": "pt"})

    return WEIGHTS, broken


def one_nan(name):
    def broken(folder: Path):
        content = load_file(folder / WEIGHTS)
        content[name].view(-1)[3] = float("nan")
        save_file(content, folder / WEIGHTS, {"format": "pt"})

    return WEIGHTS, broken


def text(file, content):
    def broken(folder: Path):
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return file, broken


def missing(file):
    return file, lambda folder: (folder / file).unlink()


def a_folder(file):
    def broken(folder: Path):
        (folder / file).unlink()
        (folder / file).mkdir()

    return file, broken


def cut(file, size):
    def broken(folder: Path):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * size) if size < 1 else size])

    return file, broken


HEADER = (1 << 40).to_bytes(8, "little") + b"{}"
BROKEN = {
    "weights cut in half": cut(WEIGHTS, 0.5),
    "weights cut in the header": cut(WEIGHTS, 100),
    "weights cut in the length": cut(WEIGHTS, 4),
    "weights empty": text(WEIGHTS, b""),
    "weights of zeros": text(WEIGHTS, b"\0" * 5000),
    "weights with a huge header": text(WEIGHTS, HEADER),
    "weights of text": text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "weights with a header of another kind": text(WEIGHTS, (2).to_bytes(8, "little") + b"[]"),
    "weights missing": missing(WEIGHTS),
    "weights a folder": a_folder(WEIGHTS),
    "coefficients missing": weights(coefficients=None),
    "coefficients of other users": weights(coefficients=torch.ones(5, 3)),
    "coefficients of other base rewards": weights(coefficients=torch.ones(3, 2)),
    "coefficients flat": weights(coefficients=torch.ones(9)),
    "coefficients nan": one_nan("coefficients"),
    "head missing": weights(score__weight=None),
    "head of another size": weights(score__weight=torch.ones(3, 65)),
    "head of other base rewards": weights(score__weight=torch.ones(1, 64)),
    "head nan": one_nan("score.weight"),
    "head infinite": weights(score__weight=torch.full((3, 64), float("inf"))),
    "backbone nan": one_nan("model.layers.1.mlp.up_proj.weight"),
    "backbone without a layer": weights(model__layers__1__mlp__up_proj__weight=None),
    "backbone of another size": weights(model__norm__weight=torch.ones(32)),
    "backbone of another vocabulary": weights(model__embed_tokens__weight=torch.ones(3, 64)),
    "users null": text(USERS, "null"),
    "users a number": text(USERS, "3"),
    "users a struct": text(USERS, '{"ana": 0}'),
    "users a text": text(USERS, '"ana"'),
    "users numbers": text(USERS, "[1, 2, 3]"),
    "users with null": text(USERS, '["ana", null, "cleo"]'),
    "users twice": text(USERS, '["ana", "ana", "cleo"]'),
    "users empty names": text(USERS, '["ana", "", "cleo"]'),
    "users lists": text(USERS, '[["ana"], ["bob"], ["cleo"]]'),
    "users too few": text(USERS, '["ana"]'),
    "users none": text(USERS, "[]"),
    "users cut": text(USERS, '["ana", "bo'),
    "users empty": text(USERS, ""),
    "users in other bytes": text(USERS, b'["\xff\xfe", "b", "c"]'),
    "users deep": text(USERS, "[" * 100_000),
    "users missing": missing(USERS),
    "users a folder": a_folder(USERS),
    "config null": text(CONFIG, "null"),
    "config a list": text(CONFIG, "[]"),
    "config empty": text(CONFIG, ""),
    "config cut": cut(CONFIG, 0.5),
    "config in other bytes": text(CONFIG, b"\xff\xfe\0"),
    "config missing": missing(CONFIG),
    "config a folder": a_folder(CONFIG),
    "config of no model": text(CONFIG, '{"base_rewards": 3}'),
    "config of an unknown kind": config(model_type="no_such_kind"),
    "config of another kind": config(model_type="bert"),
    "config of encoder and decoder": config(model_type="t5"),
    "config with a number for a kind": config(model_type=3),
    "base rewards a text": config(base_rewards="3"),
    "base rewards negative": config(base_rewards=-1),
    "base rewards true": config(base_rewards=True),
    "base rewards other": config(base_rewards=2),
    "base rewards huge": config(base_rewards=10**12),
    "no number of users": config(base_reward_users=None),
    "other number of users": config(base_reward_users=7),
    "no pooling": config(base_reward_pooling=None),
    "odd pooling": config(base_reward_pooling=["last"]),
    "odd head name": config(value_head_prefix="../score"),
    "head name of a method": config(value_head_prefix="forward"),
    "head name of the table": config(value_head_prefix="coefficients"),
    "head name a number": config(value_head_prefix=3),
    "head name of another": config(value_head_prefix="value_head"),
    "longest text a text": config(base_reward_max_length="long"),
    "longest text negative": config(base_reward_max_length=-1),
    "std zero": config(std=0),
    "mean a text": config(mean="0"),
    "hidden size a text": config(hidden_size="64"),
    "hidden size other": config(hidden_size=128),
    "hidden size huge": config(hidden_size=2**40),
    "hidden size zero": config(hidden_size=0),
    "no heads": config(num_attention_heads=0),
    "vocabulary other": config(vocab_size=17),
    "more layers": config(num_hidden_layers=3),
    "a billion layers": config(num_hidden_layers=10**9),
    "intermediate size other": config(intermediate_size=64),
    "tokenizer cut": cut("tokenizer.json", 0.5),
    "tokenizer null": text("tokenizer.json", "null"),
    "tokenizer config a list": text("tokenizer_config.json", "[]"),
}
# The folder itself looks at its own files and at head and coefficients; these are found by those who load weights.
LOADED = {
    name
    for name in BROKEN
    if name.startswith(("backbone", "tokenizer", "vocabulary", "intermediate", "more", "no heads"))
} | {"config of another kind"}


@pytest.fixture
def copied(factorized, tmp_path):
    return Path(shutil.copytree(factorized, tmp_path / "broken"))


def said(read, folder) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        read(folder)
    return str(error.value)


@pytest.mark.parametrize("name", BROKEN)
def test_e9_a_broken_folder_is_refused_with_the_name_of_the_file(copied, name):
    """Whoever opens it, and whoever loads it to score texts."""
    file, breaks = BROKEN[name]
    breaks(copied)
    readers = [load] if name in LOADED else [Folder, load]
    for read in readers:
        message = said(read, copied)
        assert str(copied) in message and len(message) < 1200, message
        named = (file, "tokenizer", "its files are of different models", "model.safetensors needs all weights")
        assert any(words in message for words in named), message


@pytest.mark.parametrize("name", sorted(LOADED))
def test_e9_a_user_of_a_broken_folder_is_not_exported(copied, name, tmp_path):
    BROKEN[name][1](copied)
    assert str(copied) in said(lambda folder: export_user(Folder(folder), np.ones(3), tmp_path / "out"), copied)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", [name for name, (file, _) in BROKEN.items() if "backbone" in name or ("cut" in name and file != USERS)]
)
def test_e9_a_broken_backbone_is_refused_before_anything_is_written(copied, name, tmp_path):
    """A factorized folder is a backbone, too, as far as its files go: its own keys and weights are ignored."""
    BROKEN[name][1](copied)
    head, table = np.ones((1, 64)), np.ones((1, 1))
    assert str(copied) in said(lambda folder: embed(folder, ["a"], ["b"]), copied)
    assert str(copied) in said(lambda folder: write(tmp_path / "out", folder, head, table, ["u"]), copied)
    assert not (tmp_path / "out").exists()
