"""What a process without a GPU does differently at its start."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.host

START = """
import gc, os, sys
from openrlhf_pgrpo.host import hooks
os.environ[hooks.DEVICE] = "cpu"
before = gc.get_threshold()
hooks.register({})
import transformers.generation.utils
print("sklearn" in sys.modules, gc.isenabled(), gc.get_threshold()[0] > 10 * before[0])
"""


def test_it_imports_no_scikit_learn_with_transformers_and_looks_for_garbage_less_often():
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "True"], done.stderr
