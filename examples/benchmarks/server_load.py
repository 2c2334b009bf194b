"""A factorized serve_rm under many clients at once: is a reward ever wrong, does the server grow, whom does it refuse?

    python examples/benchmarks/server_load.py [FOLDER] [--clients 200] [--seconds 300]

Clients ask as a rollout does, single texts of 10 to 1,000 tokens for users drawn at random, each as soon as it has its
last reward. Every reward is compared with the one that the server gave when nobody else asked; in bfloat16 the texts
that are read together change it a little, so "off" is the largest difference in standard deviations of rewards. MiB
are those of the server's process. Then the same for a server whose line is short (--max_body), where clients that find
it full are refused with 503, wait a second and ask again.

FOLDER (default server-load-run) gets the model and logs.
"""

import argparse
import random
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from serve_time import LENGTHS, USERS, Server, texts_of, write_models
from tiny_run import new_folder, tiny_policy

REPORTS = 5
SHORT = 6000  # bytes of the largest request of the second server, a little above the longest text; 16 of them may wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("server-load-run"))
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300, help="of the first server; the second has a fifth")
    args = parser.parse_args()
    if args.clients < 1 or args.seconds <= 0:
        parser.error("needs at least one client and --seconds above 0")
    folder = new_folder(parser, args.folder)
    model = write_models(tiny_policy(folder / "policy"), folder)["ours"]
    rng = random.Random(0)
    texts = [
        (text, f"user {rng.randrange(USERS)}") for text in texts_of(folder / "policy", np.tile(LENGTHS["mixed"], 4))
    ]
    for name, flags, seconds in (
        ("all may wait", [], args.seconds),
        ("few may wait", ["--max_body", str(SHORT)], args.seconds / REPORTS),
    ):
        print(f"{name}:", flush=True)
        server = Server(model, folder / f"{name.split()[0]}.log", *flags)
        try:
            server.wait()
            load(server, texts, args.clients, seconds)
        finally:
            server.stop()


class Counts:
    """What all clients have seen."""

    def __init__(self):
        self.lock, self.seconds, self.off, self.refused = threading.Lock(), [], 0.0, 0

    def add(self, seconds: float, off: float) -> None:
        with self.lock:
            self.seconds.append(seconds)
            self.off = max(self.off, off)

    def refuse(self) -> None:
        with self.lock:
            self.refused += 1


def load(server: Server, texts: list[tuple[str, str]], clients: int, seconds: float) -> None:
    alone = np.array([server.ask([text], [user])[0] for text, user in texts])
    counts, process, end = Counts(), psutil.Process(server.process.pid), time.monotonic() + seconds

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end:
            number = rng.randrange(len(texts))
            text, user = texts[number]
            began = time.monotonic()
            try:
                (reward,) = server.ask([text], [user])
            except urllib.error.HTTPError as refusal:
                if refusal.code != 503:
                    raise
                counts.refuse()
                time.sleep(1)
            else:
                counts.add(time.monotonic() - began, abs(reward - alone[number]) / alone.std())

    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(client, seed) for seed in range(clients)]
        for _ in range(REPORTS):
            time.sleep(seconds / REPORTS)
            print(f"{len(counts.seconds):9} rewards, off by at most {counts.off:.4f}, {counts.refused} refused, "
                  f"{process.memory_info().rss / 2**20:.0f} MiB", flush=True)  # fmt: skip
    for one in asking:
        one.result()
    waited = np.quantile(counts.seconds, (0.5, 0.99, 1))
    print("seconds until a reward: median {:.2f}, 99 % {:.2f}, longest {:.2f}".format(*waited), flush=True)


if __name__ == "__main__":
    main()
