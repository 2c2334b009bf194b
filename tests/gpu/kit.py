"""Collects in a folder what a GPU machine without a package index lacks: wheels of our package, of the host, of
DeepSpeed and of their small needs, for the Python of that machine. Models are made there, by the tests.

What is large is expected there, see `EXPECTED`. All versions are those of requirements-cpu.txt.

    python tests/gpu/kit.py gpu-kit --python 3.12
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = ("torch", "numpy", "scipy", "sklearn", "pandas", "pyarrow", "pytest")  # by the names that are imported
MOST = 60 * 2**20  # bytes
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
BUILT = ("deepspeed",)  # a source distribution; without compiled kernels it runs on any machine
WHEELS = """
    openrlhf transformers tokenizers huggingface_hub hf-xet safetensors accelerate peft datasets torchdata
    annotated-doc annotated-types anyio certifi charset-normalizer click dill einops fastapi filelock fsspec h11 hjson
    httpcore httpx idna Jinja2 MarkupSafe msgpack multiprocess ninja packaging psutil py-cpuinfo pydantic pydantic_core
    pylatexenc PyYAML regex requests sentencepiece starlette tqdm typing-inspection typing_extensions unidiff urllib3
    uvicorn wrapt xxhash
""".split()


def collect(folder: Path, python: str) -> None:
    """Fills `folder` anew with wheels for Linux on x86-64.

    Raises:
        ValueError: the folder has something else in it, or the wheels are larger than what may travel.
    """
    old = list(folder.iterdir()) if folder.is_dir() else []
    if others := sorted(file.name for file in old if file.suffix != ".whl"):
        raise ValueError(f"the kit needs a folder of its own, got {others[0]} in {folder}: name another one")
    for wheel in old:
        wheel.unlink()
    pins = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "requirements-cpu.txt").read_text(), re.MULTILINE))
    there = ("--only-binary=:all:", "--implementation=cp", f"--python-version={python}")
    platforms = [f"--platform={name}" for name in PLATFORMS]
    pip("download", f"--dest={folder}", *there, *platforms, *(f"{name}=={pins[name]}" for name in WHEELS))
    pip("wheel", f"--wheel-dir={folder}", str(ROOT), *(f"{name}=={pins[name]}" for name in BUILT))
    files = list(folder.iterdir())
    size = sum(file.stat().st_size for file in files)
    if size > MOST:
        raise ValueError(f"the kit needs to be under {MOST / 2**20:.0f} MiB, got {size / 2**20:.1f}: take wheels out")
    print(f"{folder}: {len(files)} wheels for Python {python}, {size / 2**20:.1f} MiB")


def pip(command: str, *words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *words], check=True)


def install(folder: Path, target: Path) -> str | None:
    """Installs a kit into a folder, without an index. Returns what pip says if the wheels do not fit this Python."""
    offline = ("--no-index", "--no-deps", "--no-compile", "--quiet", f"--target={target}")
    wheels = [str(wheel) for wheel in sorted(folder.glob("*.whl"))]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *offline, *wheels], capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="the Python of the GPU machine. Default: 3.12")
    options = parser.parse_args()
    try:
        collect(options.folder, options.python)
    except ValueError as refusal:
        raise SystemExit(str(refusal)) from refusal
