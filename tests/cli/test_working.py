"""Commands at work, as processes: what a terminal shows, what a pipe does not, and what Ctrl-C leaves."""

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest

from openrlhf_pgrpo.models.folder import write

pytestmark = pytest.mark.core

COMMAND = [sys.executable, "-m", "openrlhf_pgrpo.cli.main"]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A reward model of so many users that clustering them takes minutes."""
    rng, users = np.random.default_rng(0), 20_000
    made = tmp_path_factory.mktemp("working") / "rm"
    coefficients = rng.normal(size=(users, 3))
    write(made, tiny / "model", rng.normal(size=(3, 64)), coefficients, [f"user{number}" for number in range(users)])
    return made


class InTerminal:
    """A command in a terminal of 100 columns."""

    def __init__(self, *words, cwd):
        self.pid, self.terminal = pty.fork()
        if not self.pid:
            os.chdir(cwd)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that a shell put into the background ignore it
            os.execv(COMMAND[0], [*COMMAND, *map(str, words)])
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.shown = ""

    def until(self, text: str | None) -> str:
        """Reads until `text` is shown; None: until the end."""
        while text is None or text not in self.shown:
            try:
                self.shown += os.read(self.terminal, 4096).decode(errors="replace")
            except OSError:  # the command has ended
                assert text is None, self.shown
                break
        return self.shown

    def type(self, keys: bytes) -> None:
        os.write(self.terminal, keys)

    def code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_bar_in_a_terminal_and_ctrl_c_in_the_middle(folder, jsonl, tmp_path):
    data = jsonl("data.jsonl", [{"user": "user7"}])
    there = {*tmp_path.iterdir()}
    command = InTerminal("groups", "--model", folder, "--data", data, "--output", "out.jsonl", cwd=tmp_path)
    command.until("numbers of preference groups:  ")  # 0 % or 10 % of them
    command.type(b"\x03")
    shown = command.until(None)
    assert command.code() == 130 and "Traceback" not in shown
    said = "openrlhf-pgrpo groups: stopped; no file is half-written, and the same command begins again"
    assert said in shown.splitlines() and {*tmp_path.iterdir()} == there


def test_no_bars_where_output_is_no_terminal(factorized, jsonl, tmp_path):
    """Not even those of transformers and datasets."""
    data = jsonl("candidates.jsonl", [{"prompt": "p", "responses": ["x", "y"]}])
    words = ("rerank", "--model", factorized, "--user", "ana", "--candidates", data, "--output", "out.jsonl")
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    ran = subprocess.run([*COMMAND, *words], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "out.jsonl\n", "")


@pytest.mark.parametrize("command", ["patch", "factorize", "evaluate"])
def test_a_reader_who_leaves_is_no_error(tiny, factorized, jsonl, tmp_path, command):
    """As in `| head -1`. Of commands that say something on their way, it was an error of a file without a name."""
    users = ("new", "New")  # which both remark on
    data = jsonl("rows.jsonl", [dict(user=user, prompt="p", chosen="yes", rejected="no") for user in users])
    words = {
        "patch": ("--check",),
        "factorize": ("--data", data, "--backbone", tiny / "model", "--output", "rm", "--factors", "1", "--l2", "1"),
        "evaluate": ("--model", factorized, "--data", data),
    }[command]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as closed:
        call = [*COMMAND, command, *words]
        ran = subprocess.run(call, stdout=closed, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert (ran.returncode, ran.stderr) == (141, "")


def test_a_command_in_the_background_ends_when_it_is_told_to():
    """A shell makes such a command deaf to SIGINT, and a SIGTERM that became one was lost."""
    code = (
        "import signal, sys, time; from types import SimpleNamespace; from openrlhf_pgrpo.cli import main\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "work = lambda args: [print('at work', flush=True), time.sleep(100)]\n"
        "sys.exit(main.run(SimpleNamespace(command='patch', run=work)))"
    )
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as command:
        assert command.stdout.readline() == "at work\n"
        command.terminate()
        said = command.stderr.read()
    assert command.returncode == 130 and said.startswith("openrlhf-pgrpo patch: stopped; no file is half-written")


def test_ctrl_c_in_a_callback_of_c_is_not_lost():
    """scikit-learn's fits pass through many, and Python drops what is raised there."""
    code = (
        "import ctypes, signal, sys, time; from types import SimpleNamespace; from openrlhf_pgrpo.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from_c = ctypes.CFUNCTYPE(None)(lambda: signal.raise_signal(signal.SIGINT))\n"
        "work = lambda args: [from_c(), time.sleep(100)]\n"
        "sys.exit(main.run(SimpleNamespace(command='patch', run=work)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert ran.returncode == 130 and ran.stderr.startswith("openrlhf-pgrpo patch: stopped; no file is half-written")
