"""The Dockerfiles, which the tests do not build: every instruction is linted, and only targets of the Makefile
install."""

import importlib.metadata
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "docker"
FILES = sorted(path.name for path in FOLDER.iterdir())
KEPT = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
# What a RUN may do apart from `make`: packages of the distribution, a user, a folder and an empty environment.
ALLOWED = (
    "apt-get update",
    "apt-get install --yes --no-install-recommends ",
    "add-apt-repository --yes ppa:deadsnakes/ppa",
    "rm -rf /var/lib/apt/lists/*",
    "useradd --create-home --uid 10001 trainer",
    "install --directory --owner=trainer /app",
    "python3.11 -m venv .venv",
)

TARGETS = {
    "Dockerfile.cpu": [["make", "requirements", "TORCH_PIP=--pre"], ["make", "venv"]],
    "Dockerfile.gpu": [["make", step, "PYTHON=.venv/bin/python"] for step in ("flash-attn", "install-gpu")],
}


def instructions(name):
    """Pairs of a keyword and the rest of its instruction, with continued lines joined and without comments."""
    lines = [line for line in (FOLDER / name).read_text().splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def following(name, keyword):
    return [" ".join(rest.split()) for word, rest in instructions(name) if word == keyword]


@pytest.fixture
def context(tmp_path):
    """The part of the checkout that .dockerignore lets through to the builder."""
    for kept in KEPT:
        source = ROOT / kept
        if source.is_dir():
            shutil.copytree(source, tmp_path / kept, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / kept)
    return tmp_path


def test_there_is_one_for_each_stack():
    assert FILES == ["Dockerfile.cpu", "Dockerfile.gpu"]


@pytest.mark.parametrize("name", FILES)
def test_hadolint_finds_nothing(name):
    hadolint = Path(sys.executable).with_name("hadolint")
    ended = subprocess.run([hadolint, "--failure-threshold", "style", FOLDER / name], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("name", FILES)
def test_no_rule_is_ignored_without_a_reason(name):
    lines = (FOLDER / name).read_text().splitlines()
    ignored = [i for i, line in enumerate(lines) if "hadolint ignore" in line]
    assert [lines[i] for i in ignored] == ["# hadolint ignore=DL3008"]  # packages without a version
    above = lines[ignored[0] - 4 : ignored[0]]
    assert "a pinned one is soon gone" in " ".join(above).replace(" # ", " ")


@pytest.mark.parametrize("name", FILES)
def test_what_is_installed_is_a_target_of_the_makefile(name, context):
    made = []
    for line in following(name, "RUN"):
        for command in line.split(" && "):
            if command.startswith("make "):
                made.append(shlex.split(command.replace("$TORCH_PIP", "--pre")))
            else:
                assert command in ALLOWED or re.fullmatch(re.escape(ALLOWED[1]) + r"[\w .-]+", command), command
    assert made == TARGETS[name]
    for words in made:
        done = subprocess.run([*words, "--dry-run"], cwd=context, check=True, capture_output=True, text=True)
        assert " -m pip install " in done.stdout
        assert (" --pre " in done.stdout) == ("TORCH_PIP=--pre" in words)


def test_the_readme_installs_what_the_makefile_does():
    install = 'pip install -c requirements-gpu.txt ".[gpu]"'
    assert install in (ROOT / "README.md").read_text()
    command = ["make", "--no-print-directory", "--dry-run", "install-gpu", "PYTHON=python3.11"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    assert done[-1] == f"python3.11 -m {install}"
    (flash_attn,) = [word for word in done[-2].split() if word.startswith("flash-attn==")]
    asked = map(Requirement, importlib.metadata.requires("openrlhf"))
    assert Requirement(flash_attn) in asked


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_requirements_come_first(name, context):
    copies, requirements = following(name, "COPY"), f"requirements-{name.removeprefix('Dockerfile.')}.txt"
    assert copies == [f"--chown=10001 Makefile {requirements} ./", "--chown=10001 . ."]
    assert all((context / file).is_file() for file in ("Makefile", requirements))
    order = [word for word, rest in instructions(name) if word == "COPY" or rest.startswith("make ")]
    assert order == ["COPY", "RUN", "COPY", "RUN"]


def test_the_builder_gets_all_that_is_installed_and_nothing_else(context):
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert [line for line in lines if line and line[0] not in "#!"] == ["*", "**/__pycache__"]
    packaged = subprocess.run([sys.executable, "setup.py", "--version"], cwd=context, capture_output=True, text=True)
    assert packaged.stdout.strip() == importlib.metadata.version("openrlhf-pgrpo"), packaged.stderr
    assert {"examples", "openrlhf_pgrpo", "patches", "tests"} <= set(KEPT)
    assert [name for name in KEPT if name.startswith(".") or "*" in name] == [".dockerignore"]  # which this test reads


@pytest.mark.parametrize("name", FILES)
def test_nobody_is_root_in_the_end_and_the_image_checks_itself(name):
    words = [word for word, _ in instructions(name)]
    assert following(name, "USER") == ["10001"] and words.index("USER") < words.index("COPY")
    assert following(name, "CMD") == ['["openrlhf-pgrpo", "doctor"]'] and "ENTRYPOINT" not in words
    assert "ENV PATH=/app/.venv/bin:$PATH" in (FOLDER / name).read_text() and following(name, "WORKDIR") == ["/app"]


def test_the_versions_agree_with_the_packages():
    setup, cpu, gpu = (path.read_text() for path in (ROOT / "setup.py", *map(FOLDER.joinpath, FILES)))
    python = re.search(r"\| Python \| ([\d.]+) \|", (ROOT / "README.md").read_text())[1]
    assert f"FROM python:{python}-slim-" in cpu and f"RUN python{python} -m venv .venv" in gpu
    # Other versions of torch and vLLM are built for other versions of CUDA: look it up, and say so.
    torch, vllm, cuda = re.search(r"torch ([\d.]+) and vllm ([\d.]+) are built for CUDA ([\d.]+)\.", gpu).groups()
    assert f'"torch=={torch}"' in setup and f'"vllm=={vllm}"' in setup
    assert f"FROM nvidia/cuda:{cuda}-devel-" in gpu
