"""What we expect of the host, and what we say when it is not there."""

import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

import pytest

from openrlhf_pgrpo.host import hooks, versions

pytestmark = pytest.mark.host


def test_our_classes_are_in_the_hosts_modules():
    from openrlhf.trainer import ppo_trainer
    from openrlhf.trainer.ppo_utils import experience_maker

    assert experience_maker.RemoteExperienceMaker.__name__ == "PreferenceExperienceMaker"
    assert ppo_trainer.RemoteExperienceMaker is experience_maker.RemoteExperienceMaker


@pytest.mark.parametrize(
    "host, found",
    [
        (SimpleNamespace(__name__="host", f=lambda a, c: 0), r"needs host.f\(a, b\), found \(a, c\)"),
        (SimpleNamespace(__name__="host", f=lambda b, a: 0), r"found \(b, a\)"),
        (SimpleNamespace(__name__="host", f=1), "found nothing callable"),
        (SimpleNamespace(__name__="host"), r"found nothing callable: install one of the hosts .* openrlhf 0\.11\.2"),
    ],
)
def test_another_shape_is_refused(host, found):
    with pytest.raises(hooks.SeamError, match=found):
        hooks.check_contract(host, "f", ("a", "b"))


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.10")
    with pytest.raises(
        hooks.SeamError, match="needs openrlhf 0.11.2 or .*, found 0.9.10: pip install openrlhf==0.11.2"
    ):
        versions.check_version()


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("module", ["openrlhf.datasets.utils", "openrlhf.trainer.ray.vllm_engine"])
def test_hooks_that_come_too_late_are_refused(module):
    done = run(
        "import sys, types, os; os.environ['OPENRLHF_PGRPO_DEVICE'] = 'cpu'\n"
        f"sys.modules['{module}'] = types.ModuleType('late')\n"
        "from openrlhf_pgrpo.host.ppo import worker; worker.setup()"
    )
    assert f"needs to come before the host, got {module} already imported" in done.stderr


def test_the_parents_of_the_hosts_script_may_be_imported_before():
    done = run(
        "import os; os.environ['OPENRLHF_PGRPO_DEVICE'] = 'cpu'\n"
        "import openrlhf.cli; from openrlhf_pgrpo.host.ppo import worker; worker.setup()\n"
        "import torch; print(torch.cuda.current_device())"
    )
    assert done.stdout.strip() == "cpu", done.stderr  # the hook on the package itself has run at once


def test_the_hook_of_a_module_that_is_there_may_register_again():
    """As that of vLLM's engine core, which its own file does."""
    done = run(
        "import json, os; os.environ['OPENRLHF_PGRPO_DEVICE'] = 'cpu'\n"
        "from openrlhf_pgrpo.host import hooks; from openrlhf_pgrpo.host.cpu import patches\n"
        "patches.PATCHES['json'] = lambda module: hooks.register({})\n"
        "hooks.register({}); print(hooks.register.done)"
    )
    assert done.stdout.strip() == "{}", done.stderr


def test_the_worker_hook_imports_nothing_heavy():
    done = run(
        "import sys, os; os.environ['OPENRLHF_PGRPO_DEVICE'] = 'cpu'\n"
        "from openrlhf_pgrpo.host.ppo import worker; worker.setup()\n"
        "print(sorted({'torch', 'numpy', 'ray', 'openrlhf', 'vllm', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    assert done.stdout.strip() == "[]", done.stderr
