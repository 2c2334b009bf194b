"""Parts of an asynchronous run die: it ends with a sentence, leaves nothing behind, and can be resumed."""

import os
import signal
import time

import pytest

pytestmark = pytest.mark.e2e

BOUND = 120  # seconds, on a busy machine


def test_an_engine_and_the_driver_of_an_async_run_are_killed(start, new_recording, tiny):
    recording = new_recording("recording")
    flags = (
        *recording.flags, "--data.pref_group_key", "persona", "--pgrpo.min_count", 4, "--train.async_enable",
        "--train.partial_rollout_enable", "--reward.remote_url", tiny / "reward.py", "--ckpt.save_steps", 1,
        "--train.num_episodes", 1000,
    )  # fmt: skip
    run = start(*flags, **recording.environment)
    run.until(lambda: len(run.steps) >= 3)
    run.started.kill_one("ray::RolloutRayActor")
    assert run.wait(BOUND) != 0
    assert "[pgrpo] the run has failed: a rollout engine (vLLM) died." in run.output(), run.tail()
    tag = (run.folder / "ckpt" / "_actor" / "latest").read_text()
    assert f"[pgrpo] resume from {tag} in {run.folder}/ckpt: the same command, with --ckpt.load_enable" in run.output()
    saved = run.checkpoint(tag)["estimator"]
    assert saved["history"]["seen"].sum() == 8 * int(tag.removeprefix("global_step"))

    resumed = start(*flags, "--ckpt.load_enable", **recording.environment)
    resumed.until(lambda: len(resumed.steps) >= int(tag.removeprefix("global_step")) + 2)
    _, (restored, _) = recording.runs()
    assert recording.equal(restored, saved)
    os.kill(resumed.process.pid, signal.SIGKILL)
    resumed.process.wait()
    deadline = time.monotonic() + BOUND
    while resumed.started.pids:  # Ray, its workers and vLLM
        assert time.monotonic() < deadline, "the run was killed, and these live on"
        time.sleep(0.2)
