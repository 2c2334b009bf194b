"""A file holds its old content or its new one, whatever happens in between; rows are checked line by line."""

import errno
import json
import os

import pytest

from openrlhf_pgrpo.files import check_folder, read_rows, whole_file, write_rows, write_whole

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
