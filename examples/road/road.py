"""The whole road: from a file of ratings to a stranger who is served after ten answers.

    python examples/road/road.py [FOLDER] [--data RATINGS]        # `make road` does this

Every station is a command of the package; it is printed as a person would type it in FOLDER (default road-run), where
all files are. A station that is done is not done again: the same call goes on where one was interrupted. Without a
GPU, it takes two cores and at most 30 minutes.

RATINGS are rows of user, prompt, response, rating in any format that the commands read, or a folder with the votes of
a Polis conversation (votes.py).
"""

import argparse
import codecs
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "personas"))

from page import write_page  # noqa: E402
from votes import COLUMNS, as_csv, is_polis, ratings  # noqa: E402

from demo import follow  # noqa: E402  the demo's line for each step
from models import build_policy  # noqa: E402  the demo's policy

VOTES = HERE.parents[2] / "shared" / "data" / "polis" / "san_juan"
SERVED = 0.3  # of the stranger's responses, which no question is about: they are ranked
SLATE = 4  # responses are ranked at once
PROMPTS_PER_STEP, SAMPLES_PER_PROMPT, NEW_TOKENS = 16, 4, 32
WAITING = re.compile(r", q: $")  # where the terminal waits for an answer


class Rating(NamedTuple):
    user: str
    prompt: str
    response: str
    rating: float


class Road:
    """The stations, in order; each is a method, and `told` is what the page tells of them."""

    def __init__(self, folder: Path, data: Path, policy: Path, steps: int, pairs: int):
        self.folder, self.data, self.policy, self.steps, self.pairs = folder, data, policy, steps, pairs
        self.told: list[dict] = []

    def walk(self) -> None:
        self.write_ratings()
        self.station(
            "Ratings become pairs",
            "Three people in ten are held out: nothing of them is seen until they are asked.",
            f"openrlhf-pgrpo pairs --data ratings.csv --pairs {self.pairs} --output pairs.jsonl "
            "--hold_out users:0.3 --held_out strangers.jsonl",
        )
        self.station(
            "A reward model for everybody",
            "Base rewards that all share, read off the frozen policy, and a few coefficients for each person.",
            f"openrlhf-pgrpo factorize --data pairs.jsonl --backbone {self.policy} --chat_template {self.policy} "
            "--curve curve.svg --output reward-model",
            clear=("trained", "comparison", "stranger.json"),
        )
        self.station(
            "Does it know people?",
            "Those who were held out, before they say anything and after their first answers.",
            "openrlhf-pgrpo evaluate --model reward-model --data strangers.jsonl --output evaluation.json "
            "--page evaluation.html",
        )
        self.write_prompts()
        self.station(
            "Preference groups",
            "People who want alike, found in their coefficients.",
            "openrlhf-pgrpo groups --model reward-model --data prompts.jsonl --groups 2 --output grouped.jsonl",
        )
        self.station(
            "Training with P-GRPO",
            "Each answer is rewarded by the person it is for, against the history of that person's preference group.",
            " ".join(["python -m openrlhf_pgrpo.cli.train_ppo_ray", *self.training_flags()]),
            log=self.folder / "training.log",
            clear=("trained", "comparison"),
        )
        self.station(
            "The run",
            "Rewards and advantages of both preference groups, step by step.",
            "openrlhf-pgrpo report trained --output training.html",
        )
        self.station(
            "Did both preference groups gain?",
            "The trained policy against the one it started from, judged by the people's own rewards.",
            f"openrlhf-pgrpo compare --policies trained {self.policy} --data grouped.jsonl --model reward-model "
            f"--max_tokens {NEW_TOKENS} --output comparison",
        )
        stranger = self.write_stranger()
        self.station(
            "A stranger is asked",
            f"{stranger}, who was held out, gets ten questions; the real ratings answer them.",
            f"openrlhf-pgrpo elicit --model reward-model --pool pool.jsonl --user {stranger} --profile stranger.json",
            ask=True,
        )
        for who, flag in (("stranger", "--profile stranger.json"), ("anybody", "--population")):
            self.station(
                "The stranger is served" if who == "stranger" else "The same for anybody",
                "Responses that no question was about, the best first"
                + (", for this person." if who == "stranger" else ", for the average of the trained people."),
                f"openrlhf-pgrpo rerank --model reward-model {flag} --candidates slates.jsonl "
                f"--output served-{who}.jsonl",
            )

    def station(
        self,
        title: str,
        sentence: str,
        command: str,
        log: Path | None = None,
        ask: bool = False,
        clear: tuple[str, ...] = (),
    ) -> None:
        """Prints a command and runs it in the folder, unless it was done by an earlier call. `clear` are files and
        folders of earlier calls that nothing of this one may go on with."""
        print(f"\n{title}. {sentence}\n$ {command}", flush=True)
        done = self.folder / "done" / f"{len(self.told) + 1:02}.json"
        kept = json.loads(done.read_text()) if done.is_file() else {}
        if kept.get("command") == command:
            print("(done before)")
        else:
            self.forget()
            for name in clear:
                path = self.folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            output = self.answered(command) if ask else self.run(command, log)
            kept = {"title": title, "sentence": sentence, "command": command, "output": output}
            done.write_text(json.dumps(kept))
        self.told.append(kept)

    def forget(self) -> None:
        """Stations from here on will be done again, because they follow from what is about to change."""
        for number in range(len(self.told) + 1, 100):
            (self.folder / "done" / f"{number:02}.json").unlink(missing_ok=True)

    def write(self, name: str, text: str) -> None:
        """Writes a file that the next stations read, unless it is there already."""
        path = self.folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            self.forget()
            path.write_text(text, encoding="utf-8")

    def run(self, command: str, log: Path | None) -> str:
        """What a command prints, while it prints it; of one with a log, the line of each step."""
        if log is not None:
            return "\n".join(follow(words(command), log, cwd=self.folder))
        said = []
        with running(command, cwd=self.folder, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
                said.append(line)
        return "".join(said)

    def training_flags(self) -> list[str]:
        flags = {
            "--advantage_estimator": "pgrpo",
            "--actor.model_name_or_path": self.policy,
            "--reward.model_name_or_path": "reward-model",
            "--data.prompt_dataset": "grouped.jsonl",
            "--data.input_key": "prompt",
            "--data.user_key": "user",
            "--data.pref_group_key": "pref_group",
            "--data.max_samples": self.steps * PROMPTS_PER_STEP,
            "--data.max_len": 160,
            "--vllm.num_engines": 1,
            "--actor.num_gpus_per_node": 2,  # two ranks; without a GPU one per core
            "--rollout.batch_size": PROMPTS_PER_STEP,
            "--rollout.n_samples_per_prompt": SAMPLES_PER_PROMPT,
            "--rollout.micro_batch_size": 8,
            "--rollout.max_new_tokens": NEW_TOKENS,
            "--train.batch_size": PROMPTS_PER_STEP * SAMPLES_PER_PROMPT,
            "--train.micro_batch_size": 8,
            "--actor.adam.lr": 5e-5,
            "--algo.kl.init_coef": 0,
            "--ckpt.output_dir": "trained",
            "--ckpt.path": "checkpoints",
        }
        return [f"{flag} {value}" for flag, value in flags.items()] + ["--data.apply_chat_template"]

    # ---- files between the stations -----------------------------------------------------------------------------

    def write_ratings(self) -> None:
        if is_polis(self.data):
            self.ratings = [Rating(**row) for row in ratings(self.data)]
        else:
            from openrlhf_pgrpo.models.tables import read_table

            table = read_table(self.data, dict.fromkeys(COLUMNS, object))
            self.ratings = [
                Rating(str(row["user"]), row["prompt"], row["response"], float(row["rating"])) for row in table.rows
            ]
        self.write("ratings.csv", as_csv([one._asdict() for one in self.ratings]))
        print(f"{len(self.ratings)} ratings by {len({one.user for one in self.ratings})} people of {self.data}")

    def write_prompts(self) -> None:
        """Every person whom the model knows asks every prompt that was asked of them."""
        pairs = rows_of(self.folder / "pairs.jsonl")
        asked = dict.fromkeys((row["user"], row["prompt"]) for row in pairs)
        # Several rounds, so that any number of steps has enough prompts.
        rounds = -(-self.steps * PROMPTS_PER_STEP // len(asked))
        self.write("prompts.jsonl", lines([dict(user=u, prompt=p) for _ in range(rounds) for u, p in asked]))

    def write_stranger(self) -> str:
        """The pool and the slates of the held-out person with the most ratings of one prompt."""
        held = {row["user"] for row in rows_of(self.folder / "strangers.jsonl")}
        of: dict[tuple[str, str], list[Rating]] = {}
        for one in self.ratings:
            if one.user in held:
                of.setdefault((one.user, one.prompt), []).append(one)
        (stranger, prompt), mine = max(of.items(), key=lambda item: (len(item[1]), item[0]))
        rng = np.random.default_rng(0)
        mine = [mine[row] for row in rng.permutation(len(mine))]
        served, asked = mine[: round(SERVED * len(mine))], mine[round(SERVED * len(mine)) :]
        self.rated = {one.response: one.rating for one in mine}
        pool = [
            dict(prompt=prompt, a=one.response, b=other.response)
            for one, other in zip(asked, asked[1:] + asked[:1])
            if one.rating != other.rating
        ]
        slates = [served[start : start + SLATE] for start in range(0, len(served) - SLATE + 1, SLATE)]
        self.write("pool.jsonl", lines(pool))
        candidates = [dict(prompt=prompt, responses=[one.response for one in slate]) for slate in slates]
        self.write("slates.jsonl", lines(candidates))
        return stranger

    # ---- the stranger -------------------------------------------------------------------------------------------

    def answered(self, command: str) -> str:
        """Runs a command that asks in the terminal, and answers as the stranger rated; returns what was said."""
        environment = {**os.environ, "COLUMNS": "100000", "PYTHONUNBUFFERED": "1"}  # no line is broken
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        letters = codecs.getincrementaldecoder("utf-8")()  # one may come in two parts
        with running(command, cwd=self.folder, env=environment, **pipes) as process:
            said, seen = "", 0
            while chunk := os.read(process.stdout.fileno(), 1 << 16):
                new = letters.decode(chunk)
                said += new
                print(new, end="", flush=True)
                if WAITING.search(said, seen):
                    key = self.choice(said[seen:])
                    said, seen = f"{said}{key}\n", len(said) + 2
                    print(key, flush=True)
                    process.stdin.write(f"{key}\n".encode())
                    process.stdin.flush()
        return said

    def choice(self, question: str) -> str:
        """1 or 2: the answer that the stranger rated higher, of a question as the terminal shows it."""
        shown = question.splitlines()  # texts are indented, the keys above them are not
        first, second = (shown[len(shown) - shown[::-1].index(key)].strip() for key in ("1", "2"))
        return "1" if self.rated[first] > self.rated[second] else "2"

    def served(self) -> dict[str, float]:
        """The stranger's own mean rating of what each way of ranking puts first, with chance and the best possible."""
        slates = rows_of(self.folder / "slates.jsonl")
        ratings = [[self.rated[response] for response in row["responses"]] for row in slates]
        found = {"at random": np.mean([np.mean(slate) for slate in ratings])}
        for who, name in (("anybody", "for anybody"), ("stranger", "for this stranger")):
            rows = rows_of(self.folder / f"served-{who}.jsonl")
            found[name] = np.mean([self.rated[row["best"]] for row in rows])
        return {**found, "best possible": np.mean([max(slate) for slate in ratings])}


@contextmanager
def running(command: str, **options) -> Iterator[subprocess.Popen]:
    """A process, which ends when this one is ended, and has to end well."""
    with subprocess.Popen(words(command), **options) as process:
        try:
            yield process
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise SystemExit(f"that ended with {process.returncode}; once mended, the same call goes on from here")


def words(command: str) -> list[str]:
    """The words of a command; programs are those of this Python."""
    program, *rest = shlex.split(command)
    return [str(Path(sys.executable).parent / program), *rest]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("road-run"))
    parser.add_argument("--data", type=Path, default=VOTES, help="Ratings, or a folder of Polis. Default: San Juan")
    parser.add_argument("--policy", type=Path, help="Default: SmolLM2-135M-Instruct, built from its pip package")
    parser.add_argument("--steps", type=int, default=12, help="Of the training. Default: 12")
    parser.add_argument("--pairs", type=int, default=40, help="Drawn of each person's ratings. Default: 40")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a command that runs also ends
    if not args.data.exists():
        raise SystemExit(f"the road needs ratings, got no {args.data}: name a file or a folder with --data")
    (args.folder / "done").mkdir(parents=True, exist_ok=True)
    policy = build_policy() if args.policy is None else args.policy
    road = Road(args.folder.resolve(), args.data, policy.resolve(), args.steps, args.pairs)
    road.walk()
    served = road.served()
    print("\nthe stranger's own mean rating of what was put first:")
    for name, rating in served.items():
        print(f"  {name:18} {rating:+.2f}")
    print(f"\nthe story: {write_page(road.folder, road.told, served)}")


if __name__ == "__main__":
    main()
