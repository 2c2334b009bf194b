"""What the pages print is true: commands parse, flags exist, links lead somewhere, code runs."""

import argparse
import importlib.util
import json
import re
import shlex
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from openrlhf_pgrpo.cli.main import command_line
from openrlhf_pgrpo.core import estimator
from openrlhf_pgrpo.core.pgrpo import PGRPOOptions
from openrlhf_pgrpo.host import doors
from openrlhf_pgrpo.host.ppo.estimators import ROBUST_ESTIMATORS
from openrlhf_pgrpo.models import folder

pytestmark = pytest.mark.host

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ["docs/clusters.md", "docs/group_robust.md", "docs/internals.md", "docs/pgrpo.md", "docs/users.md"]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, "patches/README.md", "examples/launch/README.md"]
TEXTS = {page: (ROOT / page).read_text() for page in LINKED}
README = TEXTS["README.md"]

DOORS = {door.script.replace("openrlhf.", "openrlhf_pgrpo."): door for door in (doors.PPO, doors.DPO, doors.RM)}
DOORS |= {"openrlhf.cli.train_ppo_ray": doors.PPO, "openrlhf_pgrpo.cli.serve_rm": doors.SERVE}  # the first: patched
FOLDERS = {path.name for parent in (ROOT, ROOT / "openrlhf_pgrpo") for path in parent.iterdir() if path.is_dir()}
# Flags of programs that are neither ours nor the host's.
FOREIGN = {"--index-url", "--module", "--help", "--nodes"}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], re.DOTALL)


def commands(page):
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.strip()]


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(estimator, "_estimators", dict(estimator._estimators))
    monkeypatch.setattr(estimator, "_option_classes", estimator.option_classes())


@pytest.fixture
def plugin(registry, tmp_path, monkeypatch):
    """The README's plug-in, known by its name and as a file in the current folder."""
    monkeypatch.chdir(tmp_path)
    (code,) = (block for block in blocks("README.md", "python") if "register_advantage_estimator" in block)
    Path("mine.py").write_text(code)
    estimator.load_plugin("mine.py")


# ---- commands ----


@pytest.mark.parametrize("page, command", [(page, command) for page in PAGES for command in commands(page)])
def test_every_command_is_one_that_works(page, command, host_parser, tiny, plugin):
    folder.write("rm", tiny / "model", np.ones((1, 64)), np.ones((1, 1)), ["ben"])
    config = json.loads(Path("rm/config.json").read_text())  # texts of the length that the host's default allows
    longer = {"max_position_embeddings": 2048, "base_reward_max_length": 2048}
    Path("rm/config.json").write_text(json.dumps(config | longer))
    words = shlex.split(command)
    while "=" in words[0]:  # variables
        words.pop(0)
    if words[0] == "make":
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["pip", "install"]:
        *constraints, what = words[2:]
        assert not constraints or constraints[0] == "-c" and (ROOT / constraints[1]).is_file()
        extras = what.removeprefix(".").strip("[]")
        assert not extras or f'"{extras}": ' in (ROOT / "setup.py").read_text()
    elif words[0] == "openrlhf-pgrpo":
        command_line().parse_args(words[1:])
    elif words[0] == "sbatch" or words[0].startswith("examples/launch/"):
        assert (ROOT / words[-1]).is_file()  # tests/examples/test_launch.py runs it
    elif words[1].startswith("examples/"):
        script = (ROOT / words[1]).read_text()  # its own test runs it
        assert all(has_flag(script, word) for word in words[2:] if word.startswith("--"))
    elif words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests"))
        assert words[3] != "-m" or f'"{words[4]}: ' in (ROOT / "pyproject.toml").read_text()
    else:
        door, parser = DOORS[words[2]], host_parser(DOORS[words[2]].script)
        door.extend(parser)
        door.check(parser.parse_args(words[3:]))


def has_flag(script: str, flag: str) -> bool:
    """Whether a script adds a flag by its name, or for the field of a dataclass."""
    return f'"{flag}"' in script or f"\n    {flag[2:]}: " in script


def test_the_readme_has_make_demo_and_make_test():
    assert {"make demo", "make test"} <= {*commands("README.md")}


# ---- flags ----


@pytest.fixture(scope="module")
def generator():
    """docs/flags.py"""
    spec = importlib.util.spec_from_file_location("docs_flags", ROOT / "docs" / "flags.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_flags_is_up_to_date(generator, hooks):
    assert TEXTS["docs/flags.md"] == generator.page(), "write it again: make flags"


def test_the_generator_is_what_make_flags_runs():
    words = subprocess.run(["make", "flags", "--dry-run"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "docs/flags.py" in words


@pytest.fixture
def flags(host_parser, plugin):
    """All flags of scripts, ours with their defaults, and those of the command `openrlhf-pgrpo`."""
    host, ours = set(), {}
    for door in (doors.PPO, doors.DPO, doors.RM, doors.SERVE):
        parser = host_parser(door.script)
        host |= {*parser._option_string_actions}
        of_host = {*parser._actions}
        door.extend(parser)
        ours |= {a.option_strings[0]: a.default for a in parser._actions if a not in of_host}
    (subparsers,) = (a for a in command_line()._actions if isinstance(a, argparse._SubParsersAction))
    command = {flag for parser in subparsers.choices.values() for flag in parser._option_string_actions}
    return SimpleNamespace(host=host, ours=ours, command=command)


@pytest.mark.parametrize("page", LINKED)
def test_every_flag_that_is_named_exists(page, flags):
    named = {flag.rstrip(".") for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", TEXTS[page])}
    scripts = "".join(path.read_text() for path in (ROOT / "examples").rglob("*.py"))
    of_scripts = {flag for flag in named if has_flag(scripts, flag)}
    of_make_and_git = {"--check", "--revert", "--full-index", "--reverse"}
    unknown = named - flags.host - {*flags.ours} - flags.command - of_scripts - FOREIGN - of_make_and_git
    namespaces = {flag.split(".")[0] for flag in {*flags.ours, *flags.host}}
    assert not {flag for flag in unknown if flag not in namespaces}


@pytest.mark.parametrize("page", GUIDES)
def test_the_defaults_in_the_tables_are_the_defaults(page, flags):
    options = TEXTS[page].split("\n## Options\n")[1].split("\n## ")[0]
    for flag, shown in re.findall(r"^\| `(--[\w.]+)` \|(.*?)\|", options, re.MULTILINE):
        default = flags.ours[flag]
        word = "none" if default is None else "off" if default is False else re.sub(r"e-0*", "e-", f"{default}")
        assert shown.strip().strip("`") == word, flag


def test_every_estimator_is_described(registry):
    described = re.findall(r"^\| `(\w+)` \|", TEXTS["docs/pgrpo.md"].split("## Options")[0], re.MULTILINE)
    assert {*described} == {*estimator.advantage_estimators(), *ROBUST_ESTIMATORS}


# ---- the README's minute ----


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 170


def test_the_row_of_prompts_has_the_columns_that_the_command_names():
    (block,) = blocks("README.md", "json")
    row = json.loads(block)
    (command,) = (command for command in commands("README.md") if "reward.py" in command)
    words = shlex.split(command)
    for flag in ("--data.pref_group_key", "--data.input_key", "--data.label_key"):
        assert row[words[words.index(flag) + 1]]


def test_without_two_lines_the_command_is_one_for_a_cpu(host_parser):
    """The hooks of the tests have chosen the CPU, so `parse_args` refuses what needs a GPU."""
    (block,) = (block for block in blocks("README.md", "bash") if "reward.py" in block)
    lines = block.splitlines()
    (first,) = (number for number, line in enumerate(lines) if "--train.colocate_all" in line)
    words = " ".join(line.rstrip("\\") for line in lines[:first] + lines[first + 2 :]).split()
    args = doors.PPO.parse_args(host_parser(doors.PPO.script), words[3:])
    assert vars(args)["ds.attn_implementation"] == "sdpa"
    with pytest.raises(SystemExit):
        doors.PPO.parse_args(host_parser(doors.PPO.script), block.replace("\\\n", " ").split()[3:])


def test_the_reward_function_runs_as_the_host_calls_it(tmp_path):
    (code,) = (block for block in blocks("README.md", "python") if "def reward_func" in block)
    assert len([line for line in code.splitlines() if line]) <= 6
    found = {}
    exec(code, found)
    (block,) = blocks("README.md", "json")
    row = json.loads(block)
    answer = " Metal. Nothing but metal!"  # the word twice
    result = found["reward_func"]([row["prompt"] + answer], [row["prompt"]], [row["answer"]])
    assert result["rewards"].tolist() == [2.0] and result["scores"].shape == (1,)


def test_the_plugin_runs_with_its_option(plugin, host_parser):
    parser = host_parser(doors.PPO.script)
    doors.PPO.extend(parser)
    args = parser.parse_args(["--advantage_estimator", "winsorized", "--winsorized.limit", "2"])
    options = estimator.option_classes()["winsorized"](limit=vars(args)["winsorized.limit"])
    assert options.limit == 2 and issubclass(type(options), PGRPOOptions)
    made = estimator.make_advantage_estimator("winsorized", options)
    rewards = np.r_[np.zeros(99), 1000.0]
    batch = estimator.RewardBatch(rewards, np.arange(100), ["a"] * 100, [None] * 100, [""] * 100)
    assert made(batch).max() == 2 and made.state_dict()["history"]["seen"] == [100]


def test_the_versions_are_those_that_are_installed_together():
    (gpu_stack,) = re.findall(r"GPU_HOST = \[(.*?)\n\]", (ROOT / "setup.py").read_text(), re.DOTALL)
    pins = re.findall(r'"([\w-]+)(?:\[\w+\])?==([\d.]+)"', gpu_stack)
    section = " ".join(README.split("## Versions and limits")[1].split())
    assert all(f"{name} {version}" in section for name, version in pins)


# ---- links and sources ----


def anchors(text):
    """The anchors of the headings, as the common code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", TEXTS[page]) + re.findall(r'src="([^"]+)"', TEXTS[page])
    for link in links:
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text()), link


@pytest.mark.parametrize("page", LINKED)
def test_every_file_that_is_named_exists(page):
    """By its path from the root, from the page, or from the package."""
    for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|sh|sbatch|md|jsonl|patch))`", TEXTS[page]):
        ours = name.split("/")[0] in FOLDERS
        places = [ROOT, (ROOT / page).parent, ROOT / "openrlhf_pgrpo"]
        assert not ours or any((place / name).exists() for place in places), name


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/") and page != "docs/flags.md"])
def test_figures_name_the_script_that_made_them(page):
    whole = page == "docs/performance.md"  # is nothing but figures
    evidence = TEXTS[page] if whole else TEXTS[page].split("\n## Evidence\n")[1].split("\n## ")[0]
    scripts = re.findall(r"examples/[\w/]+\.(?:py|sbatch)", evidence)
    assert scripts and all((ROOT / script).is_file() for script in scripts)


def test_the_findings_of_the_readme_name_the_script_that_made_them():
    findings = README.split("## Three findings")[1].split("\n## ")[0].split("\n- ")[1:]
    assert len(findings) == 3
    for finding in findings:
        scripts = re.findall(r"examples/[\w/]+\.py", finding)
        assert scripts and all((ROOT / script).is_file() for script in scripts)


@pytest.mark.parametrize("page", GUIDES)
def test_guides_are_built_alike(page):
    headings = re.findall(r"^## (.*)$", TEXTS[page], re.MULTILINE)
    assert headings == ["Problem", "Smallest example", "How it works", "Options", "Evidence", "Limits"]


def test_the_examples_of_style_are_from_the_tree():
    def bare(text):
        return "\n".join(line.strip() for line in text.strip().splitlines())

    files = [bare(path.read_text()) for path in (ROOT / "openrlhf_pgrpo").rglob("*.py")]
    examples = blocks("CONTRIBUTING.md", "python")
    assert len(examples) == 2
    assert all(any(bare(example) in file for file in files) for example in examples)


def test_no_page_names_this_machine():
    places = (str(ROOT), f"{Path.home()}/", f"{tempfile.gettempdir()}/")
    assert not [page for page, text in TEXTS.items() if any(place in text for place in places)]
