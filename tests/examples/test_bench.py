"""The runner of all benchmarks: what it keeps, what it calls a change, and what it refuses."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import bench

pytestmark = pytest.mark.core

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.fixture
def two(tmp_path, monkeypatch):
    """The benchmarks are two small scripts."""
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setattr(bench, "BENCHMARKS", ("one", "two"))
    (tmp_path / "one.py").write_text("print('users   1e3  2.00 s'); open('left-behind', 'w')")
    (tmp_path / "two.py").write_text("print('ratio .5')")


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, words)])
    bench.main()


def test_it_runs_them_all_keeps_what_they_print_and_says_what_changed(two, monkeypatch, tmp_path, capsys):
    file = tmp_path / "kept.json"
    run(monkeypatch, file)
    kept = json.loads(file.read_text())
    assert [kept[name]["lines"] for name in ("one", "two")] == [["users   1e3  2.00 s"], ["ratio .5"]]
    assert "!" not in capsys.readouterr().out and not (tmp_path / "left-behind").exists()
    (tmp_path / "one.py").write_text("print('users   1e3  3.1 s')")
    run(monkeypatch, file, "--only", "one")
    assert "  ! users 1e3 3.1 s: 2 -> 3.1\n" in capsys.readouterr().out
    assert json.loads(file.read_text())["two"] == kept["two"]
    run(monkeypatch, file, "--only", "one", "--noticed", "1.1")
    assert "!" not in capsys.readouterr().out


def test_what_is_a_change():
    last = ["a 1.0, .50 to 2e-3", "step-1 of 12"]
    assert bench.changes(None, last, 1.1) == []
    assert bench.changes(last, ["a 1.05, .50 to 2e-3", "step-1 of  12"], 1.1) == []
    assert bench.changes(last, ["a -1.0, .5 to 4e-3", "step-1 of 12"], 1.1) == [
        "a -1.0, .5 to 4e-3: 1 -> -1, 0.002 -> 0.004"
    ]
    assert bench.changes(last, ["b 1.0", "step-1 of 12", "more"], 1.1) == [
        "another line than last time: 'a 1.0, .50 to 2e-3', now 'b 1.0'",
        "another line than last time: '', now 'more'",
    ]


def test_all_benchmarks_are_run():
    parts = {"bench", "probe", "tiny_run", "transport_probe", "two_nodes"}  # what the others are made of
    alone = {"kills", "trl_step"}  # it takes hours; it needs TRL
    assert {path.stem for path in FOLDER.glob("*.py")} - parts - alone == {*bench.BENCHMARKS}


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="is about a missing TRL, got one")
def test_the_comparison_with_trl_says_that_it_needs_it(tmp_path):
    ended = subprocess.run([sys.executable, FOLDER / "trl_step.py", tmp_path / "run"], capture_output=True, text=True)
    assert ended.returncode == 2 and "needs TRL, which cannot be imported" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_what_is_refused(two, monkeypatch, tmp_path):
    (tmp_path / "two.py").write_text("raise SystemExit('no cores')")
    with pytest.raises(SystemExit, match="two failed:\nno cores"):
        run(monkeypatch, tmp_path / "kept.json")
    assert json.loads((tmp_path / "kept.json").read_text()).keys() == {"one"}
    for content in ("{", "[]", '{"three": {"lines": []}}', '{"one": {}}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(SystemExit, match="needs a file that it wrote before, or a new one, got .*other.json"):
            run(monkeypatch, tmp_path / "other.json")
        assert (tmp_path / "other.json").read_text() == content
