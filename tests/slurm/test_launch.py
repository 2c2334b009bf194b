"""The Slurm script, unchanged except for its variables, run by a real Slurm on two nodes."""

import json
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "launch" / "slurm.sbatch"
NOTHING_TO_TRAIN = {"POLICY": "policy", "PROMPTS": "prompts.jsonl", "REWARD": "reward.py", "DEVICE": "cpu"}


@pytest.fixture
def submit(slurm, tmp_path):
    """Submits the script; `job.log()` is its output, `job.until(ready)` waits until `ready()` is true."""

    class Job:
        out = tmp_path / "out"

        def __init__(self, *flags, **variables):
            resources = ["--gres", "gpu:1", "--cpus-per-task", 5, "--time", 30, "--output", tmp_path / "log.txt"]
            variables = {"GPUS_PER_NODE": 1, "OUT": self.out, **variables}
            self.number = slurm.submit("--chdir", ROOT, *resources, SCRIPT, *flags, **variables)

        @property
        def state(self) -> str:
            return slurm.job(self.number)["JobState"]

        def log(self) -> str:
            path = tmp_path / "log.txt"
            return path.read_text(errors="replace") if path.exists() else ""

        def until(self, ready, limit: float = 400) -> None:
            deadline = time.monotonic() + limit
            while not ready():
                alive = self.state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "PREEMPTED")
                assert alive or ready(), f"job is {self.state}\n{self.log()[-6000:]}"
                assert time.monotonic() < deadline, f"waited {limit} s, job is {self.state}\n{self.log()[-6000:]}"
                time.sleep(0.3)

        def ends(self, state: str, limit: float = 400) -> str:
            """Waits for the end, checks that nothing is left running, and returns the output."""
            self.until(lambda: self.state == state, limit)
            self.until(lambda: not slurm.processes, 30)
            return self.log()

    return Job


def test_it_trains_on_two_nodes_goes_back_when_preempted_and_resumes(slurm, submit, new_recording, tiny, tmp_path):
    rows = [json.loads(line) for line in (tiny / "prompts.jsonl").read_text().splitlines()]
    rows = [{**row, "prompt": row["input"], "label": row["answer"]} for row in rows]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recording = new_recording("recording")
    job = submit(
        *recording.flags, "--pgrpo.min_count", 4, "--data.user_key", "who",
        POLICY=tiny / "model", PROMPTS=tmp_path / "prompts.jsonl", REWARD=tiny / "reward.py", DEVICE="cpu",
        PROMPTS_PER_STEP=4, SAMPLES_PER_PROMPT=2, MICRO_BATCH=4, MAX_LEN=64, MAX_NEW_TOKENS=16,
        EPISODES=2, SAVE_STEPS=2, **recording.environment,
    )  # fmt: skip

    def steps():
        path = job.out / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    # A more urgent job needs both nodes. Slurm sends our signal, and the script makes room.
    job.until(lambda: len(steps()) >= 3)
    urgent = slurm.submit("--partition", "urgent", "--nodes", 2, "--wrap", "sleep 1", "--output", "/dev/null")
    job.until(lambda: job.state == "PENDING", 60)
    assert "preempted: back into the queue; resumes from the last checkpoint" in job.log()
    job.until(lambda: slurm.job(urgent)["JobState"] == "COMPLETED", 60)
    actors = job.out / "checkpoints" / "_actor"
    tag = (actors / "latest").read_text()
    saved = torch.load(min((actors / tag).glob("*model_states.pt")), weights_only=False)["openrlhf_pgrpo"]["estimator"]

    slurm(
        "scontrol", "update", f"JobId={job.number}", "StartTime=now"
    )  # by default Slurm makes a requeued job wait two minutes
    log = job.ends("COMPLETED")
    _, (restored, batches) = recording.runs()
    resumed_at = int(tag.removeprefix("global_step"))
    assert recording.equal(restored, saved) and saved["history"]["seen"].sum() == 8 * resumed_at > 0
    assert steps() == list(range(1, 13)) and len(batches) == 12 - resumed_at
    assert "on n1 n2, head n1 at" in log and "restart 1" in log
    assert (job.out / "model.safetensors").is_file() and not list(job.out.glob(".ray*"))


@pytest.mark.parametrize(
    "variables, refusal",
    [
        ({"GPUS_PER_NODE": 8}, "GPUS_PER_NODE=8, but Slurm gave 1 GPUs on a node: let 'sbatch --gres gpu:N' and"),
        ({"CONTAINER": "apptainer"}, "CONTAINER=apptainer needs an IMAGE, got none"),
        ({"CONTAINER": "docker", "IMAGE": "x"}, "CONTAINER needs to be none, pyxis or apptainer, got docker"),
    ],
)
def test_what_does_not_fit_is_refused_before_ray_starts(submit, variables, refusal):
    log = submit(**{**NOTHING_TO_TRAIN, **variables}).ends("FAILED", 60)
    assert log.startswith(f"slurm.sbatch: {refusal}") and "Ray" not in log


def test_a_node_that_does_not_join_is_named_and_ray_is_stopped(slurm, submit, tmp_path):
    """On n2, `ray start` only waits. For the script, everything runs in a container."""
    programs = {
        "ray": 'if [ "$SLURMD_NODENAME" = n2 ]; then exec sleep 1000; fi; exec python -m ray.scripts.scripts "$@"',
        "apptainer": '[ "${*:1:5}" = "exec --nv --bind /data:/data image.sif" ] || exit 9; exec "${@:6}"',
    }
    (tmp_path / "bin").mkdir()
    for name, code in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "train.sh").write_text("echo trained anyway\n")
    log = submit(
        **NOTHING_TO_TRAIN, TRAIN=tmp_path / "train.sh", PATH=f"{tmp_path / 'bin'}:{slurm.environment['PATH']}",
        JOIN_LIMIT=25, CONTAINER="apptainer", IMAGE="image.sif", MOUNTS="/data:/data",
    ).ends("FAILED", 300)  # fmt: skip
    assert "1 of 2 joined within 25 s, missing: n2" in log and "trained anyway" not in log
