"""The JSONL metrics file: whole rows, also after a kill and a resume."""

import json

import pytest

from openrlhf_pgrpo.host.metrics import JSONLines

pytestmark = pytest.mark.host


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_are_on_disk_one_by_one(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    file = JSONLines(path)
    for step in (1, 2):
        file.append({"step": step})
        assert steps(path) == list(range(1, step + 1))
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_writes_its_steps_again_and_drops_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "tra')  # killed in step 4, checkpoint at 2
    file = JSONLines(path)
    file.append({"step": 3, "again": True})
    assert steps(path) == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1])["again"]


def test_a_fresh_run_replaces_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    JSONLines(path).append({"step": 1})
    assert steps(path) == [1]
