"""`openrlhf-pgrpo report`, as it is typed."""

import sys

import pytest

from openrlhf_pgrpo.cli.main import main

pytestmark = pytest.mark.core


@pytest.fixture
def report(capsys):
    """Runs the command. Returns its exit code, or its message if it fails, and its output."""

    def report(*words):
        with pytest.raises(SystemExit) as ended:
            main(["report", *map(str, words)])
        return ended.value.code, capsys.readouterr().out

    return report


def test_it_writes_the_page_and_prints_where(report, write_run, make_row, tmp_path):
    run = write_run("mine", [make_row(step, {"ana": (4, 0.1 * step, 1.0)}) for step in (1, 2)])
    page = tmp_path / "pages" / "mine.html"
    assert report(run.parent, "--output", page) == (0, f"{page}\n")
    assert "ana" in page.read_text()


def test_a_folder_without_a_run_is_a_sentence_and_no_page(report, tmp_path):
    said, printed = report(tmp_path, "--output", tmp_path / "page.html")
    assert said.startswith("openrlhf-pgrpo report: ") and "metrics.jsonl" in said and printed == ""
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_a_sentence(report, write_run, make_row, tmp_path, monkeypatch):
    """It was a traceback, after everything was drawn."""
    run = write_run("mine", [make_row(1, {"ana": (4, 0.0, 1.0)})])
    monkeypatch.setattr("openrlhf_pgrpo.report.page.render", None)
    (tmp_path / "a-file").touch()
    said, _ = report(run, "--output", tmp_path / "a-file" / "report.html")
    assert said.startswith("openrlhf-pgrpo report: ") and "a-file" in said
    monkeypatch.setattr("os.access", lambda *_: False)
    said, _ = report(run, "--output", tmp_path / "page.html")
    assert said.startswith("openrlhf-pgrpo report: a report needs a folder that can be written, got ")


def test_a_missing_package_is_a_sentence(report, write_run, make_row, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    for name in [name for name in sys.modules if name.startswith("openrlhf_pgrpo.report.")]:
        monkeypatch.delitem(sys.modules, name)
    said, _ = report(write_run("mine", [make_row(1, {"ana": (4, 0.0, 1.0)})]))
    assert "plotly" in said and 'pip install "openrlhf-pgrpo[report]"' in said
