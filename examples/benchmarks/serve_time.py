"""Rewards per second of our serve_rm with base rewards and users, and of the host's with one reward.

    python examples/benchmarks/serve_time.py [FOLDER] [--seconds 2] [--rounds 40] [--policy MODEL_FOLDER]

Both servers have the same backbone and answer the same requests, in the host's protocol, one after another from one
client: single texts and 16 at once, texts of one length and of 10 to 1,000 tokens. Then 20 clients ask for single
texts, as the host's rollout does. Both servers run all the time. They are asked in short turns, in alternating order,
so that other work on the machine affects both. A ratio is the geometric mean over rounds of ours to the host's, with
a 95 % interval: once by the wall clock and once in processor time of the servers, which other work changes less. The
backbone is a two-layer Llama made on the spot unless --policy names another. The smaller it is, the larger the share
of added work.

FOLDER (default serve-time-run) gets models and logs.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from openrlhf_pgrpo.models.folder import Folder, write
from openrlhf_pgrpo.models.scalar_reward import export_user
from tiny_run import tiny_policy

FACTORS, USERS = 8, 1000
WORDS = "and every word of it counts, "
TEXTS, CLIENTS = 16, 20
LENGTHS = {"equal": np.full(TEXTS, 240), "mixed": np.geomspace(10, 1000, TEXTS).astype(int)}  # in tokens
NAMES = ("host", "ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("serve-time-run"))
    parser.add_argument("--seconds", type=float, default=2, help="of a turn")
    parser.add_argument("--rounds", type=int, default=40, help="turns of each server and size of request")
    parser.add_argument("--policy", type=Path, help="a Hugging Face folder; default: a tiny model made on the spot")
    args = parser.parse_args()
    if args.seconds <= 0 or args.rounds < 2:
        parser.error("needs --seconds above 0 and --rounds of at least 2")
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"needs a new or empty folder, got {folder}, which is not empty: name another or remove it")
    backbone = args.policy.resolve() if args.policy else tiny_policy(folder / "policy")
    models = write_models(backbone, folder)

    servers = {}
    try:
        servers = {name: Server(models[name], folder / f"{name}.log") for name in NAMES}
        for server in servers.values():
            server.wait()
        for kind, lengths in LENGTHS.items():
            texts = texts_of(backbone, lengths)
            single = [[text] for text in texts]
            for requests, clients in ((single, 1), ([texts], 1), (3 * single, CLIENTS)):
                print(f"{len(requests[0])} texts a request, {kind} lengths, {clients} clients: ", end="")
                compare(servers, requests, clients, args.rounds, args.seconds)
    finally:
        for server in servers.values():
            server.stop()


def texts_of(backbone: Path, lengths: np.ndarray) -> list[str]:
    """Different texts of so many tokens, with an end, as a rollout's."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    words = tokenizer(WORDS * max(lengths), add_special_tokens=False).input_ids
    starts = [tokenizer.decode(words[: length - 6]) for length in lengths]
    return [f"{number:04} {start}{tokenizer.eos_token}" for number, start in enumerate(starts)]


def write_models(backbone: Path, folder: Path) -> dict[str, Path]:
    """A factorized reward model on the backbone, and the plain reward model of one of its users."""
    rng = np.random.default_rng(0)
    head = rng.normal(size=(FACTORS, AutoConfig.from_pretrained(backbone).hidden_size))
    users = [f"user {number}" for number in range(USERS)]
    write(folder / "ours", backbone, head, rng.normal(size=(USERS, FACTORS)), users)
    model = Folder(folder / "ours")
    export_user(model, model.coefficients[0], folder / "host")
    return {name: folder / name for name in NAMES}


class Server:
    """serve_rm of `model`, through our door, because the host's own does not start on a CPU."""

    def __init__(self, model: Path, log: Path, *flags: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        command = [sys.executable, "-m", "openrlhf_pgrpo.cli.serve_rm", "--reward.model_name_or_path", str(model)]
        with open(log, "w") as out:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen([*command, *address, *flags], stdout=out, stderr=out, env=environment)

    def ask(self, texts: list[str], labels: list[str]) -> list[float]:
        body = json.dumps({"query": texts, "prompts": texts, "labels": labels}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/get_reward", body)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["rewards"]

    def wait(self) -> None:
        """Waits until the server answers.

        Raises:
            SystemExit: the server ended. The message has the end of its log.
        """
        deadline = time.monotonic() + 300
        while True:
            try:
                self.ask(["hello"], ["user 0"])
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"a server did not start:\n{self.log.read_text()[-3000:]}")
                time.sleep(0.2)

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def compare(servers: dict[str, Server], requests: list[list[str]], clients: int, rounds: int, seconds: float) -> None:
    rates = {name: [] for name in NAMES}
    for turn in range(rounds):
        for name in NAMES if turn % 2 == 0 else NAMES[::-1]:
            rates[name].append(measure(servers[name], requests, clients, seconds))
    for name in NAMES:
        print(f"{name} {np.median(rates[name], 0)[0]:.1f} texts a second; ", end="")
    for clock, of_host, of_ours in zip(("wall", "processor"), *(np.array(rates[name]).T for name in NAMES)):
        logs = np.log(of_ours / of_host)
        spread = 1.96 * logs.std(ddof=1) / np.sqrt(rounds)
        low, mean, high = np.exp(logs.mean() + [-spread, 0, spread])
        print(f"{clock} {mean:.4f}, 95 % interval {low:.4f} to {high:.4f}", end="; ")
    print(flush=True)


def measure(server: Server, requests: list[list[str]], clients: int, seconds: float) -> tuple[float, float]:
    """Texts a second of the wall clock, and of the server's processor time; whole rounds of the requests."""

    def ask(texts: list[str]) -> int:
        return len(server.ask(texts, [f"user {number % USERS}" for number in range(len(texts))]))

    with ThreadPoolExecutor(clients) as pool:
        began, used, count = time.perf_counter(), server.processor_seconds(), 0
        while time.perf_counter() < began + seconds:
            count += sum(pool.map(ask, requests))
    return count / (time.perf_counter() - began), count / (server.processor_seconds() - used)


if __name__ == "__main__":
    main()
