"""What a process without a GPU does differently at its start."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.host

START = """
import os
from openrlhf_pgrpo.host import hooks
os.environ[hooks.DEVICE] = "cpu"
"""
LATER = """
import gc, sys
import transformers.generation.utils

def tell():
    print("sklearn" in sys.modules, gc.isenabled(), gc.get_threshold()[0] >= 7000, flush=True)
"""
IN_THIS_PROCESS = START + "hooks.register({})\nimport later\nlater.tell()"
IN_AN_ENGINE_CORE = (
    START
    + """
if __name__ == "__main__":
    hooks.register({})
    from vllm.v1.engine import utils
    import later
    core = utils.get_mp_context().Process(target=later.tell, name="EngineCore")
    core.start()
    core.join()
"""
)


@pytest.mark.parametrize("script", [IN_THIS_PROCESS, IN_AN_ENGINE_CORE])
def test_it_imports_no_scikit_learn_with_transformers_and_looks_for_garbage_less_often(script, tmp_path):
    (tmp_path / "later.py").write_text(LATER)
    (tmp_path / "start.py").write_text(script)
    spawn = {**os.environ, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    done = subprocess.run([sys.executable, tmp_path / "start.py"], capture_output=True, text=True, env=spawn)
    assert done.stdout.splitlines()[-1:] == ["False True True"], done.stdout + done.stderr
