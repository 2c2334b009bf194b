"""Real OpenRLHF, Ray, vLLM and DeepSpeed on CPU; every run checks much, because every start costs a minute."""

import json
import os
import signal
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch

from openrlhf_pgrpo.core.estimator import make_advantage_estimator
from openrlhf_pgrpo.core.group_robust import GroupRobust
from openrlhf_pgrpo.core.group_weights import RobustOptions
from openrlhf_pgrpo.core.pgrpo import PGRPOOptions
from openrlhf_pgrpo.core.signals import Quantiles, SignalOptions
from openrlhf_pgrpo.report import write_report

pytestmark = pytest.mark.e2e

GROUPS = ("--data.pref_group_key", "persona", "--data.user_key", "who", "--pgrpo.min_count", "4")
SCALES = {"ann": 1.0, "bob": 5.0, "cleo/3": 0.2}
VOWELS = "aeiouAEIOU"
BOUND = 120  # seconds until all of a run has ended after a part of it died, on a busy machine


def step_of(tag):
    """The step of a checkpoint, "global_step4" or "best_global_step4"."""
    return int(tag.rpartition("global_step")[2])


def kill_driver(run):
    """Nothing that the driver has started outlives it."""
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    deadline = time.monotonic() + BOUND
    while run.started.pids:  # Ray, its workers and vLLM
        assert time.monotonic() < deadline, f"the run was killed, and these live on: {run.started.titles()}"
        time.sleep(0.2)


def kill_engine(run):
    """The run ends with a sentence that says what died, and how it goes on."""
    run.started.kill_one("ray::RolloutRayActor")
    assert run.wait(BOUND) != 0
    assert "[pgrpo] the run has failed: a rollout engine (vLLM) died." in run.output(), run.tail()
    tag = (run.folder / "ckpt" / "_actor" / "latest").read_text()
    assert f"[pgrpo] resume from {tag} in {run.folder}/ckpt: the same command, with --ckpt.load_enable" in run.output()


def check_kill_and_resume(start, new_recording, tmp_path, name, kill, *flags, end=lambda run: run.succeed()):
    """Kills a part of a run after a checkpoint, and resumes it with histories that are equal to the bit, until `end`
    returns. Returns the resumed run."""
    before, after = new_recording("before"), new_recording("after")
    equal = after.equal
    flags = (*before.flags, "--advantage_estimator", name, *GROUPS, "--ckpt.save_steps", 2, *flags)
    run = start(*flags, **before.environment)
    run.until(lambda: len(run.steps) >= 3)
    kill(run)
    run.stop()
    tag = (run.folder / "ckpt" / "_actor" / "latest").read_text()
    saved = run.checkpoint(tag)
    with open(run.folder / "out" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "half a li')
    report = write_report([run.folder], tmp_path / "killed.html").read_text()
    assert "the last line of the file is incomplete" in report and "cleo/3" in report

    resumed = start(*flags, "--ckpt.load_enable", **after.environment)
    end(resumed)
    ((restored, batches),) = after.runs()
    assert equal(restored, saved["estimator"])
    assert restored["history"]["seen"].sum() == 8 * step_of(tag)

    steps = [row["step"] for row in resumed.steps]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > step_of(tag)
    replayed = make_advantage_estimator("pgrpo_eb" if name.endswith("eb") else "pgrpo", PGRPOOptions(min_count=4))
    replayed.load_state_dict(restored)
    last = (resumed.folder / "ckpt" / "_actor" / "latest").read_text()
    for batch in batches[: step_of(last) - step_of(tag)]:
        replayed(batch)
    assert equal(replayed.state_dict(), resumed.checkpoint(last)["estimator"])
    if "robust" in saved:
        weights = GroupRobust(RobustOptions(), Quantiles(SignalOptions()))
        weights.load_state_dict(saved["robust"])
        for batch in batches[: step_of(last) - step_of(tag)]:
            weights(batch)
        assert equal(weights.state_dict(), resumed.checkpoint(last)["robust"])
    resumed.batches = batches
    return resumed


@pytest.fixture
def http_reward_model():
    """A reward server as the host expects one: vowels, on the scale of each persona. It answers with lists, and keeps
    the labels that it was sent."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.extend(body["labels"])
            answer = body["query"][0][len(body["prompts"][0]) :].replace("<pad>", "").replace("<eos>", "")  # as shown
            vowels = SCALES[body["labels"][0]] * sum(letter in VOWELS for letter in answer)
            payload = json.dumps({"rewards": [vowels], "scores": [vowels], "extra_logs": {"vowels": vowels}}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/reward", seen
    server.shutdown()
    server.server_close()


def test_the_patched_hosts_own_module_http_kill_resume_weights_logs_and_best_checkpoint(
    start, host_copy, new_recording, tiny, tmp_path, http_reward_model
):
    url, labels = http_reward_model
    original = host_copy.files()
    assert host_copy.command("patch").returncode == 0
    evaluation = ("--eval.dataset", tiny / "eval.jsonl", "--eval.steps", 2, "--eval.n_samples_per_prompt", 2)
    run = check_kill_and_resume(
        partial(start, module="openrlhf.cli.train_ppo_ray", **host_copy.environment),
        new_recording, tmp_path, "recorded_pgrpo", kill_driver, "--reward.remote_url", url,
        *evaluation,
        "--algo.kl.init_coef", 1e-4, "--algo.kl.estimator", "k2", "--train.num_episodes", 2,
        "--logger.tensorboard_dir", tmp_path / "tb",
        "--advantage_estimator", "pgrpo_robust", "--robust.base", "recorded_pgrpo",
    )  # fmt: skip
    assert "advantages: recorded_pgrpo (openrlhf_pgrpo 0.1.0) replaces RemoteExperienceMaker" in run.output()
    first, second, *_ = run.steps
    assert first["run"]["settings"]["algo.advantage.estimator"] == "recorded_pgrpo"
    assert first["run"]["total_prompts"] == 48
    assert sum(group["history_count"] for group in second["pref_groups"].values()) <= 16

    # The line in the terminal, and an answer of each preference group, as the policy gave it.
    assert "[pgrpo] step 1  8%  ETA " in run.output() and "[pgrpo] step 12  100%  ETA 0:00  reward: " in run.output()
    for row in (first, second):
        assert {sample["pref_group"] for sample in row["samples"]} == set(row["pref_groups"])
        for sample in row["samples"]:
            vowels = sum(letter in VOWELS for letter in sample["response"])
            assert sample["reward"] == pytest.approx(SCALES[sample["pref_group"]] * vowels)
            assert sample["prompt"].endswith(" says ")

    # vLLM's log-probs are the actor's, step after step, while the policy moves far away from where it began.
    assert max(abs(row["train"]["vllm_kl"]) for row in run.steps) < 0.01
    assert run.steps[-1]["train"]["kl"] > 0.1

    assert set(labels) == set(SCALES) and set(run.batches[0].labels) <= set(SCALES)

    # The raw reward is logged, not the advantage; the same numbers are in JSONL and TensorBoard.
    last, batch = run.steps[-1], run.batches[-1]
    assert last["train"]["reward"] == pytest.approx(batch.rewards.mean())
    assert last["train"]["reward"] == pytest.approx(last["train"]["vowels"])
    for name, group in last["pref_groups"].items():
        rewards = batch.rewards[[owner == name for owner in batch.pref_groups]]
        assert group["reward_mean"] == pytest.approx(rewards.mean()) and group["share"] == len(rewards) / 8
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    newest = max((tmp_path / "tb").rglob("events*"), key=lambda path: path.stat().st_mtime)
    board = EventAccumulator(str(newest.parent)).Reload()
    name, group = next(iter(last["pref_groups"].items()))
    for key, value in group.items():
        logged = board.Scalars(f"train/pref_group/{name}/{key}")[-1]
        assert (logged.step, logged.value) == (last["step"], pytest.approx(value, rel=1e-6))

    # Best checkpoints carry the history; users and prompts came along; evaluation rewards stayed out.
    (best,) = (run.folder / "ckpt" / "_actor").glob("best_global_step*")
    assert run.checkpoint(best.name)["estimator"]["history"]["names"]
    assert set(batch.users) <= {f"u{i}" for i in range(6)}
    assert max(np.bincount(batch.prompt_groups)) == 2
    assert run.checkpoint(f"global_step{last['step']}")["estimator"]["history"]["seen"].sum() == 8 * last["step"]

    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(run.folder / "out").state_dict()
    untrained = AutoModelForCausalLM.from_pretrained(tiny / "model").state_dict()
    assert not torch.equal(trained["model.embed_tokens.weight"], untrained["model.embed_tokens.weight"])

    assert host_copy.command("patch", "--revert").returncode == 0
    assert host_copy.files() == original


@pytest.fixture
def judge(tmp_path):
    """A reward function that wants labels with all columns, and fails for a persona once its folder has `out`."""
    path, out = tmp_path / "judge.py", tmp_path / "the judge is out"
    path.write_text(f"""
import os
import torch

def reward_func(queries, prompts, labels):
    assert set(labels[0]) == {{"persona", "who", "nested"}}, labels[0]
    if labels[0]["persona"] == "bob" and os.path.exists({str(out)!r}):
        raise OSError("no judge")
    answer = queries[0][len(prompts[0]):]
    vowels = torch.tensor([float(sum(letter in {VOWELS!r} for letter in answer))])
    return {{"rewards": vowels, "scores": vowels, "extra_logs": {{}}}}
""")
    return path, out


def test_a_host_that_loads_plugins_async_robust_partial_rollout_filtering_struct_labels_kill_resume_no_reward(
    start, host_copy, new_recording, tmp_path, judge
):
    """And a reward function that fails ends the resumed run, whose last checkpoint stays."""
    host_copy.load_plugins()
    path, out = judge

    def lose_the_judge(run):
        latest = run.folder / "ckpt" / "_actor" / "latest"
        run.until(lambda: step_of(latest.read_text()) >= 10 and "Filtered out" in run.output())
        out.touch()
        assert run.wait() != 0
        assert "every sample needs a reward: the reward function" in run.output()
        assert "raised OSError: no judge" in run.output() and "preference group 'bob'" in run.output()
        tag = latest.read_text()
        assert step_of(tag) >= len(run.steps) - 2  # the sampler ends the run, perhaps between a row and its checkpoint
        assert run.checkpoint(tag)["estimator"]["history"]["seen"].sum() == 8 * step_of(tag)

    environment = {**host_copy.environment, "OPENRLHF_PLUGINS": "pgrpo"}
    run = check_kill_and_resume(
        partial(start, module="openrlhf.cli.train_ppo_ray", **environment),
        new_recording, tmp_path, "recorded_pgrpo_eb", kill_engine, "--reward.remote_url", path,
        "--data.label_key", "struct",
        "--train.async_enable", "--train.partial_rollout_enable", "--algo.dynamic_filtering_enable",
        "--algo.dynamic_filtering_range", 0.3, 1e6, "--train.num_episodes", 50,
        "--advantage_estimator", "pgrpo_robust", "--robust.base", "recorded_pgrpo_eb", end=lose_the_judge,
    )  # fmt: skip
    assert "advantages: pgrpo_robust weights those of recorded_pgrpo_eb by preference group" in run.output()
    groups = run.steps[-1]["pref_groups"].values()  # the host's loss is a mean over tokens, and so is that of weights
    tokens = [group["share"] * group["response_length_mean"] for group in groups]
    assert np.average([group["weight"] for group in groups], weights=tokens) == pytest.approx(1)
    assert all(group["robust_alpha"] != 1 / 3 for group in groups) and run.steps[-1]["estimator"] == "pgrpo_robust"
    assert "prompts that it drops do not enter the reward history" in run.output()
    for batch in run.batches:  # no prompt whose mean score is out of range has come through
        means = np.bincount(batch.prompt_groups, batch.rewards) / np.bincount(batch.prompt_groups)
        assert means.min() > 0.3
        assert all(set(label) == {"persona", "who", "nested"} for label in batch.labels)
        assert [label["persona"] for label in batch.labels] == list(batch.pref_groups)
