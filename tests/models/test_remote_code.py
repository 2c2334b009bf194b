"""Python code that came with a model runs only if asked for, whatever the caller says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_pgrpo.models import remote_code

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parents[2]

CODE = """
import os
open({mark!r}, "w").close()
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast
class TheirConfig(LlamaConfig):
    model_type = {kind!r}
class TheirTokenizer(PreTrainedTokenizerFast):
    pass
def generate(*args, **kwargs):
    pass
"""
# The host's process: our hooks, then transformers, which is told to trust.
TRY = """
import json, os, sys
from pathlib import Path
os.environ["OPENRLHF_PGRPO_DEVICE"] = "cpu"
from openrlhf_pgrpo.host.ppo import worker
from openrlhf_pgrpo.models import remote_code
worker.setup()
import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module

def load(name, folder):
    return type(getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)).__name__

def outcome(work, *args):
    try:
        return work(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

found = {name: outcome(load, name, "theirs") for name in sys.argv[1:]}
found["below"] = outcome(get_class_from_dynamic_module, "theirs.TheirConfig", "theirs")
config = transformers.AutoConfig.from_pretrained("llama", trust_remote_code=True)
transformers.LlamaForCausalLM(config).save_pretrained("llama")
found["known"] = load("AutoModelForCausalLM", "llama")
found["ran"] = Path("mark").exists()
remote_code.trust()
found["trusted"] = load("AutoConfig", "theirs"), Path("mark").exists()
Path("found.json").write_text(json.dumps(found))
"""
NAMES = ("AutoConfig", "AutoTokenizer", "AutoFeatureExtractor", "AutoModelForCausalLM")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What came of loading model folders from somebody else, whose code leaves a mark when it runs."""
    place = tmp_path_factory.mktemp("models")
    for kind in ("theirs", "llama"):
        _hand_over(place, kind)
    environment = {**os.environ, "HF_MODULES_CACHE": str(place / "modules"), "PYTHONPATH": str(ROOT)}
    environment.pop(remote_code.VARIABLE, None)
    command = [sys.executable, "-c", TRY, *NAMES]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place)
    assert ended.returncode == 0, ended.stderr
    return json.loads((place / "found.json").read_text())


def _hand_over(place, kind):
    folder = place / kind
    (folder / "custom_generate").mkdir(parents=True)
    for name in ("theirs.py", "custom_generate/generate.py"):
        (folder / name).write_text(CODE.format(mark=str(place / "mark"), kind=kind))
    config = {"model_type": kind, "auto_map": {"AutoConfig": "theirs.TheirConfig"}, "architectures": ["X"]}
    config |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32}
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 16}))
    auto_map = {"AutoTokenizer": [None, "theirs.TheirTokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "tokenizer_class": "Theirs"}))
    features = {"auto_map": {"AutoFeatureExtractor": "theirs.TheirConfig"}, "feature_extractor_type": "Theirs"}
    (folder / "preprocessor_config.json").write_text(json.dumps(features))


@pytest.mark.parametrize("name", NAMES)
def test_e1_code_of_a_model_does_not_run_unless_asked_for(found, name):
    assert found[name].startswith("ValueError: theirs needs Python code of its own to be run"), found[name]
    assert "pass --trust_remote_code" in found[name] and not found["ran"]


def test_e1_the_function_below_all_of_these_does_not_run_it_either(found):
    """For names of functions that were bound before our hooks came."""
    assert "theirs.py needs Python code of its own to be run" in found["below"] and not found["ran"]


def test_e1_it_runs_if_asked_for(found):
    assert found["trusted"] == ["TheirConfig", True]


def test_e1_a_model_that_transformers_knows_is_loaded_without_its_code(found):
    """Its folder names code for the config and has a `generate` function; both are left alone."""
    assert found["known"] == "LlamaForCausalLM" and not found["ran"]


def test_e1_vllm_is_told_not_to_trust_whatever_the_host_says(monkeypatch):
    """Its engine hands this on to processes that our hooks do not reach."""

    class EngineArgs:
        def __init__(self, trust_remote_code):
            self.trust_remote_code = trust_remote_code
            self.__post_init__()

        def __post_init__(self):
            pass

    module = type(sys)("arg_utils")
    module.EngineArgs = EngineArgs
    remote_code.guard_vllm(module)
    monkeypatch.delenv(remote_code.VARIABLE, raising=False)
    assert EngineArgs(trust_remote_code=True).trust_remote_code is False
    monkeypatch.setenv(remote_code.VARIABLE, "1")
    assert EngineArgs(trust_remote_code=True).trust_remote_code is True


def test_e1_workers_of_ray_know_what_the_driver_knows(monkeypatch):
    from openrlhf_pgrpo.host.ppo import ray_start

    monkeypatch.setenv("OPENRLHF_PGRPO_DEVICE", "cpu")
    for trusted in ("0", "1"):
        monkeypatch.setenv(remote_code.VARIABLE, trusted)
        assert ray_start.worker_environment()["env_vars"][remote_code.VARIABLE] == trusted
