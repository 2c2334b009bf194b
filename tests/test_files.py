"""A file holds its old content or its new one, whatever happens in between; rows are checked line by line."""

import errno
import json
import os
import subprocess
import sys

import pytest

from openrlhf_pgrpo.files import check_folder, data_in, held_in, locked, read_rows, whole_file, write_rows, write_whole

pytestmark = pytest.mark.core


def test_content_is_replaced_and_nothing_is_left_beside(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    write_whole(path, "ne\u00fc")
    assert path.read_bytes() == b"ne\xc3\xbc" and os.listdir(tmp_path) == ["a.txt"]


def test_until_the_end_the_old_content_stays(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_full_disk_or_an_interrupt_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_e2_a_writer_that_is_killed_leaves_nothing(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    code = (
        "import os, sys; from pathlib import Path; from openrlhf_pgrpo.files import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as file: file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -9
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EISDIR])
def test_e2_a_file_system_without_files_that_have_no_name(tmp_path, monkeypatch, number):
    real = os.open

    def without(path, flags, *mode, **how):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *mode, **how)

    monkeypatch.setattr(os, "open", without)
    write_whole(tmp_path / "a.txt", "new")
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a.txt") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "a.txt").read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_content_and_name_are_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    kind = {True: "folder", False: "file"}
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(kind[os.path.isdir(f"/proc/self/fd/{fd}")]), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    write_whole(tmp_path / "a.txt", "new")
    assert calls == ["file", "rename", "folder"]


def test_lists_of_texts_are_checked_text_by_text(jsonl):
    with pytest.raises(ValueError, match="line 2 of .* needs a list of texts as 'responses'"):
        read_rows(jsonl("c.jsonl", [{"responses": ["x"]}, {"responses": ["x", 1]}]), {"responses": list})
    with pytest.raises(ValueError, match="needs a list of texts as 'responses', got 'x'"):
        read_rows(jsonl("c.jsonl", [{"responses": "x"}]), {"responses": list})


def test_rows_are_written_whole_and_come_back(tmp_path):
    rows = [{"x": "\u00e9\u2028\n", "y": [1.5, None]}, {"half": "\ud800"}]
    write_rows(tmp_path / "out.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]] == rows


def test_a_file_needs_a_folder_before_the_work_begins(tmp_path):
    check_folder(tmp_path / "new.txt", "--output")
    with pytest.raises(ValueError, match="--output needs a folder that exists, got .*nowhere: make it"):
        check_folder(tmp_path / "nowhere" / "new.txt", "--output")


def test_e4_a_link_that_lies_in_wait_is_not_followed(tmp_path):
    """Somebody put links under the names that a writer might use for its temporary file."""
    path, secret = tmp_path / "a.txt", tmp_path / "secret"
    secret.write_text("mine")
    for name in ("a.txt.new", ".new-", "a.txt~"):
        (tmp_path / name).symlink_to(secret)
    write_whole(path, "new")
    assert secret.read_text() == "mine" and path.read_text() == "new"


def test_e4_a_temporary_name_that_is_taken_is_never_written_to(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (tmp_path / ".new-0").symlink_to(secret)
    monkeypatch.setattr("openrlhf_pgrpo.files.secrets.token_hex", lambda _: "0")
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "a.txt", "new")
    assert secret.read_text() == "mine" and (tmp_path / ".new-0").is_symlink()


def test_e4_a_link_at_the_file_itself_is_replaced_and_its_target_stays(tmp_path):
    path, secret = tmp_path / "report.html", tmp_path / "secret"
    secret.write_text("mine")
    path.symlink_to(secret)
    write_whole(path, "new")
    assert secret.read_text() == "mine" and path.read_text() == "new" and not path.is_symlink()


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_e2_a_new_file_has_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "a.txt", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


def test_e2_a_file_that_its_owner_made_private_stays_private(tmp_path):
    path = tmp_path / "ana.json"
    write_whole(path, "old")
    path.chmod(0o600)
    write_whole(path, "new")
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_text() == "new"


def test_e4_folders_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    for name in ("pipe", "null", "."):
        for refuse in (lambda path: write_whole(path, "x"), lambda path: check_folder(path, "--output")):
            with pytest.raises(ValueError, match="needs the name of a file, got .*: name another"):
                refuse(tmp_path / name)


def test_e4_an_output_that_is_an_input_is_refused_by_any_name(tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    data.write_text("{}")
    (tmp_path / "link.jsonl").symlink_to(data)
    os.link(data, tmp_path / "hard.jsonl")
    monkeypatch.chdir(tmp_path)
    for name in ("data.jsonl", "../" + tmp_path.name + "/data.jsonl", "link.jsonl", "hard.jsonl"):
        with pytest.raises(ValueError, match="--output needs a file of its own, got .*, which --data reads: name"):
            check_folder(tmp_path / name, "--output", {"--pool": None, "--data": "data.jsonl"})
    check_folder(tmp_path / "new.jsonl", "--output", {"--data": data})


def test_an_output_inside_a_folder_that_is_read_is_refused(tmp_path):
    """The next command would have read it as data."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "more").mkdir(parents=True)
    elsewhere.symlink_to(data / "more")
    for folder in (data, data / "more", elsewhere):
        with pytest.raises(ValueError, match="--output needs a place outside of the folder .*data, which --data"):
            check_folder(folder / "new.jsonl", "--output", data_in(data, "--data"))
        check_folder(folder / "new.jsonl", "--output", held_in(data, "--model"))  # what a model does not read
    (data / "linked.jsonl").symlink_to(tmp_path / "mine.jsonl")
    (tmp_path / "mine.jsonl").touch()
    with pytest.raises(ValueError, match="needs a file of its own, got .*mine.jsonl, which --data .*linked.jsonl"):
        check_folder(tmp_path / "mine.jsonl", "--output", data_in(data, "--data"))
    for source in (data, "a-name/on-the-hub"):
        check_folder(tmp_path / "data.jsonl", "--output", data_in(source, "--data"))


COUNT = """
import sys
from pathlib import Path
from openrlhf_pgrpo.files import locked, write_whole
path = Path(sys.argv[1])
for _ in range(40):
    with locked(path):
        write_whole(path, str(int(path.read_text()) + 1))
"""


def test_b4_two_writers_of_one_file_lose_nothing(tmp_path):
    """Three processes add 1 to a number, 40 times each."""
    path = tmp_path / "ana.json"
    write_whole(path, "0")
    writers = [subprocess.Popen([sys.executable, "-c", COUNT, str(path)]) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert path.read_text() == "120" and os.listdir(tmp_path) == ["ana.json"]


def test_b4_the_lock_of_a_block_that_failed_is_given_back(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), locked(tmp_path / "ana.json"):
            raise KeyError
    with locked(tmp_path / "ana.json"):
        assert os.listdir(tmp_path) == [".ana.json.lock"]
    assert os.listdir(tmp_path) == []


def test_b4_a_lock_that_is_a_link_is_refused(tmp_path):
    (tmp_path / ".ana.json.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError), locked(tmp_path / "ana.json"):
        pass
    assert not (tmp_path / "elsewhere").exists()
