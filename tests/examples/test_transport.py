"""`examples/benchmarks/transport.py` without its runs: what its probe counts, in a real Ray, and the table made of it;
and `controller_limit.py` at sizes whose times mean nothing."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import transport
import transport_probe
from openrlhf_pgrpo.host.tags import TaggedPrompt

pytestmark = pytest.mark.host

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


def run(script, *words):
    return subprocess.run([sys.executable, FOLDER / script, *words], capture_output=True, text=True)


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--steps", "2"], "needs --steps of at least 3, for medians, got 2"),
        (["--characters", "10"], "needs --characters from 11 to 200, got 10"),
        (["--characters", "201"], "needs --characters from 11 to 200, got 201"),
        (["--modes", "both"], "invalid choice: 'both'"),
        (["--nodes", "3"], "invalid choice: 3"),
    ],
)
def test_transport_refuses_arguments(tmp_path, words, complaint):
    done = run("transport.py", str(tmp_path / "run"), *words)
    assert done.returncode == 2 and complaint in done.stderr
    assert not (tmp_path / "run").exists()


def test_transport_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "mine").touch()
    done = run("transport.py", str(tmp_path))
    assert done.returncode == 2 and f"needs a new or empty folder, got {tmp_path}" in done.stderr


def test_controller_limit_refuses_more_preference_groups_than_samples():
    done = run("controller_limit.py", "--samples", "10", "--pref-groups", "11")
    assert done.returncode == 2 and "needs 1 <= --pref-groups <= --samples, got 11 and 10" in done.stderr


@pytest.mark.parametrize(
    ("mode", "nodes", "engines", "more"),
    [
        ("sync", 1, "1", []),
        ("async", 1, "1", ["--train.async_enable"]),
        ("sync", 2, "2", ["--train.colocate_all", "--actor.num_nodes", "2"]),
        ("async", 2, "1", ["--train.async_enable"]),
    ],
)
def test_shape(mode, nodes, engines, more):
    expected = ["--vllm.num_engines", engines, *more, "--actor.num_gpus_per_node", "1"]
    assert transport.shape(mode, nodes) == expected


# ---- the probe ------------------------------------------------------------------------------------------------------

IN_RAY = """
import sys
import ray
import ray._private.serialization as serialization
import transport_probe
from openrlhf_pgrpo.host.tags import TaggedPrompt

transport_probe.count_serialization(serialization)
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False,
         runtime_env={"worker_process_setup_hook": "worker_hook.setup"})

@ray.remote
class Engine:
    async def generate_responses(self, prompt, label, num_samples):
        return [{"observation_tokens": [1] * 10, "prompt": prompt} for _ in range(num_samples)]

class Generator:
    args = type("", (), {"rollout": type("", (), {"n_samples_per_prompt": 3})})
    def dispatch(self, prompts):
        return [engine.generate_responses.remote(prompt=p, label="", num_samples=3) for p in prompts]

engine = Engine.remote()
for prompts in (["abcd"] * 2, [TaggedPrompt("abcd", "ana", "u1")] * 2):
    refs = transport_probe.dispatch(Generator().dispatch, Generator, (prompts,), {})
    assert ray.get(refs)[0][0]["prompt"] == "abcd"
context = ray._private.worker.global_worker.get_serialization_context()
print(*[context.serialize(value).total_bytes for value in
        ("prompt", "label", "num_samples", "", 3, "abcd", TaggedPrompt("abcd", "ana", "u1"))])
"""


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """What the probe wrote in a Ray instance whose one actor answers two calls with plain prompts, then two with
    tagged ones; and the sizes of each argument, as Ray serializes it alone."""
    folder = tmp_path_factory.mktemp("probe")
    hook = "def setup():\n    import ray._private.serialization as s, transport_probe\n"
    (folder / "worker_hook.py").write_text(hook + "    transport_probe.count_serialization(s)\n")
    (folder / "driver.py").write_text(IN_RAY)
    rows = folder / "rows"
    rows.mkdir()
    done = subprocess.run(
        [sys.executable, folder / "driver.py"],
        env={**os.environ, "PYTHONPATH": f"{FOLDER}:{folder}", "TRANSPORT_PROBE": str(rows)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    written = [json.loads(line) for path in rows.iterdir() for line in path.read_text().splitlines()]
    return written, [int(word) for word in done.stdout.split()[-7:]]


def test_probe_counts_the_bytes_of_a_call_exactly(probed):
    rows, (*names_and_numbers, plain, tagged) = probed
    sent = [row for row in rows if row.get("leg") == "prompts" and row["side"] == "out"]
    assert [row["samples"] for row in sent] == [2 * 3, 2 * 3]
    assert [row["bytes"] for row in sent] == [2 * (sum(names_and_numbers) + size) for size in (plain, tagged)]
    assert tagged > plain
    assert {row["process"] for row in sent} == {None}  # the driver


def test_probe_sees_every_sample_at_both_ends(probed):
    seen = Counter()
    for row in probed[0]:
        seen[row["leg"], row["side"], row["process"]] += row["samples"]
    assert seen == {
        **{(leg, side, None): 12 for leg in ("prompts", "tokenizer") for side in ("out", "both")},
        **{(leg, "in", "Engine"): 12 for leg in ("prompts", "tokenizer")},
        ("responses", "out", "Engine"): 12,
        **{("responses", side, None): 12 for side in ("in", "both")},
    }


def test_probe_times_plain_and_tagged_where_it_may_wait(probed):
    timed = [row for row in probed[0] if row["side"] == "both" and row["leg"] != "tokenizer"]
    assert len(timed) == 2 + 4
    assert all(row["stock"] > 0 and row["ours"] > 0 for row in timed)


def test_probe_finds_no_tokenizer_where_there_is_none(probed):
    assert {row["bytes"] for row in probed[0] if row["leg"] == "tokenizer" and row["side"] == "out"} == {0}


def test_leg_of():
    leg_of = transport_probe.leg_of

    class Experience(SimpleNamespace):
        pass

    two, three = (Experience(sequences=torch.zeros(size, 5)) for size in (2, 3))
    assert leg_of({"experience": [two, three]}) == ("experiences", 5)
    assert leg_of({"sequences": [two.sequences, three.sequences], "action_mask": []}) == ("tokens", 5)
    assert leg_of([two.sequences, three.sequences]) == ("log-probs", 5)
    assert leg_of([{"observation_tokens": []}] * 4) == ("responses", 4)
    assert leg_of(([two, three], {}, None, 1.0)) == ("queue", 2)
    for other in ([], {}, None, "sequences", [None], [{"prompt": ""}], ("eval", 1, {}), ([], {}, None, 1.0), [1.0]):
        assert leg_of(other) is None


def test_without_tags():
    without_tags = transport_probe.without_tags

    class Experience(SimpleNamespace):
        pass

    one, two = TaggedPrompt("q", "ana", "u1"), TaggedPrompt("q", "ben")
    first, again = without_tags([TaggedPrompt("long", "ana")] * 2)
    assert first is not again, "pickle would write them once, and the host has them twice"
    experience = Experience(prompts=[one, two, one], sequences=torch.zeros(3, 5))
    plain, answers, untouched = without_tags(([experience], {"prompt": one, "n": [1, "label"]}, "queue"))
    assert [type(prompt) for prompt in [*plain[0].prompts, answers["prompt"]]] == [str] * 4
    assert plain[0].prompts == ["q"] * 3
    assert plain[0].sequences is experience.sequences
    assert (answers["n"], untouched) == ([1, "label"], "queue")
    assert experience.prompts == [one, two, one] and type(experience.prompts[0]) is TaggedPrompt
    assert without_tags("plain") == "plain" and without_tags(7) == 7


def test_argument():
    argument = transport_probe.argument
    values = ["prompt", "num_samples ", "images", None, "num_samples", 4]
    assert argument(values, "num_samples") == 4
    assert argument([np.array(["num_samples", "x"]), b"num_samples", 4], "num_samples") is None


def test_clock_of_the_log_leaves_out_the_hosts_part(monkeypatch):
    written = []
    ticks = iter([0.0, 1.0, 6.0, 8.0])  # ours begins; the host's begins and ends; ours ends
    monkeypatch.setattr(transport_probe.time, "thread_time", lambda: next(ticks))
    monkeypatch.setattr(transport_probe, "write", lambda **row: written.append(row))

    class StepLog:
        def step(self, save, number):
            return save(number) + 1

    module = SimpleNamespace(StepLog=StepLog)
    transport_probe.clock_log(module)
    assert StepLog().step(lambda number: number * 10, 4) == 41
    assert written == [{"part": "log", "seconds": 3.0}]


# ---- the table ------------------------------------------------------------------------------------------------------


def ends(leg, samples, size, stock, ours, senders=("A",), node="n1", other="n2"):
    """Two calls of `samples` samples on a leg, at each of its ends; half of them received on another node."""
    rows = []
    for sender in senders:
        for where in (node, other):
            common = {"leg": leg, "samples": samples}
            rows.append({**common, "side": "out", "bytes": size, "process": sender, "node": node})
            rows.append({**common, "side": "in", "process": "B", "node": where})
            rows.append({**common, "side": "both", "stock": stock, "ours": ours, "process": sender, "node": node})
    return rows


def test_bytes_of_a_leg():
    rows = ends("prompts", samples=4, size=100, stock=1e-6, ours=1e-6)
    rows[0]["bytes"] = 140  # 35 and 25 bytes a sample
    assert transport.leg_bytes(rows) == pytest.approx((30.0, 5 / 2**0.5))


def test_bytes_of_a_leg_of_two_hops_are_added():
    rows = ends("queue", samples=4, size=100, stock=1e-6, ours=1e-6, senders=("Generator", "Queue"))
    assert transport.leg_bytes(rows) == (50.0, 0.0)


def test_times_of_a_leg():
    rows = ends("queue", samples=4, size=100, stock=8e-6, ours=10e-6)
    rows[2]["ours"] = 14e-6  # 2 and 6 us more, for 4 samples
    stock, ours, added = transport.leg_times(rows, hops=2)
    assert stock == pytest.approx((2 * 2e-6, 0.0))
    assert ours.value == pytest.approx(2 * 3e-6)
    assert added == pytest.approx((2 * 1e-6, 1.2533 * 1.4826 * 2 * 0.5e-6 / 2**0.5))


def test_what_is_added_is_the_median_of_pairs():
    times = transport.paired([1.0, 10.0, 100.0], [2.0, 11.0, 102.0])
    assert (times.stock.value, times.ours.value, times.added.value) == (10.0, 11.0, 1.0)


def test_median_and_its_error():
    value, error = transport.median([1.0, 2.0, 3.0, 4.0])
    assert (value, error) == pytest.approx((2.5, 1.2533 * 1.4826 * 1.0 / 2))


def test_measured_adds_errors_in_squares():
    measured = transport.Measured
    assert measured(5.0, 3.0) - measured(1.0, 4.0) == (4.0, 5.0)
    assert measured(5.0, 3.0) + measured(1.0, 4.0) == (6.0, 5.0)


@pytest.mark.parametrize(("node", "other", "share"), [("n1", "n1", 0.0), ("n1", "n2", 0.5)])
def test_crossed(node, other, share):
    crossed = transport.crossed
    rows = ends("prompts", samples=4, size=100, stock=1e-6, ours=1e-6, node=node, other=other)
    assert crossed(rows) == share
    swapped = [{**row, "side": {"in": "out", "out": "in", "both": "both"}[row["side"]]} for row in rows]
    assert crossed(swapped) == share
    away = [{**row, "node": "n3"} if row["side"] == "in" else row for row in rows]
    assert crossed(away) == 1.0


def test_table_adds_legs_and_own_code():
    per_step = transport.PROMPTS * transport.SAMPLES
    stock = [row for leg in ("prompts", "tokens") for row in ends(leg, samples=4, size=100, stock=1.0, ours=1.0)]
    ours = ends("prompts", samples=4, size=140, stock=8e-6, ours=20e-6)
    ours += ends("tokens", samples=4, size=104, stock=1e-6, ours=2e-6)
    ours += [{"part": "dataset, host", "seconds": 7.0}, {"part": "dataset", "seconds": 7.0 + 8 * 1e-6}]
    microseconds = {"advantages, host": 10, "advantages": 30, "reward batch": 4, "metrics": 5, "samples": 1, "log": 2}
    ours += [{"part": part, "seconds": per_step * value * 1e-6} for part, value in microseconds.items()]
    text, (size, seconds) = transport.table(stock, ours)

    assert size.value == 10.0 + 1.0
    # 3 us more on the leg of prompts, 1 of the dataset, 20 of advantages (metrics and batch are in it), 2 of the log;
    # tokens hold nothing of ours
    assert seconds.value == pytest.approx((3 + 1 + 20 + 2) * 1e-6)
    lines = {line[:48].strip(): line[48:].split() for line in text.splitlines()[2:]}
    assert lines["prompt, label and parameters, to an engine"][:6] == ["25.0", "35.0", "10.0", "2.0", "5.0", "3.0"]
    assert lines["prompt, label and parameters, to an engine"][-1] == "50%"
    assert lines["dataset: tags and checks"][:3] == ["0.0", "1.0", "1.0"]
    assert lines["advantages and metrics"][:3] == ["10.0", "30.0", "20.0"]
    assert lines["reward batch"][:3] == ["0.0", "4.0", "4.0"]
    assert lines["log"][:3] == ["0.0", "2.0", "2.0"]


def test_read_refuses_a_leg_that_was_not_seen_whole(tmp_path):
    probe = tmp_path / "probe"
    probe.mkdir()

    def write(legs):
        rows = []
        for leg in legs:
            senders = ("A", "B") if leg == "queue" else ("A",)
            rows += ends(leg, samples=32, size=1, stock=1e-6, ours=1e-6, senders=senders)
        (probe / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return rows

    without_queue = [leg for leg in transport.LEGS if leg != "queue"]
    rows = write(without_queue)
    assert transport.read(tmp_path, 64, queue=False) == rows
    rows = write(transport.LEGS)
    assert transport.read(tmp_path, 64, queue=True) == rows
    with pytest.raises(SystemExit, match="needs 0 samples on the leg 'queue', got 128 sent and 128"):
        transport.read(tmp_path, 64, queue=False)
    write([leg for leg in without_queue if leg != "tokens"])
    with pytest.raises(SystemExit, match="needs 64 samples on the leg 'tokens', got 0 sent and 0 received"):
        transport.read(tmp_path, 64, queue=False)
    rows = [row for row in rows if (row["leg"], row["side"]) != ("tokens", "in")]
    (probe / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="needs 64 samples on the leg 'tokens', got 64 sent and 0 received"):
        transport.read(tmp_path, 64, queue=True)


def test_read_lets_the_host_ask_twice(tmp_path):
    (tmp_path / "probe").mkdir()
    rows = [row for leg in transport.LEGS if leg != "queue" for row in ends(leg, 32, 1, 1e-6, 1e-6)]
    rows += [row for row in rows if (row["leg"], row["side"]) == ("log-probs", "in")]
    (tmp_path / "probe" / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert transport.read(tmp_path, 64, queue=False) == rows


# ---- the limit of the controller ------------------------------------------------------------------------------------


def test_controller_limit():
    done = run("controller_limit.py", "--samples", "2000", "--pref-groups", "500", "--outstanding", "10", "100")
    assert done.returncode == 0, done.stderr
    printed = {line[:44].strip(): line[44:].split() for line in done.stdout.splitlines()}
    for part in (
        *("dataset: checked, once a run", "dataset: tagged, once a run", "reward batch", "pgrpo, its first step"),
        *("pgrpo, a later one", "or pgrpo_eb, its first step", "metrics of each preference group"),
        *("an answer of each, at most 16", "checkpoint: its state, copied"),
    ):
        seconds, per_sample, _ = map(float, printed[part])
        assert per_sample == pytest.approx(1e6 * seconds / 2000, abs=1e6 * 0.005 / 2000 + 0.01)
    metrics_per_group = 10
    assert f"log: TensorBoard, {500 * metrics_per_group + 1} scalars" in printed
    assert "500 preference groups" in done.stdout
    assert "experience of a response:" in done.stdout and "24.0 bytes a token" in done.stdout
    waits = [float(line.split()[4]) for line in done.stdout.splitlines() if line.startswith("ray.wait over")]
    assert len(waits) == 2 and 0 < waits[0] < waits[1]
