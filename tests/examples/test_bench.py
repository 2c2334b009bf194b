"""The runner of all benchmarks: what it keeps, what it calls a change, and what it refuses."""

import json
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


@pytest.mark.parametrize(
    "script, said",
    [
        ("raise SystemExit('no cores')", "one failed:\nno cores"),
        ("print('skipped: needs votes')", "one: skipped: needs"),
    ],
)
def test_one_without_figures_keeps_its_last_ones_and_the_others_go_on(
    two, monkeypatch, tmp_path, capsys, script, said
):
    file = tmp_path / "kept.json"
    run(monkeypatch, file, "--only", "one")
    first = json.loads(file.read_text())["one"]
    assert first["seconds"] >= 0 and first["commit"]
    (tmp_path / "one.py").write_text(script)
    with pytest.raises(SystemExit, match="no figures of one: see above"):
        run(monkeypatch, file)
    kept = json.loads(file.read_text())
    assert kept["one"] == first and kept["two"]["lines"] == ["ratio .5"]
    assert f"  ! {said}" in capsys.readouterr().out


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
    alone = {"kills", "fresh_clone"}  # they take hours, and a network
    assert {path.stem for path in FOLDER.glob("*.py")} - parts - alone == {*bench.BENCHMARKS}


def test_what_is_refused(two, monkeypatch, tmp_path):
    for content in ("{", "[]", '{"three": {"lines": []}}', '{"one": {}}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(SystemExit, match="needs a file that it wrote before, or a new one, got .*other.json"):
            run(monkeypatch, tmp_path / "other.json")
        assert (tmp_path / "other.json").read_text() == content
