"""`openrlhf-pgrpo patch` on a copy of the installed host: whole or not at all, and back to the byte."""

import os
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from openrlhf_pgrpo.ops import patching

pytestmark = pytest.mark.host

PATCHES = Path(__file__).resolve().parents[2] / "patches"
HOST = metadata.version("openrlhf")
SCRIPT = "openrlhf/cli/train_ppo_ray.py"
SCRIPTS = ("openrlhf/cli/serve_rm.py", "openrlhf/cli/train_dpo.py", SCRIPT, "openrlhf/cli/train_rm.py")


def test_patch_check_and_revert(host_copy):
    original = host_copy.files()
    assert host_copy.command("patch", "--check").returncode == 1
    paths = [host_copy.folder / name for name in SCRIPTS]
    done = host_copy.command("patch")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{path}: was as released, is patched\n" for path in paths)
    checked = host_copy.command("patch", "--check")
    assert checked.returncode == 0 and checked.stdout == "".join(f"{path}: patched\n" for path in paths)

    patched = host_copy.files()
    assert {name for name in original | patched if original.get(name) != patched.get(name)} == {*SCRIPTS}
    for script in SCRIPTS:
        added = set(patched[script].splitlines()) - set(original[script].splitlines())
        assert len(added) < 8  # it stays a patch of a few lines
    assert host_copy.command("patch").stdout == "" and host_copy.files() == patched  # again changes nothing

    assert host_copy.command("patch", "--revert").returncode == 0
    assert host_copy.files() == original
    assert host_copy.command("patch", "--revert").stdout == "" and host_copy.files() == original


def test_git_apply_does_the_same_to_a_source_checkout(host_copy):
    def git(*words):
        subprocess.run(["git", *words], cwd=host_copy.folder, check=True, capture_output=True)

    original = host_copy.script.read_bytes()
    git("init", "--quiet")
    git("apply", *PATCHES.glob("*.patch"))
    by_git = host_copy.script.read_bytes()
    assert by_git != original
    assert host_copy.command("patch", "--check").returncode == 0
    git("apply", "--reverse", *PATCHES.glob("*.patch"))
    assert host_copy.script.read_bytes() == original
    host_copy.command("patch")
    assert host_copy.script.read_bytes() == by_git


def test_of_a_source_checkout_the_lines_decide(host_copy):
    (host_copy.metadata / "RECORD").unlink()
    edited = host_copy.script.read_bytes() + b"# mine\n"
    host_copy.script.write_bytes(edited)
    assert host_copy.command("patch").returncode == 0 and host_copy.command("patch", "--check").returncode == 0
    assert host_copy.script.read_bytes().endswith(b"# mine\n") and host_copy.script.read_bytes() != edited
    assert host_copy.command("patch", "--revert").returncode == 0 and host_copy.script.read_bytes() == edited


@pytest.mark.parametrize("words", [("patch",), ("patch", "--revert")])
def test_an_edited_file_is_refused(host_copy, words):
    host_copy.script.write_text(host_copy.script.read_text() + "# mine\n")
    before = host_copy.files()
    done = host_copy.command(*words)
    assert done.returncode == 1
    assert f"needs {SCRIPT} as openrlhf {HOST} has it, got a file that is edited" in done.stderr
    assert f"pip install --force-reinstall --no-deps openrlhf=={HOST}" in done.stderr
    assert host_copy.files() == before


def test_a_half_patched_file_is_named_and_left_alone(host_copy):
    host_copy.command("patch")
    patched = host_copy.script.read_text()
    host_copy.script.write_text(patched.replace("doors.PPO.parse_args(parser)", "parser.parse_args()"))
    before = host_copy.files()
    for words in (["patch"], ["patch", "--revert"]):
        assert "got a file that is half patched" in host_copy.command(*words).stderr
    assert host_copy.files() == before
    assert f"{host_copy.script}: half patched\n" in host_copy.command("patch", "--check").stdout


def test_a_missing_file_and_another_version_are_refused(host_copy):
    script = host_copy.script.read_bytes()
    host_copy.script.unlink()
    assert "got a file that is missing" in host_copy.command("patch").stderr
    host_copy.script.write_bytes(script)
    host_copy.pretend("0.10.2")
    before = host_copy.files()
    assert "needs openrlhf 0.11.2 or 0.11.1 or 0.11.0, found 0.10.2" in host_copy.command("patch").stderr
    assert host_copy.files() == before


def test_mode_and_hard_links_survive(host_copy):
    """Some installers hard-link packages out of a cache that all environments share."""
    cached = host_copy.folder.parent / "cached.py"
    host_copy.script.chmod(0o640)
    os.link(host_copy.script, cached)
    original = cached.read_bytes()
    host_copy.command("patch")
    assert cached.read_bytes() == original != host_copy.script.read_bytes()
    assert host_copy.script.stat().st_mode & 0o777 == 0o640


def test_a_failed_write_leaves_everything_as_it_was(host_copy, monkeypatch):
    before = host_copy.files()
    host_copy.come_first(monkeypatch)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(patching.os, "fsync", full)
    with pytest.raises(patching.PatchError, match="needs to write beside .*, got No space left on device"):
        patching.set_state(patching.PATCHED)
    assert host_copy.files() == before
