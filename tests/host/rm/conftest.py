"""The host as the reward-model trainer sees it: its flags, and its modules without what PPO and DPO put into them."""

import importlib
import importlib.util
import sys

import pytest

from openrlhf_pgrpo.host import doors
from openrlhf_pgrpo.host.flags import nest


@pytest.fixture
def parse(host_parser, tiny):
    """Nested arguments of the reward-model trainer from a command line, as its script gets them."""

    def parse(*argv):
        words = ("--model.model_name_or_path", tiny / "model", "--data.max_len", 64, *argv)
        return nest(doors.RM.parse_args(host_parser(doors.RM.script), [str(word) for word in words]))

    return parse


@pytest.fixture
def fresh(hooks, monkeypatch):
    """A copy of a module of the host, untouched, instead of the one that has been imported."""

    def fresh(name):
        importlib.import_module(name)
        module = importlib.util.module_from_spec(importlib.util.find_spec(name))
        module.__spec__.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        monkeypatch.setattr(importlib.import_module(parent), child, module)  # `datasets` pickles by name
        return module

    return fresh
