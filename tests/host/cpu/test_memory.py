"""Memory is kept where models are trained, in a process of its own: it would be kept in this one ever after."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.host

PROGRAM = """
import resource
from types import SimpleNamespace as Module

import torch

from openrlhf_pgrpo.host.cpu import patches

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**23)  # 32 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = pages()
patches.patch_strategy(Module(init_device_mesh=None, DeepspeedStrategy=Module(moving_average=None)))
pages()
print(before, pages())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_who_trains_has_pages_cleared_once():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before > 1000 and after < before / 100
