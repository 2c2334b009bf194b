"""A host that is patched, or that loads plug-ins (docs/upstream/plugins.md), takes our flags by itself."""

import os
import runpy
import subprocess
import sys

import pytest

from openrlhf_pgrpo.host import doors, plugin
from openrlhf_pgrpo.host.door import Door

pytestmark = pytest.mark.host

FLAGS = {
    "serve_rm": "--reward.unknown_user",
    "train_dpo": "--data.pref_group_key",
    "train_ppo_ray": "--data.pref_group_key",
    "train_rm": "--reward.factors",
}


@pytest.fixture(scope="module")
def patched(new_host_copy, tmp_path_factory):
    host = new_host_copy(tmp_path_factory.mktemp("patched"))
    assert host.command("patch").returncode == 0
    return host


@pytest.fixture(scope="module")
def with_plugins(new_host_copy, tmp_path_factory):
    host = new_host_copy(tmp_path_factory.mktemp("with_plugins"))
    host.load_plugins()
    return host


def python(host, *words, plugins="pgrpo"):
    """Runs Python where this is the host. One that loads plug-ins loads those that are named."""
    environment = {**os.environ, **host.environment, "OPENRLHF_PLUGINS": plugins}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("script", FLAGS)
@pytest.mark.parametrize("host", ["patched", "with_plugins"])
def test_the_hosts_own_script_takes_our_flags(request, host, script):
    done = python(request.getfixturevalue(host), "-m", f"openrlhf.cli.{script}", "--help")
    assert done.returncode == 0 and FLAGS[script] in done.stdout, done.stderr


@pytest.mark.parametrize("script", FLAGS)
def test_our_own_module_leaves_all_calls_to_a_patched_script(patched, script, monkeypatch):
    """A process opens one door, once."""
    done = []
    patched.come_first(monkeypatch)
    monkeypatch.setattr(Door, "activate", lambda door: done.append("activate"))
    monkeypatch.setattr(runpy, "run_module", lambda module, run_name: done.append((module, run_name)))
    (door,) = (door for door in vars(doors).values() if getattr(door, "script", "") == f"openrlhf.cli.{script}")
    door.run()
    assert done == [(door.script, "__main__")]


def test_a_refusal_names_the_script_and_comes_before_its_imports(with_plugins):
    done = python(with_plugins, "-mopenrlhf.cli.train_dpo", "--data.pref_group_key", "a", "--robust.eta", "-1")
    assert done.returncode == 2
    assert "openrlhf.cli.train_dpo: error: --robust.eta needs a finite number >= 0, got -1" in done.stderr


def test_without_its_name_or_outside_a_script_nothing_happens(with_plugins):
    plain = python(with_plugins, "-m", "openrlhf.cli.train_dpo", "--help", plugins="other")
    assert FLAGS["train_dpo"] not in plain.stdout
    code = "import sys, openrlhf; print([name for name in sys.modules if name.startswith('openrlhf_')])"
    imported = python(with_plugins, "-c", code).stdout
    assert imported == "['openrlhf_pgrpo', 'openrlhf_pgrpo.host', 'openrlhf_pgrpo.host.plugin']\n"


@pytest.mark.parametrize(
    "whole, own, module",
    [
        (["python", "-m", "a.b", "-m", "c"], ["-m", "-m", "c"], "a.b"),
        (["python", "-u", "-ma.b"], ["-m"], "a.b"),
        (["python", "a/b.py", "-m", "c"], ["a/b.py", "-m", "c"], None),
        (["python", "-c", "pass"], ["-c"], None),
    ],
)
def test_the_module_that_python_is_about_to_run(monkeypatch, whole, own, module):
    monkeypatch.setattr(sys, "orig_argv", whole)
    monkeypatch.setattr(sys, "argv", own)
    assert plugin.started_module() == module
