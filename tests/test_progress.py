"""Bars of long work: on a terminal, after a while, even if no step ends; nowhere else."""

import io
import time

import pytest

from openrlhf_pgrpo import progress as module
from openrlhf_pgrpo.progress import along, progress

pytestmark = pytest.mark.core


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch):
    """What a terminal shows, with a tenth of the usual patience."""
    monkeypatch.setattr(module, "DELAY", 0.2)
    monkeypatch.setattr(module, "EVERY", 0.1)
    monkeypatch.setattr("sys.stderr", shown := Terminal())
    return shown


def test_a_long_step_is_seen_before_its_end_and_quick_work_never(monkeypatch):
    shown = terminal(monkeypatch)
    for text in along(["a", "b"], "reading texts", "texts"):
        assert text in "ab" and not shown.getvalue()
    with progress("loading"):
        pass
    assert not shown.getvalue()
    with progress("loading"):
        time.sleep(0.5)
        assert "loading ... 00:00" in shown.getvalue()
    seen = len(shown.getvalue())
    with progress("answers", 4, "answers", done=1) as count:
        count(1)
        time.sleep(0.5)
        count(1)
    assert "answers:  50%" in shown.getvalue()[seen:] and "2/4" in shown.getvalue()[seen:]
    assert "3/4" in shown.getvalue().splitlines()[-1]  # what was counted stays


def test_nothing_is_shown_where_output_is_no_terminal(monkeypatch):
    shown = terminal(monkeypatch)
    monkeypatch.setattr(shown, "isatty", lambda: False)
    with progress("loading"):
        time.sleep(0.4)
    assert not shown.getvalue()


def test_an_interrupted_bar_ends_its_line(monkeypatch):
    shown = terminal(monkeypatch)
    with pytest.raises(KeyboardInterrupt), progress("answers", 4) as count:
        count(1)
        time.sleep(0.4)
        raise KeyboardInterrupt
    assert "1/4" in shown.getvalue() and shown.getvalue().endswith("\n")
