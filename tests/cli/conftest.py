"""Commands as they are typed."""

import io

import pytest

from openrlhf_pgrpo.cli.main import main


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a command in `tmp_path` and types `typed`, one key per line. Returns exit code or message, and output."""

    def run(*words, typed=""):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(key + "\n" for key in typed)))
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        return ended.value.code, capsys.readouterr().out

    return run
