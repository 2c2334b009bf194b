"""A host that loads plug-ins (docs/upstream/plugins.md) takes our flags without a patch."""

import os
import subprocess
import sys

import pytest

from openrlhf_pgrpo.host import plugin

pytestmark = pytest.mark.host

FLAGS = {
    "serve_rm": "--reward.unknown_user",
    "train_dpo": "--data.pref_group_key",
    "train_ppo_ray": "--data.pref_group_key",
    "train_rm": "--reward.factors",
}


@pytest.fixture
def python(host_copy):
    """Runs Python where the host loads the plug-ins that are named."""
    host_copy.load_plugins()

    def run(*words, plugins="pgrpo"):
        environment = {**os.environ, **host_copy.environment, "OPENRLHF_PLUGINS": plugins}
        return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("script", FLAGS)
def test_the_hosts_own_script_takes_our_flags(python, script):
    done = python("-m", f"openrlhf.cli.{script}", "--help")
    assert done.returncode == 0 and FLAGS[script] in done.stdout, done.stderr


def test_a_refusal_names_the_script_and_comes_before_its_imports(python):
    done = python("-mopenrlhf.cli.train_dpo", "--data.pref_group_key", "a", "--robust.eta", "-1")
    assert done.returncode == 2
    assert "openrlhf.cli.train_dpo: error: --robust.eta needs a finite number >= 0, got -1" in done.stderr


def test_without_its_name_or_outside_a_script_nothing_happens(python):
    assert FLAGS["train_dpo"] not in python("-m", "openrlhf.cli.train_dpo", "--help", plugins="other").stdout
    code = "import sys, openrlhf; print([name for name in sys.modules if name.startswith('openrlhf_')])"
    assert python("-c", code).stdout == "['openrlhf_pgrpo', 'openrlhf_pgrpo.host', 'openrlhf_pgrpo.host.plugin']\n"


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
