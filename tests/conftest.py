"""What tests of several folders share: a tiny model with prompts and a reward function, made on the spot, a copy of
the installed host that may be patched, processes that are ended with all they started, Ray clusters of several nodes,
and a real headless Chromium."""

import importlib.metadata
import importlib.util
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tiny_run import end_all, marked, tiny_policy

PLUGINS = Path(__file__).resolve().parents[1] / "docs" / "upstream" / "plugins.md"
MARK = "OPENRLHF_PGRPO_TEST_RUN"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
TEMPLATE = (
    "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}"
    "{% if turn['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REWARD = """
import torch

def reward_func(queries, prompts, labels):
    assert type(labels[0]) is str, f"a label of type {type(labels[0])}"
    answer = queries[0][len(prompts[0]):]
    scale = {"ann": 1.0, "bob": 5.0, "cleo/3": 0.2}[labels[0]]
    vowels = scale * sum(letter in "aeiouAEIOU" for letter in answer)
    return {"rewards": torch.tensor([vowels]), "scores": torch.tensor([vowels]), "extra_logs": {"vowels": vowels}}
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a two-layer Llama (head_dim 32, as vLLM's CPU attention wants), prompts and a reward function."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_policy(folder / "model")
    rows = []
    for i in range(24):
        owner = {"persona": ["ann", "bob", "ann", "cleo/3"][i % 4], "who": f"u{i % 6}"}
        rows.append({"input": f"{i} says ", "answer": owner["persona"], **owner, "struct": {**owner, "nested": [i]}})
    write_jsonl(folder / "prompts.jsonl", rows)
    write_jsonl(folder / "eval.jsonl", [{"input": "who says ", "answer": "ann"}])
    (folder / "reward.py").write_text(REWARD)
    return folder


@pytest.fixture
def chat_policy(tiny, tmp_path) -> Path:
    """The tiny model with a chat template."""
    folder = Path(shutil.copytree(tiny / "model", tmp_path / "policy"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class HostCopy:
    """The installed host, files and metadata, in a folder that comes first where `environment` is used."""

    def __init__(self, folder: Path):
        self.folder = folder
        installed = Path(importlib.util.find_spec("openrlhf").origin).parent
        metadata = installed.with_name(f"openrlhf-{importlib.metadata.version('openrlhf')}.dist-info")
        shutil.copytree(installed, folder / "openrlhf", ignore=shutil.ignore_patterns("__pycache__"))
        self.metadata = Path(shutil.copytree(metadata, folder / metadata.name))
        self.script = folder / "openrlhf" / "cli" / "train_ppo_ray.py"
        self.environment = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}

    def come_first(self, monkeypatch) -> None:
        """Makes it what this process finds as the installed host."""
        spec = SimpleNamespace(origin=str(self.folder / "openrlhf" / "__init__.py"))
        mine, of_others = importlib.metadata.PathDistribution(self.metadata), importlib.metadata.distribution
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        monkeypatch.setattr(
            importlib.metadata, "distribution", lambda name: mine if name == "openrlhf" else of_others(name)
        )

    def load_plugins(self) -> None:
        """Makes the change that docs/upstream/plugins.md offers."""
        (change,) = re.findall(r"```diff\n(.*?)```", PLUGINS.read_text(), re.DOTALL)
        subprocess.run(["git", "apply"], cwd=self.folder, input=change, text=True, check=True)

    def pretend(self, version: str) -> None:
        """Says that it is of another version."""
        file = self.metadata / "METADATA"
        file.write_text(re.sub("(?m)^Version: .*", f"Version: {version}", file.read_text()))

    def files(self) -> dict[str, bytes]:
        """Every file of the host, by name."""
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}

    def command(self, *words: str) -> subprocess.CompletedProcess:
        """Runs `openrlhf-pgrpo` where this copy is the installed host."""
        return subprocess.run(
            [sys.executable, "-m", "openrlhf_pgrpo.cli.main", *words],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
        )


@pytest.fixture(scope="session")
def new_host_copy() -> type[HostCopy]:
    """The class, for a copy that a whole file of tests shares."""
    return HostCopy


@pytest.fixture
def host_copy(tmp_path) -> HostCopy:
    return HostCopy(tmp_path / "host")


class Started:
    """A process and all that it starts, however deep: they inherit a mark in their environment."""

    def __init__(self, command: list, log: Path, environment: dict[str, str]):
        self.log, self.mark = log, uuid.uuid4().hex
        environment = {**environment, **self.environment(self.mark)}
        with open(log, "a") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    @staticmethod
    def environment(mark: str) -> dict[str, str]:
        # Ray renames its processes. Without SPT_NOENV, the new name would overwrite the environment.
        return {MARK: mark, "SPT_NOENV": "1"}

    @property
    def pids(self) -> list[int]:
        """Those that are alive."""
        return self.marked(self.mark)

    @staticmethod
    def marked(mark: str) -> list[int]:
        """Processes with a mark in their environment."""
        return [*marked(f"{MARK}={mark}".encode())]

    def titles(self) -> dict[int, str]:
        """Their command lines, or the names that Ray gave them."""
        found = {}
        for pid in self.pids:
            with suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                found[pid] = b" ".join(words).decode(errors="replace")
        return found

    def titled(self, title: str) -> list[int]:
        """Those whose title begins so."""
        return [pid for pid, found in self.titles().items() if found.startswith(title)]

    def kill_one(self, title: str) -> None:
        os.kill(self.titled(title)[0], signal.SIGKILL)

    def kill(self) -> None:
        """Ends them all, by their ids; a second time it finds nobody."""
        if self.process.poll() is None:
            self.process.kill()
        end_all(f"{MARK}={self.mark}".encode())
        self.process.wait()

    def until(self, ready, timeout: float) -> None:
        """Waits until `ready()` is true while the process is alive."""
        deadline = time.monotonic() + timeout
        while not ready():
            assert self.process.poll() is None and time.monotonic() < deadline, self.tail()
            time.sleep(0.02)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def tail(self) -> str:
        return f"{self.log}:\n" + "\n".join(self.output().splitlines()[-60:])


@pytest.fixture(scope="session")
def started() -> type[Started]:
    """The class, for the conftest files of folders, which cannot import from this one."""
    return Started


class RayCluster:
    """Ray nodes on this machine, each with a name, resources, processes and an environment of its own.

    `address` is that of the cluster, for RAY_ADDRESS; `jobs` that of its job server, for `ray job submit --address`.
    """

    def __init__(self, folder: Path):
        self.folder, self.nodes = folder, {}
        folder.mkdir(parents=True, exist_ok=True)
        self.port, self.dashboard_port = free_port(), free_port()
        self.address, self.jobs = f"127.0.0.1:{self.port}", f"http://127.0.0.1:{self.dashboard_port}"
        # Ray's sockets lie in it, and their paths must not be longer than 107 characters.
        self.sockets = Path(tempfile.mkdtemp(prefix="ray"))

    def start_node(
        self, name: str, gpus: int = 0, cpus: int = 2, head: bool = False, python=sys.executable, **environment: str
    ) -> Started:
        """Starts a node and waits until it has joined. `kill()` on the result is the sudden death of the node."""
        where = {"--port": self.port, "--dashboard-port": self.dashboard_port, "--ray-client-server-port": free_port()}
        flags = {
            **(where if head else {"--address": self.address}),
            "--node-name": name,
            "--num-gpus": gpus,
            "--num-cpus": cpus,
            "--object-store-memory": 500_000_000,
            "--temp-dir": self.sockets / name,
            "--dashboard-agent-listen-port": free_port(),
            "--metrics-export-port": free_port(),
            # Chosen by the system: two nodes would both count up from 10002.
            "--min-worker-port": 0,
            "--max-worker-port": 0,
        }
        words = ["--head"] * head + [str(word) for pair in flags.items() for word in pair]
        inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # jobs call python and ray
        node = self.nodes[name] = Started(
            [python, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *words],
            self.folder / f"{name}.txt",
            {**inherited, "PATH": path, **environment},
        )
        node.until(lambda: "Ray runtime started" in node.output(), timeout=300)
        return node

    @property
    def alive(self) -> list[str]:
        """Names of the nodes that Ray counts as alive. It notices a dead one after some seconds."""
        with urllib.request.urlopen(f"{self.jobs}/api/v0/nodes", timeout=60) as answer:
            nodes = json.load(answer)["data"]["result"]["result"]
        return sorted(node["node_name"] for node in nodes if node["state"] == "ALIVE")

    def stop(self) -> None:
        for node in self.nodes.values():
            node.kill()
        shutil.rmtree(self.sockets, ignore_errors=True)


def free_port() -> int:
    """A port below those that the system hands out. One of these could be taken before a slow Ray uses it."""
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("", random.SystemRandom().randrange(20000, 32768)))  # tests may seed the others
                return probe.getsockname()[1]
            except OSError:
                continue


@pytest.fixture(scope="module")
def new_ray_cluster(tmp_path_factory):
    """Makes clusters that have no nodes yet, and ends what is left of them."""
    clusters = []

    def new_ray_cluster() -> RayCluster:
        clusters.append(RayCluster(tmp_path_factory.mktemp("cluster")))
        return clusters[-1]

    yield new_ray_cluster
    for cluster in clusters:
        cluster.stop()


class Recording:
    """What an estimator of a run receives. `flags` put the estimator into the run, which needs `environment`."""

    flags = ("--pgrpo.plugin", str(Path(__file__).parent / "recorder.py"), "--advantage_estimator", "recorded_pgrpo")

    def __init__(self, path: Path):
        self.path, self.environment = path, {"RECORD": str(path)}

    def runs(self) -> list[tuple]:
        """For each run, the state that it restored (None if it restored none) and every batch after it."""
        runs = []
        with open(self.path, "rb") as file:
            while file.peek(1):
                what, content = pickle.load(file)
                if what == "restored":
                    runs.append((content, []))
                elif not runs:
                    runs.append((None, [content]))
                else:
                    runs[-1][1].append(content)
        return runs

    @staticmethod
    def equal(one, other) -> bool:
        """Equality to the bit of nested states."""
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(Recording.equal(one[key], other[key]) for key in one)
        if isinstance(one, np.ndarray):
            return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
        return type(one) is type(other) and one == other


@pytest.fixture
def new_recording(tmp_path):
    return lambda name: Recording(tmp_path / f"{name}.pkl")


@pytest.fixture(scope="session")
def factorized(tiny, tmp_path_factory):
    """A folder with a factorized reward model: three base rewards, users ana, bob and cleo."""
    import torch

    from openrlhf_pgrpo.models.folder import write

    generator = torch.Generator().manual_seed(0)
    head, coefficients = (torch.randn(shape, generator=generator).numpy() for shape in ((3, 64), (3, 3)))
    folder = tmp_path_factory.mktemp("factorized")
    write(folder, tiny / "model", head, coefficients, ["ana", "bob", "cleo"])
    return folder


@pytest.fixture(scope="session")
def annotations(tmp_path_factory):
    """Users 0 to 3 prefer the answer with more exclamation marks, 4 to 7 the one with fewer; 40 pairs, each seen
    either way round."""
    rng = np.random.default_rng(0)
    rows = []
    for pair in range(40):
        loud, calm = (f"{rng.integers(1000)}{'!' * count}" for count in (rng.integers(6, 12), rng.integers(0, 4)))
        for user in range(8):
            chosen, rejected = (loud, calm) if user < 4 else (calm, loud)
            rows.append(dict(user=f"u{user}", prompt=f"{pair} says: ", chosen=chosen, rejected=rejected))
    path = tmp_path_factory.mktemp("annotations") / "pairs.jsonl"
    write_jsonl(path, rows)
    return path


@pytest.fixture
def jsonl(tmp_path):
    """Writes a JSONL file: rows, or lines as they are."""

    def jsonl(name, rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return jsonl


# ---- the real OpenRLHF modules, imported in this process through our hooks, without Ray ----


@pytest.fixture(scope="session", autouse=True)
def hooks():
    """What `Door.activate` does on a machine without a GPU, for the whole test session.

    Autouse, because it comes before the first test that imports the host, whichever that is in this process.
    """
    from openrlhf_pgrpo.host import hooks
    from openrlhf_pgrpo.host.cpu import launch
    from openrlhf_pgrpo.host.dpo.seams import SEAMS as DPO
    from openrlhf_pgrpo.host.ppo.seams import SEAMS as PPO

    os.environ.update({hooks.DEVICE: "cpu", **launch.environment()})
    reading = "openrlhf.datasets.utils"  # where PPO replaces what DPO does, and more
    hooks.register({**PPO, **DPO, reading: PPO[reading]})


@pytest.fixture(autouse=True)
def one_environment():
    """`datasets` replaces os.environ by a copy when it maps in several processes. A variable that a test removes
    afterwards would stay in the copy, for every process that a later test starts."""
    environment = os.environ
    yield
    os.environ = environment  # noqa: B003  this object, and not what is in it


@pytest.fixture
def host_parser(hooks):
    """A fresh parser, exactly as a script of the host builds it."""
    from openrlhf_pgrpo.host import script

    return lambda module="openrlhf.cli.train_ppo_ray": script.host_parser(module)


@pytest.fixture
def host_args(host_parser, tmp_path):
    """Nested host arguments from a command line, with our flags."""
    from openrlhf.utils.config import hierarchize

    from openrlhf_pgrpo.host.ppo import flags

    def parse(*argv):
        parser = host_parser()
        flags.extend(parser)
        args = parser.parse_args([*argv, "--ckpt.output_dir", str(tmp_path)])
        flags.check(args)
        return hierarchize(args)

    return parse


@pytest.fixture(scope="module")  # not longer: until it ends, Playwright's event loop counts as running in this thread
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    executable = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if executable is None:
        pytest.skip(f"needs a Chromium on the PATH, found none of {', '.join(CHROMIUM)}: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens a page: `with visit(path_or_address, width=..., dark=...) as seen` gives `page`, and what it asked for,
    complained of and popped up, as lists `requests`, `complaints` and `dialogs`."""

    @contextmanager
    def visit(address, width=1200, height=900, dark=False):
        address = address if "://" in str(address) else address.resolve().as_uri()
        scheme = "dark" if dark else "light"
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        page = context.new_page()
        seen = SimpleNamespace(page=page, requests=[], complaints=[], dialogs=[])
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on("console", lambda message: seen.complaints.append(message.text) if message.type != "log" else None)
        page.on("dialog", lambda dialog: (seen.dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        yield seen
        context.close()

    return visit


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Those that start Ray come first, because they take longest; pytest has folders in the order of their names."""
    items.sort(key=lambda item: not any(item.get_closest_marker(name) for name in ("e2e", "ray")))


def pytest_terminal_summary(terminalreporter):
    """How many different inputs the property tests had that record them."""
    counts = {
        report.nodeid: number
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, number in getattr(report, "user_properties", ())
        if name == "inputs"
    }
    if counts:
        terminalreporter.section(f"property tests: {sum(counts.values())} inputs in all")
        for test, number in counts.items():
            terminalreporter.write_line(f"{number} inputs: {test}")
