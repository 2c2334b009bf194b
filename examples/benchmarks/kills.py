"""Ends parts of runs by SIGKILL at random moments, gives the same commands again, and checks what is lost or left.

    python examples/benchmarks/kills.py FOLDER [--trials 72] [--only NAME ...] [--seed 0]

A trial is a kind of run on a tiny model, a victim in it, and a moment that is drawn from the seed. The run has to end
in bounded time, to say what died, and to leave no process. The same command then has to go on from the newest whole
checkpoint, with weights and histories that equal it to the bit, make as many updates as a run that nobody killed, and
leave no shared memory and no temporary file of ours. Commands and runs without Ray also have to give the very files
that they give unkilled. Some trials kill nobody: the disk fills up, the clock jumps, a second driver comes, the folder
cannot be written, a checkpoint is cut short.

Prints a line a trial, and at the end a table. Trials whose outcome is in FOLDER are not made again; delete
outcomes/NUMBER.json to make one again. The exit code is 1 if a trial failed. --only takes kinds, victims and
KIND/VICTIM. As root on Linux it has a /dev/shm and small disks of its own, which nobody else sees. Without, shared
memory is not looked at, and trials of disks say that they cannot be made.

A small program in every process (`PROBE`) counts what is written, and at a chosen write kills its process, fills the
disk or moves the clock. It also saves again what a resumed run has loaded.
"""

import argparse
import hashlib
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid
import zipfile
from collections import Counter, defaultdict
from contextlib import ExitStack, suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

from openrlhf_pgrpo.files import write_rows, write_whole
from openrlhf_pgrpo.models.folder import write as write_reward_model
from tiny_run import LONGEST_RUN, PROMPTS, USERS, flags, marked, started, tail, tiny_policy, write_data
from two_nodes import NODES, free_port
from two_nodes import start as start_node

BOUND = 120  # seconds until all of a run has ended after a part of it died
STEPS, EVERY, QUESTIONS = 8, 2, 6  # steps of a run, from a checkpoint to the next, questions of the page
TRIALS = 72  # of them 52 kill
PRIVATE = "KILLS_PRIVATE"
ALSO = ("disk full", "clock", "second driver", "read-only folder", "truncated checkpoint")  # nobody is killed
VICTIMS = {  # by kind of run, the fast ones first
    "factorize": ("writer",),
    "export-user": ("writer",),
    "rerank": ("writer",),
    "elicit": ("page",),
    "rm": ("driver", "writer"),
    "dpo": ("driver", "writer", *ALSO),
    "dpo zero-3": ("driver", "rank", "writer"),
    "compare": ("writer",),
    "sync": ("driver", "trainer", "rank", "engine", "reward server", "writer", *ALSO),
    "async": ("driver", "trainer", "sampler", "rank", "engine", "reward server", "writer"),
    "zero-3": ("driver", "trainer", "rank", "engine", "node", "writer"),
}
ON_RAY = ("sync", "async", "zero-3")
PAIRS = (
    "--model.model_name_or_path {made}/policy --data.dataset {made}/pairs.jsonl --data.prompt_key prompt "
    "--data.max_len 64 --train.batch_size 8 --train.micro_batch_size 4 --adam.lr 1e-3 --ckpt.output_dir {run}/model "
    f"--ckpt.path {{run}}/checkpoints --logger.metrics_path {{run}}/metrics.jsonl --ckpt.save_steps {EVERY} "
    "--ckpt.load_enable"
)
# With the learning rate of the other benchmarks all checkpoints would be equal.
PPO = (
    "openrlhf_pgrpo.cli.train_ppo_ray {flags} --advantage_estimator pgrpo --data.pref_group_key persona "
    f"--data.user_key user --actor.adam.lr 1e-2 --ckpt.save_steps {EVERY} --ckpt.load_enable "
    "--actor.num_gpus_per_node 1 --pgrpo.device cpu "
)
RUNS = {
    "factorize": "openrlhf_pgrpo.cli.main factorize --data {made}/pairs.jsonl --backbone {made}/policy --factors 1 "
    "--l2 1 --output {run}/model",
    "export-user": "openrlhf_pgrpo.cli.main export-user --model {made}/rewards --user 'user 01' --output {run}/model",
    "rerank": "openrlhf_pgrpo.cli.main rerank --model {made}/rewards --user 'user 01' "
    "--candidates {made}/candidates.jsonl --output {run}/best.jsonl",
    "elicit": "openrlhf_pgrpo.cli.main elicit --model {made}/rewards --pool {made}/pool.jsonl --user eve --web "
    f"--questions {QUESTIONS} --profile {{run}}/eve.json",
    "compare": "openrlhf_pgrpo.cli.main compare --policies {made}/policy {made}/policy --data {made}/prompts.jsonl "
    "--model {made}/rewards --max_tokens 16 --output {run}/compared",
    "rm": f"openrlhf_pgrpo.cli.train_rm {PAIRS} --reward.factors 2 --data.user_key user "
    "--eval.dataset {made}/pairs.jsonl --eval.split train",
    "dpo": f"openrlhf_pgrpo.cli.train_dpo {PAIRS} --data.pref_group_key user",
    "dpo zero-3": "torch.distributed.run --standalone --nproc-per-node 2 -m openrlhf_pgrpo.cli.train_dpo "
    f"{PAIRS} --data.pref_group_key user --ds.zero_stage 3",
    "sync": f"{PPO} --vllm.num_engines 1",
    "async": f"{PPO} --vllm.num_engines 1 --train.async_enable",
    "zero-3": f"{PPO} --vllm.num_engines 2 --ds.zero_stage 3 --train.colocate_all --actor.num_nodes 2",
}
ACTORS = {  # what Ray calls the process
    "trainer": ("ray::PPOTrainer", "ray::TrainingActor"),
    "sampler": ("ray::GenerateSamplesActor",),
    "rank": ("ray::PolicyModelActor",),
    "engine": ("ray::RolloutRayActor",),
}
FAILED = r"\[pgrpo\] the run has failed: .*"
SAYS = {  # victim on Ray, or any: what the end of the run has to say. A driver that is killed says nothing.
    "trainer": FAILED + r"(trainer|PPOTrainer|TrainingActor).* died",
    "sampler": FAILED + r"(sampler|GenerateSamplesActor).* died",
    "rank": FAILED + "a training rank of the policy died",
    "writer": FAILED + "a training rank of the policy died",
    "engine": FAILED + r"a rollout engine \(vLLM\) died",
    "reward server": FAILED + "every sample needs a reward: the reward server http",
    "node": FAILED + "node second died",
    "disk full": r"No space left on device|could not be written",
    "read-only folder": r"needs a folder that can be written|Read-only file system",
}
BY_PROBE = {"writer": "kill", "disk full": "fill", "clock": "clock"}

PROBE = """
import json, os, signal, sys, threading, time

# In a file, which processes of Ray nodes that were started before the run read, too.
SAID = json.load(open(os.environ["KILLS_PROBE"])) if os.path.exists(os.environ["KILLS_PROBE"]) else {}
UNDER, AT, NOTE, AGAIN = (SAID.get(name) for name in ("under", "at", "note", "again"))
count, jump, real_time = 0, 0.0, time.time


def act(what, number):
    global jump
    open(NOTE, "w").close()
    if what == "kill":
        threading.Timer(number, os.kill, (os.getpid(), signal.SIGKILL)).start()
    elif what == "clock":
        jump = number
    else:
        with open(SAID["filler"], "wb", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while file.write(bytes(size)):
                        pass
                except OSError:
                    pass


def look(event, args):
    global count
    if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") or not str(args[0]).startswith(UNDER):
        return
    if event != "open" or set(args[1] or "") & set("wax+") or args[2] & (os.O_WRONLY | os.O_RDWR):
        count += 1
        if not AT:
            with open(f"{NOTE}-{os.getpid()}", "a") as file:
                file.write(".")
        elif count == AT and not os.path.exists(NOTE):
            act(SAID["do"], SAID["number"])


if UNDER:
    sys.addaudithook(look)
if SAID.get("do") == "clock":
    time.time = lambda *_: real_time() + jump  # a class that holds it would hand over itself
if AGAIN:
    import pickle
    import wrapt

    def load_and_save_again(load, strategy, args, kwargs):
        path, states = load(*args, **kwargs)
        if path is not None:
            model, tag = args[0] if args else kwargs["model"], os.path.basename(os.path.dirname(path))
            states_of_host = {key: states[key] for key in states if key != "checkpoint_parallel_dimensions"}
            model.save_checkpoint(AGAIN, tag=tag, client_state=states_of_host, save_latest=False)
        return path, states

    def keep_history(load, estimator, args, kwargs):
        load(*args, **kwargs)
        with open(AGAIN + "-history", "wb") as file:
            pickle.dump(estimator.state_dict(), file)

    for module, name, wrapper in (
        ("openrlhf.utils.deepspeed.deepspeed", "DeepspeedStrategy.load_ckpt", load_and_save_again),
        ("openrlhf_pgrpo.core.pgrpo", "PGRPO.load_state_dict", keep_history),
    ):
        wrapt.when_imported(module)(lambda m, n=name, w=wrapper: wrapt.wrap_function_wrapper(m, n, w))
"""


class Trial(NamedTuple):
    number: int
    kind: str
    victim: str
    seed: str


class Failed(Exception):
    """What was needed, and what came instead."""


class Impossible(Exception):
    """Why a trial cannot be made on this machine."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="keeps the outcome of every trial")
    parser.add_argument("--trials", type=int, default=TRIALS, help=f"default: {TRIALS}")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="kinds, victims, or KIND/VICTIM")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    trials = plan(args.trials, args.seed)
    if args.only:
        wanted = {*args.only}
        trials = [one for one in trials if wanted & {one.kind, one.victim, f"{one.kind}/{one.victim}"}]
    if not trials:
        parser.error("needs at least one trial, got none: raise --trials, or name others by --only")
    with_private_mounts()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started ends with us
    folder = args.folder.resolve()
    made = make(folder / "made")
    outcomes = []
    for trial in trials:
        outcomes.append(kept(trial, folder) or made_now(trial, folder, made))
        print(line(outcomes[-1]), flush=True)
    print("\n" + table(outcomes))
    sys.exit(int(any(one["outcome"] == "failed" for one in outcomes)))


def plan(trials: int, seed: int) -> list[Trial]:
    """Each kind with each of its victims in turn."""
    cases = [(kind, victim) for kind, victims in VICTIMS.items() for victim in victims]
    return [Trial(number, *cases[number % len(cases)], f"{seed}-{number}") for number in range(trials)]


def with_private_mounts() -> None:
    """Starts this script again where /dev/shm, and all that it mounts, are its own, if this user may."""
    if PRIVATE in os.environ or os.geteuid() or shutil.which("unshare") is None:
        return
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0:
        os.environ[PRIVATE] = "1"
        shell = ["sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
        os.execvp("unshare", ["unshare", "--mount", *shell, sys.executable, *sys.argv])


# ---- what is run ----------------------------------------------------------------------------------------------------


def make(made: Path) -> Path:
    """The tiny policy, its data, and a factorized reward model, in a folder that is made once."""
    if not (made / "rewards").exists():
        made.mkdir(parents=True, exist_ok=True)
        policy = tiny_policy(made / "policy")
        write_data(made, STEPS * PROMPTS)
        pool = [{"prompt": f"{i} says: ", "a": f"{i}{'!' * (6 + i % 5)}", "b": f"{i}."} for i in range(8 * STEPS)]
        pairs = []
        for i, pair in enumerate(pool):
            chosen, rejected = (pair["a"], pair["b"]) if i % 2 else (pair["b"], pair["a"])
            pairs.append({"user": f"{i % 4}", "prompt": pair["prompt"], "chosen": chosen, "rejected": rejected})
        write_rows(made / "pairs.jsonl", pairs)
        write_rows(made / "pool.jsonl", pool)
        candidates = [{"prompt": pair["prompt"], "responses": [pair["a"], pair["b"]]} for pair in pool]
        write_rows(made / "candidates.jsonl", candidates)
        rng, users = np.random.default_rng(0), [f"user {number:02}" for number in range(USERS)]
        write_reward_model(made / "rewards", policy, rng.normal(size=(3, 64)), rng.normal(size=(USERS, 3)), users)
    (made / "probe").mkdir(exist_ok=True)
    write_whole(made / "probe" / "sitecustomize.py", PROBE)
    return made


class Run:
    """A command, and the folder `beside/run` that it writes to. Logs and what the probe notes lie beside that."""

    def __init__(self, kind: str, beside: Path, made: Path):
        self.kind, self.beside, self.folder, self.made = kind, beside, beside / "run", made
        self.probe = beside / "probe.json"
        of_ppo = shlex.join(flags(made / "policy", made, self.folder))
        places = {"made": shlex.quote(str(made)), "run": shlex.quote(str(self.folder))}
        command = RUNS[kind].format(**places, flags=of_ppo)
        self.command = [sys.executable, "-m", *shlex.split(command)]
        self.trains = "--ckpt.path" in self.command
        self.checkpoints = self.folder / "checkpoints" / ("_actor" if kind in ON_RAY else "")

    def begin(self, log: str, **said):
        """Starts the command. The probe is told `said`, and where it looks."""
        said |= {"under": str(self.checkpoints if self.trains else self.folder)}
        said |= {"note": str(self.beside / "note"), "filler": str(self.folder / "filler")}
        write_whole(self.probe, json.dumps(said))
        return started(self.command, self.beside / log, {})

    def log(self, name: str) -> str:
        return (self.beside / name).read_text(errors="replace")

    @property
    def rows(self) -> list[dict]:
        """Whole rows of the metrics."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def newest(self) -> Path | None:
        """The newest whole checkpoint."""
        found = self.checkpoints.glob("global_step*")
        whole = [one for one in found if all(map(zipfile.is_zipfile, one.glob("*.pt")))]
        return max(whole, key=lambda path: int(path.name.removeprefix("global_step")), default=None)

    def updates(self) -> int:
        """How many its newest checkpoint counts."""
        newest = self.newest()
        return read(min(newest.glob("*model_states.pt")))["global_steps"] if newest else 0

    def files(self) -> dict[str, str]:
        """A hash of each file that it leaves, and of the metrics without times. None on Ray, where answers differ."""
        found = self.folder / "model" if self.trains else self.folder
        paths = [path.relative_to(found) for path in found.rglob("*") if path.is_file()]
        # Temporary ones are looked for by `check_nothing_left`.
        contents = {str(path): (found / path).read_bytes() for path in paths if not str(path).startswith(".")}
        rows = [{name: value for name, value in row.items() if name not in ("time", "run")} for row in self.rows]
        contents["metrics.jsonl"] = json.dumps(rows).encode()
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        return {} if self.kind in ON_RAY else hashes


def read(file: Path) -> dict:
    return torch.load(file, weights_only=False, map_location="cpu")


def unkilled(kind: str, folder: Path, made: Path) -> dict:
    """What a run of this kind does that nobody kills. It is made once, and again if it failed."""
    run = Run(kind, folder / "unkilled" / kind, made)
    facts = run.beside / "facts.json"
    if not facts.exists():
        with Surroundings(run):
            began = time.time()
            with run.begin("again.txt") as process:
                code = finish(run, process)
            need(code == 0, f"an unkilled run ends with 0, got {code}; {tail(run.beside / 'again.txt')}")
            first_step = run.rows[0]["time"] if run.rows else began
            found = {"seconds": time.time() - began, "start": first_step - began, "steps": len(run.rows)}
            found["writes"] = max((path.stat().st_size for path in run.beside.glob("note-*")), default=0)
            write_whole(facts, json.dumps(found | {"updates": run.updates(), "files": run.files()}, indent=1))
    return json.loads(facts.read_text())


# ---- a trial --------------------------------------------------------------------------------------------------------


def kept(trial: Trial, folder: Path) -> dict | None:
    file = folder / "outcomes" / f"{trial.number:03}.json"
    outcome = json.loads(file.read_text()) if file.exists() else None
    if outcome and [outcome[name] for name in Trial._fields] != [*trial]:
        raise SystemExit(f"this needs a folder with trials of the same plan, got {outcome} for {trial}: name another")
    return outcome


def made_now(trial: Trial, folder: Path, made: Path) -> dict:
    """Makes a trial and keeps its outcome. The files of one that failed stay, in trials/NUMBER."""
    outcome = trial._asdict() | {"outcome": "fine", "said": "", "ended": None, "recovered": None}
    run = Run(trial.kind, folder / "trials" / f"{trial.number:03}", made)
    try:
        facts = unkilled(trial.kind, folder, made)
        with Surroundings(run, trial.victim) as around:
            make_trial(trial, run, facts, around, outcome)
        shutil.rmtree(run.beside)
    except Failed as failure:
        outcome |= {"outcome": "failed", "said": str(failure)}
    except Impossible as reason:
        outcome |= {"outcome": "not made here", "said": str(reason)}
    (folder / "outcomes").mkdir(exist_ok=True)
    write_whole(folder / "outcomes" / f"{trial.number:03}.json", json.dumps(outcome, indent=1))
    return outcome


def make_trial(trial: Trial, run: Run, facts: dict, around: "Surroundings", outcome: dict) -> None:
    rng = random.Random(trial.seed)
    if trial.kind == "elicit":
        kill_the_page(run, rng)
    elif trial.victim == "second driver":
        refuse_a_second(run, facts, rng, outcome)
    else:
        end_a_part(trial, run, facts, rng, around, outcome)
    around.mend()
    if trial.victim == "truncated checkpoint":
        truncate(run, rng)
    if trial.kind == "export-user" and run.files() == facts["files"]:
        outcome["outcome"] = "was complete before"  # and the same command replaces no model
        around.check_nothing_left()
        return
    newest = run.newest()
    if newest:
        shutil.copytree(newest, run.beside / "kept")  # the resumed run may delete it
    began = time.time()
    with run.begin("again.txt", again=str(run.beside / "again")) as process:
        code = finish(run, process)
        need(code == 0, f"the same command ends with 0, got {code}; {tail(run.beside / 'again.txt')}")
        around.wait_for_the_end()
    first_step = min((row["time"] for row in run.rows if row["time"] > began), default=time.time())
    outcome["recovered"] = round(first_step - began, 1)  # of a command, or of a run that was complete, its end
    check_resumed(run, newest, facts, outcome)
    around.check_nothing_left()


def end_a_part(trial: Trial, run: Run, facts: dict, rng: random.Random, around, outcome: dict) -> None:
    """Gives the command, ends a part of it, and waits for the end of all. Or lets it meet what else is in `ALSO`."""
    step = rng.randrange(2 * EVERY + 1 if trial.victim == "truncated checkpoint" else 0, max(1, facts["steps"]))
    pause = (facts["seconds"] - facts["start"]) / max(1, facts["steps"]) if step else facts["start"]
    said = {}
    if trial.victim in BY_PROBE:
        # Seconds after the write has begun.
        number = rng.random() * rng.choice([0.003, facts["seconds"] / facts["writes"]])
        if trial.victim == "clock":
            number = rng.choice([-1, 1]) * 86400 * rng.random()
        at = rng.randint(1, facts["writes"])
        said = {"do": BY_PROBE[trial.victim], "at": at, "number": number}
    with run.begin("first.txt", **said) as process:
        if trial.victim in BY_PROBE:
            until((run.beside / "note").exists, process, "the write")
        elif trial.victim != "read-only folder":
            until(lambda: len(run.rows) >= step, process, f"step {step}")
            time.sleep(rng.random() * pause)
            kill(trial, process, around, rng)
        began = time.monotonic()
        # Without its reward server a run ends when it first asks for a reward, which may be after all of its start.
        code = wait(process, LONGEST_RUN if trial.victim in ("clock", "disk full") else BOUND + facts["start"])
        around.wait_for_the_end()
    outcome["ended"] = round(time.monotonic() - began, 1)
    if trial.victim == "clock":
        need(code == 0, f"the run goes on when the clock jumps, got {code}; {tail(run.beside / 'first.txt')}")
    elif code == 0:
        outcome["outcome"] = "was complete before"
    else:
        outcome["said"] = said_at_the_end(trial, run, code)


def kill(trial: Trial, process, around: "Surroundings", rng: random.Random) -> None:
    if process.poll() is not None:
        return
    if trial.victim in ("driver", "truncated checkpoint"):
        process.kill()
    elif trial.victim in ("reward server", "node"):
        around.stop("second" if trial.victim == "node" else "server")
    elif trial.kind in ON_RAY:
        pids = until(lambda: around.titled(*ACTORS[trial.victim]), process, f"a {trial.victim}")
        os.kill(rng.choice(sorted(pids)), signal.SIGKILL)
    else:
        rng.choice(until(psutil.Process(process.pid).children, process, "ranks")).kill()


def said_at_the_end(trial: Trial, run: Run, code: int) -> str:
    """What died, and in PPO where the same command goes on."""
    wanted = SAYS.get(trial.victim)
    if trial.kind not in ON_RAY and trial.victim in ("rank", "writer"):
        wanted = r"exitcode +: -9" if trial.kind == "dpo zero-3" else None
    if wanted is None:
        need(code == -signal.SIGKILL, f"an end by SIGKILL, got {code}; {tail(run.beside / 'first.txt')}")
        return ""
    said, newest = run.log("first.txt"), run.newest()
    found = re.search(wanted, said)
    need(found, f"the run says {wanted!r}, got another end; {tail(run.beside / 'first.txt')}")
    if wanted.startswith(FAILED):
        goes_on = f"resume from {newest.name} in" if newest else "start again: there is no complete checkpoint"
        need(goes_on in said, f"the run says {goes_on!r}, got another end; {tail(run.beside / 'first.txt')}")
    return found[0][:200]


def truncate(run: Run, rng: random.Random) -> None:
    """Cuts a file of the newest checkpoint: the same command names what is whole, and we choose that."""
    cut = run.newest()
    file = rng.choice(sorted(cut.glob("*.pt")))
    os.truncate(file, rng.randrange(file.stat().st_size))
    with run.begin("cut.txt") as process:
        code = wait(process, LONGEST_RUN)
    said, whole = run.log("cut.txt"), run.newest()
    refused = code != 0 and f"got '{cut.name}', which is not whole" in said and whole.name in said
    need(refused, f"{cut.name}, which is cut, is refused and {whole.name} named, got {tail(run.beside / 'cut.txt')}")
    (run.checkpoints / "latest").write_text(whole.name)


def refuse_a_second(run: Run, facts: dict, rng: random.Random, outcome: dict) -> None:
    """A second driver into the folder of one that runs, which waits meanwhile: it is refused by name."""
    step = rng.randrange(1, facts["steps"])
    with run.begin("first.txt") as first:
        until(lambda: len(run.rows) >= step, first, f"step {step}")
        first.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with run.begin("second.txt") as second:
            code = wait(second, LONGEST_RUN)
        outcome["ended"] = round(time.monotonic() - began, 1)
        refused = code != 0 and str(run.folder) in run.log("second.txt")
        need(refused, f"a second driver into {run.folder} is refused by its name, got exit code {code}")
        first.send_signal(signal.SIGCONT)
        code = wait(first, LONGEST_RUN)
    need(code == 0, f"the first driver goes on to its end, got {code}; {tail(run.beside / 'first.txt')}")


def check_resumed(run: Run, newest: Path | None, facts: dict, outcome: dict) -> None:
    """It began at the newest whole checkpoint, equal to the bit, and ends where an unkilled run ends."""
    steps, again = [row["step"] for row in run.rows], run.beside / "again"
    need(steps == [*range(1, facts["steps"] + 1)], f"the steps of an unkilled run, {facts['steps']}, got {steps}")
    need(run.updates() == facts["updates"], f"{facts['updates']} updates, got {run.updates()}")
    loaded = sorted(path.name for path in again.glob("global_step*"))
    expected = [newest.name] if newest else []
    complete = newest and newest.name == f"global_step{facts['steps']}"  # then it need not load it
    need(loaded == expected or (complete and not loaded), f"resumes from {expected}, got {loaded}")
    if loaded:
        pairs = [(read(path), read(again / newest.name / path.name)) for path in (run.beside / "kept").glob("*.pt")]
        if run.kind in ON_RAY:
            ours = read(min((run.beside / "kept").glob("*model_states.pt")))["openrlhf_pgrpo"]
            pairs.append((ours["estimator"], pickle.loads((run.beside / "again-history").read_bytes())))
        differ = [found for pair in pairs if (found := difference(*pair))]
        need(not differ, f"what is loaded equals {newest.name} to the bit, got others: {differ}")
    files = run.files()
    others = sorted(name for name in {**files, **facts["files"]} if files.get(name) != facts["files"].get(name))
    need(not others, f"the files of an unkilled run, to the bit, got others: {', '.join(others)}")


def difference(one, other, name: str = "state") -> str:
    """The name of the first part of nested states that is not equal to the bit; empty if all is."""
    if type(one) is not type(other):
        return name
    if isinstance(one, dict):
        parts = [(one.get(key, Failed), other.get(key, Failed), f"{name}.{key}") for key in {**one, **other}]
    elif isinstance(one, (list, tuple)):
        parts = [(*pair, f"{name}.{i}") for i, pair in enumerate(zip(one, other))] + [(len(one), len(other), name)]
    elif isinstance(one, (torch.Tensor, np.ndarray)):
        same = one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
        return "" if same else name
    elif hasattr(one, "__dict__") and not callable(one):
        return difference(vars(one), vars(other), name)
    else:
        return "" if one == other else name
    return next(filter(None, (difference(*part) for part in parts)), "")


# ---- the page -------------------------------------------------------------------------------------------------------


class Page:
    """The browser's side of `elicit --web`. Its address is in the log."""

    def __init__(self, run: Run, log: str, process):
        opened = until(lambda: re.search(r"open (http\S+)/\?token=(\S+)", run.log(log)), process, "a page")
        need(opened, f"a page, got none; {tail(run.beside / log)}")
        self.address, self.token = opened.groups()

    def ask(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"X-Elicit-Token": self.token})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def answer(self, state: dict) -> dict:
        """Answers the open question, always the same way."""
        name = state["question"]["name"]
        return self.ask("/answer", {"question": name, "choice": ("left", "right", "tie")[int(name, 16) % 3]})


def kill_the_page(run: Run, rng: random.Random) -> None:
    """Between an answer and the next, which may be on its way."""
    answered, pause = rng.randrange(QUESTIONS), rng.random() * rng.choice([0.01, 0.1])
    with run.begin("first.txt") as process:
        page = Page(run, "first.txt", process)
        state = page.ask("/state")
        for _ in range(answered):
            state = page.answer(state)

        def next_answer():
            with suppress(OSError, HTTPException):
                page.answer(state)

        threading.Thread(target=next_answer, daemon=True).start()
        time.sleep(pause)
        process.kill()
        process.wait()
    (run.beside / "answered").write_text(str(answered))


def finish(run: Run, process) -> int:
    """The exit code. A page is answered to its end before, where every answer that was acknowledged has to be."""
    if run.kind == "elicit":
        page, known = Page(run, "again.txt", process), run.beside / "answered"
        state, before = page.ask("/state"), int(known.read_text()) if known.exists() else 0
        there = (before, before + known.exists())
        need(state["answered"] in there, f"{' or '.join(map(str, there))} answers kept, got {state['answered']}")
        while state["question"]:
            state = page.answer(state)
        process.terminate()
    return wait(process, LONGEST_RUN)


# ---- around a trial -------------------------------------------------------------------------------------------------


class Surroundings:
    """What a run needs beside it: nodes, a reward server, a disk, the probe in every process, a folder for temporary
    files. And what it must not leave: all that is started meanwhile bears a mark."""

    def __init__(self, run: Run, victim: str = ""):
        self.run, self.victim, self.own, self.others = run, victim, {}, set()
        self.port, self.head, mark = free_port(), f"127.0.0.1:{free_port()}", uuid.uuid4().hex
        self.mark = f"KILLS_TRIAL={mark}".encode()
        self.temporary = Path(tempfile.mkdtemp(prefix="k"))  # a short name: Ray's sockets lie in it
        self.variables = {"KILLS_TRIAL": mark, "TMPDIR": self.temporary, "PYTHONPATH": run.made / "probe"}
        self.variables |= {"HF_DATASETS_CACHE": run.beside / "cache", "OMP_NUM_THREADS": "1"}
        self.variables |= {"KILLS_PROBE": run.probe}

    def __enter__(self) -> "Surroundings":
        shutil.rmtree(self.run.beside, ignore_errors=True)
        self.run.folder.mkdir(parents=True)
        self.environment, self.shared = dict(os.environ), set(os.listdir("/dev/shm"))
        os.environ.update({name: str(value) for name, value in self.variables.items()})
        disk = {"disk full": "size=64m", "read-only folder": "ro"}.get(self.victim)
        try:
            if disk and PRIVATE not in os.environ:
                raise Impossible(f"{self.victim} needs to mount a disk, as root on Linux")
            if disk:
                subprocess.run(["mount", "-t", "tmpfs", "-o", disk, "tmpfs", self.run.folder], check=True)
            self.start_missing()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for name in [*self.own]:
            self.stop(name)
        if self.run.folder.is_mount():
            subprocess.run(["umount", "--lazy", self.run.folder], check=True)
        os.environ.clear()
        os.environ.update(self.environment)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def start_missing(self) -> None:
        """Starts the nodes and the server that do not run."""
        for name in NODES if self.run.kind == "zero-3" else ():
            if name not in self.own:
                self.own[name], log = ExitStack(), self.run.beside / f"{name}.txt"
                start_node(self.own[name], name, NODES[name], self.head, self.temporary / name, log)
                os.environ["RAY_ADDRESS"] = self.head
        if self.victim == "reward server" and "server" not in self.own:
            self.own["server"], url = ExitStack(), f"http://127.0.0.1:{self.port}/get_reward"
            model, log = self.run.made / "rewards", self.run.beside / "server.txt"
            command = f"-m openrlhf_pgrpo.cli.serve_rm --reward.model_name_or_path {model} --port {self.port}".split()
            process = self.own["server"].enter_context(started([sys.executable, *command], log, {}))
            body = json.dumps({"query": ["hi"], "prompts": ["hi"], "labels": ["user 01"]}).encode()

            def answers() -> bool:
                with suppress(OSError), urllib.request.urlopen(url, body, timeout=60):
                    return True
                return False

            need(until(answers, process, "a reward server"), f"a reward server, got none; {tail(log)}")
            self.run.command += ["--reward.remote_url", url, "--data.label_key", "user"]  # the last ones count
        self.others = set(marked(self.mark))

    def stop(self, name: str) -> None:
        self.own.pop(name).close()

    def mend(self) -> None:
        """What a person does before the same command is given again."""
        if self.victim == "read-only folder":
            subprocess.run(["umount", self.run.folder], check=True)
        (self.run.folder / "filler").unlink(missing_ok=True)
        self.start_missing()

    def alive(self) -> list[int]:
        """Processes of the run; if nodes go on, those that do its work."""
        if self.run.kind == "zero-3":
            return self.titled(*(name for names in ACTORS.values() for name in names))
        return [pid for pid in marked(self.mark) if pid not in self.others]

    def titled(self, *names: str) -> list[int]:
        return [pid for pid in marked(self.mark) if title(pid).startswith(names)]

    def wait_for_the_end(self) -> None:
        deadline = time.monotonic() + BOUND
        while alive := self.alive():
            names = sorted({name[:60] for pid in alive if (name := title(pid))})
            need(time.monotonic() < deadline, f"all of the run ends in {BOUND} s, these live on: {names}")
            time.sleep(0.1)

    def check_nothing_left(self) -> None:
        self.wait_for_the_end()
        for name in [*self.own]:
            self.stop(name)
        shared = sorted({*os.listdir("/dev/shm")} - self.shared) if PRIVATE in os.environ else []
        # What other libraries leave when their process is killed: semaphores of joblib, sockets of vLLM, logs of Ray
        # and of torch's launcher.
        shared = [name for name in shared if not name.startswith("sem.loky-")]
        files = [path for path in self.temporary.iterdir() if path.name not in ("ray", *NODES)]
        files = [
            path
            for path in files
            if not path.is_socket() and not path.name.startswith(("vllm_dist_", "torchelastic_"))
        ]
        files += self.run.folder.rglob(".*")
        need(not shared and not files, f"nothing is left, got shared memory {shared}, files {[*map(str, files)]}")


def title(pid: int) -> str:
    """The command line of a process, or the name that Ray gave it; empty if it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def until(ready, process, what: str):
    """Waits until `ready()` is true or the process has ended, and returns what it said."""
    deadline = time.monotonic() + LONGEST_RUN
    while not (found := ready()) and process.poll() is None:
        need(time.monotonic() < deadline, f"{what} within {LONGEST_RUN} s, got none")
        time.sleep(0.02)
    return found


def wait(process, seconds: float) -> int:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise Failed(f"the command ends in {seconds} s, got one that goes on") from None


def need(truth, sentence: str) -> None:
    if not truth:
        raise Failed(f"needs {sentence}")


# ---- the table ------------------------------------------------------------------------------------------------------


def line(outcome: dict) -> str:
    seconds = ", ".join(f"{name} {outcome[name]} s" for name in ("ended", "recovered") if outcome[name] is not None)
    head = f"{outcome['number']:3}  {outcome['kind']:12}{outcome['victim']:22}{outcome['outcome']:20}{seconds:32}"
    return f"{head}  {outcome['said']}".rstrip()


def table(outcomes: list[dict]) -> str:
    """A row for each kind and victim: how the trials ended, and the longest times."""
    cases = defaultdict(list)
    for outcome in outcomes:
        cases[outcome["kind"], outcome["victim"]].append(outcome)
    lines = ["| run | victim | trials | outcome | seconds to the end | to go on |", "|---|---|---|---|---|---|"]
    for (kind, victim), of_case in cases.items():
        ends = ", ".join(f"{count} {what}" for what, count in Counter(one["outcome"] for one in of_case).items())
        times = [max(one[name] or 0 for one in of_case) or "" for name in ("ended", "recovered")]
        lines.append(f"| {kind} | {victim} | {len(of_case)} | {ends} | {times[0]} | {times[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
