"""The kit for a GPU machine deletes nothing but its own wheels."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

SCRIPT = Path(__file__).parent / "gpu" / "kit.py"
spec = importlib.util.spec_from_file_location("gpu_kit", SCRIPT)
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with an old wheel; pip leaves another one there at each call."""

    def pip(command, *words):
        (tmp_path / "kit").mkdir(exist_ok=True)
        (tmp_path / "kit" / f"{command}.whl").write_text("new")

    monkeypatch.setattr(kit, "pip", pip)
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "old.whl").write_text("old")
    return tmp_path / "kit"


def test_a_kit_is_made_anew(folder):
    kit.collect(folder, "3.12")
    assert {file.name for file in folder.iterdir()} == {"download.whl", "wheel.whl"}


def test_a_folder_with_something_else_is_left_as_it_is(folder):
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"needs a folder of its own, got thesis\.tex in .*: name another one"):
        kit.collect(folder, "3.12")
    assert {file.name for file in folder.iterdir()} == {"old.whl", "thesis.tex"}


def test_a_kit_that_is_too_large_is_refused(folder, monkeypatch):
    monkeypatch.setattr(kit, "MOST", 5)
    with pytest.raises(ValueError, match=r"the kit needs to be under 0 MiB, got 0\.0: take wheels out"):
        kit.collect(folder, "3.12")
