"""Two runs do not train into one folder."""

import fcntl
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from openrlhf_pgrpo.host import one_run, whole_checkpoints

pytestmark = pytest.mark.host

HOLD = """
import sys
from types import SimpleNamespace
from openrlhf_pgrpo.host import one_run
one_run.hold_folders(SimpleNamespace(ckpt=SimpleNamespace(path=sys.argv[1], output_dir=sys.argv[2])))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setattr(one_run, "_held", {})
    for name in ("RANK", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return SimpleNamespace(ckpt=SimpleNamespace(path=str(tmp_path / "out" / "ckpt"), output_dir=str(tmp_path / "out")))


@pytest.fixture
def holds():
    """Starts a process that holds two folders, and ends it."""
    processes = []

    def start(path, output_dir):
        command = [sys.executable, "-c", HOLD, str(path), str(output_dir)]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("shared", ["path", "output_dir"])
def test_a_second_run_is_refused_by_name_until_the_first_has_ended(args, holds, tmp_path, shared):
    folders = {"path": tmp_path / "other" / "ckpt", "output_dir": tmp_path / "other"}
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    folders[shared] = tmp_path / "link" / ("ckpt" if shared == "path" else "")
    first = holds(**folders)
    with pytest.raises(ValueError, match=f"--ckpt.{shared} needs .* got .*, which process {first.pid} trains into"):
        one_run.hold_folders(args)
    first.kill()
    first.wait()
    one_run.hold_folders(args)


def test_one_process_may_train_into_its_folder_again_and_other_ranks_do_not_ask(args, holds, monkeypatch):
    one_run.hold_folders(args)
    one_run.hold_folders(args)
    assert len(one_run._held) == 2
    one_run._held.clear()
    monkeypatch.setenv("RANK", "1")
    one_run.hold_folders(args)
    assert not one_run._held


def test_a_folder_that_cannot_be_locked_is_said(args, monkeypatch, capsys):
    def flock(descriptor, operation):
        raise OSError(9, os.strerror(9))

    monkeypatch.setattr(fcntl, "flock", flock)
    one_run.hold_folders(args)
    assert "ckpt cannot be locked (Bad file descriptor): nothing stops a second run there" in capsys.readouterr().out


def test_a_driver_leaves_folders_that_are_not_here_to_its_cluster(args, holds, tmp_path, monkeypatch, capsys):
    """It need not have the folders of its cluster, and stray ones would tell a resume that there is nothing."""
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    args.rollout = None  # PPO alone runs on Ray
    one_run.hold_folders(args)
    assert not [*tmp_path.iterdir()] and not one_run._held
    args.ckpt.load_enable = True
    whole_checkpoints.announce(lambda: None, SimpleNamespace(args=args, use_ds_universal_ckpt=False), (), {})
    assert capsys.readouterr().out == ""
    args.ckpt.output_dir = str(tmp_path)
    first = holds(tmp_path / "other", tmp_path)
    with pytest.raises(ValueError, match=f"--ckpt.output_dir needs .*, which process {first.pid} trains into"):
        one_run.hold_folders(args)
    del args.rollout
    args.ckpt.output_dir = args.ckpt.path
    one_run.hold_folders(args)
    assert len(one_run._held) == 1


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:6379", "ray://127.0.0.1:10001"])
def test_beside_the_head_of_its_cluster_a_driver_holds_its_folders(address, args, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    args.rollout = None
    one_run.hold_folders(args)
    assert len(one_run._held) == 2


def test_what_a_driver_cannot_make_is_left_to_its_cluster(args, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("a file")  # as a folder of the nodes alone, which cannot be made here
    args.rollout = None
    with pytest.raises(OSError):
        one_run.hold_folders(args)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    args.ckpt.output_dir = str(tmp_path / "out" / "model")
    one_run.hold_folders(args)
    assert not one_run._held


def test_the_lock_leaves_nothing_on_the_disk_and_is_not_inherited(args, tmp_path):
    one_run.hold_folders(args)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["ckpt", "out"]
    assert not any(os.get_inheritable(descriptor) for descriptor in one_run._held.values())
