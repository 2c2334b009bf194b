"""Two Ray nodes on one machine: our launch script trains across them, whatever dies ends the run with a sentence and a
whole checkpoint, and the same command again resumes it, histories equal to the bit."""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).parents[2] / "examples" / "launch" / "ray_job.sh"
BOUND = 120  # seconds until a run ends after a part of it died, on a busy machine


class Job:
    """The launch script, started again and again by the same command; it saves to `out` after every step."""

    def __init__(self, started, tiny, folder, out, cluster, recording):
        rows = [json.loads(line) for line in (tiny / "prompts.jsonl").read_text().splitlines()]
        rows = [{**row, "prompt": row["input"], "label": row["answer"]} for row in rows]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.started, self.folder, self.out, self.runs = started, folder, out, 0
        self.command = ["bash", SCRIPT, *recording.flags, "--data.user_key", "who", "--pgrpo.min_count", "4"]
        variables = {
            "NODES": 2, "GPUS_PER_NODE": 1, "DEVICE": "cpu", "RAY_JOBS": cluster.jobs,
            "POLICY": tiny / "model", "PROMPTS": folder / "prompts.jsonl", "REWARD": tiny / "reward.py",
            "PROMPTS_PER_STEP": 4, "SAMPLES_PER_PROMPT": 2, "MICRO_BATCH": 4, "MAX_LEN": 64, "MAX_NEW_TOKENS": 16,
            "OUT": out, "EPISODES": 1000, "SAVE_STEPS": 1,
        }  # fmt: skip
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "PATH": path, **{name: str(value) for name, value in variables.items()}}

    def start(self):
        self.runs += 1
        return self.started(self.command, self.folder / f"run{self.runs}.txt", self.environment)

    @property
    def step(self) -> int:
        path = self.out / "metrics.jsonl"
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []
        assert steps == list(range(1, len(steps) + 1))
        return len(steps)

    def checkpoint(self) -> tuple[int, dict]:
        """The step of the checkpoint that a resume would load, and the state of the estimator in it."""
        tag = (self.out / "checkpoints" / "_actor" / "latest").read_text()
        first_rank = min((self.out / "checkpoints" / "_actor" / tag).glob("*model_states.pt"))
        state = torch.load(first_rank, weights_only=False, map_location="cpu")["openrlhf_pgrpo"]
        return int(tag.removeprefix("global_step")), state["estimator"]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, which can be filled."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs to mount a small disk, as root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_whatever_dies_the_same_command_resumes(new_ray_cluster, new_recording, started, tiny, tmp_path, small_disk):
    recording, cluster = new_recording("recording"), new_ray_cluster()
    resources = {"gpus": 1, "cpus": 6, **recording.environment}
    nodes = {"n1": cluster.start_node("n1", head=True, **resources), "n2": cluster.start_node("n2", **resources)}
    job = Job(started, tiny, tmp_path, small_disk / "out", cluster, recording)
    saved = []

    def trains_until(kill, *words):
        """Starts the job, lets it train and save, ends a part of it, and waits for the end of the rest."""
        before = job.step
        run = job.start()
        run.until(lambda: job.step >= before + 3, timeout=900)
        kill(run)
        began = time.monotonic()
        assert run.process.wait(BOUND) != 0, run.tail()
        for word in words:
            assert word in run.output(), run.tail()
        run.kill()
        while any(node.titled("ray::PolicyModelActor") for node in nodes.values()):
            assert time.monotonic() < began + BOUND, "ranks of the run that ended are alive"
            time.sleep(0.2)
        step, state = job.checkpoint()
        assert step >= before + 2 and state["history"]["seen"].sum() == 8 * step
        saved.append(state)
        return step

    def resume_from(step):
        return f"resume from global_step{step} in {job.out}/checkpoints: the same command"

    def rank(run):
        for node in nodes.values():  # both hold a rank and an engine, so labels, weights and gradients cross nodes
            assert node.titled("ray::PolicyModelActor") and node.titled("ray::RolloutRayActor")
        nodes["n2"].kill_one("ray::PolicyModelActor")

    step = trains_until(rank, "[pgrpo] the run has failed: ", " died")
    assert f"[pgrpo] {resume_from(step)}" in (tmp_path / "run1.txt").read_text()

    trains_until(lambda run: nodes["n2"].kill(), "[pgrpo] the run has failed: node n2 died")
    nodes["n2"] = cluster.start_node("n2", **resources)

    def fill(run):
        """Half a megabyte stays free: enough for a log, too little for a checkpoint."""
        with open(small_disk / "filler", "ab", buffering=0) as file:
            while run.process.poll() is None:
                spare = max(0, shutil.disk_usage(small_disk).free - 500_000)
                with suppress(OSError):  # the run wrote at the same moment
                    file.write(bytes(spare))
                time.sleep(0.02)

    step = trains_until(fill, "_actor, where 0.0 GiB are free: ", "The one before it is still whole: make room")
    assert (
        f"[pgrpo] mend its cause first, or it comes again; then {resume_from(step)}"
        in (tmp_path / "run3.txt").read_text()
    )

    _, *resumed = recording.runs()
    assert len(resumed) == 2 and len(saved) == 3
    for (restored, batches), state in zip(resumed, saved):
        assert recording.equal(restored, state)
        for batch in batches:  # made on both nodes, of labels, preference groups and users that came all the way
            assert batch.labels == batch.pref_groups and set(batch.users) <= {f"u{number}" for number in range(6)}
