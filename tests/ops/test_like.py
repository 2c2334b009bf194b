"""The doctor looks at the words of a training command."""

import json
import shlex
import subprocess
import sys

import pytest

from openrlhf_pgrpo.ops import like
from openrlhf_pgrpo.ops.doctor import FAULT, OK, diagnose_like

pytestmark = pytest.mark.host

OURS = "python -m openrlhf_pgrpo.cli"
DPO = (
    "--model.model_name_or_path hub --data.dataset pairs.jsonl --data.prompt_key prompt --train.batch_size 4 "
    "--train.micro_batch_size 2 --data.max_len 64 --pgrpo.device cpu"
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    pairs = [{"prompt": "p ", "chosen": f"yes {i}", "rejected": f"no {i}", "g": "ab"[i % 2]} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = {
    "plain": (f"{OURS}.train_rm --a b", "train_rm", {}),
    "the host's own": ("python -m openrlhf.cli.train_dpo --a b", "train_dpo", {}),
    "a file": (".venv/bin/python /opt/site-packages/openrlhf/cli/serve_rm.py --a b", "serve_rm", {}),
    "variables first": (f"A=1 B='two words' {OURS}.train_rm --a b", "train_rm", {"A": "1", "B": "two words"}),
    "env": (f"env A=1 {OURS}.train_rm --a b", "train_rm", {"A": "1"}),
    "several lines": (f"{OURS}.train_rm \\\n    --a \\\n    b", "train_rm", {}),
    "between others": (f"cd x && {OURS}.train_rm --a b 2>&1 | tee log", "train_rm", {}),
    "in the background": (f"nohup {OURS}.train_rm --a b > log &", "train_rm", {}),
    "into a file": (f"{OURS}.train_rm --a b > log", "train_rm", {}),
    "at the end of a file": (f"{OURS}.train_rm --a b >>log", "train_rm", {}),
    "errors into a file": (f"{OURS}.train_rm --a b 2>err", "train_rm", {}),
    "over a file": (f"{OURS}.train_rm --a b >| log", "train_rm", {}),
    "all into a file": (f"{OURS}.train_rm --a b &>>log", "train_rm", {}),
    "from a file": (f"{OURS}.train_rm --a b < in", "train_rm", {}),
    "torchrun": ("torchrun --nproc_per_node 2 --nnodes=3 -m openrlhf_pgrpo.cli.train_rm --a b", "train_rm",
                 {"WORLD_SIZE": "6"}),
    "deepspeed": ("deepspeed --num_gpus 4 --num_nodes 2 --module openrlhf_pgrpo.cli.train_dpo --a b", "train_dpo",
                  {"WORLD_SIZE": "8"}),
    "deepspeed on named GPUs": ("deepspeed --include a:0,1@b:2 --module openrlhf_pgrpo.cli.train_dpo --a b",
                                "train_dpo", {"WORLD_SIZE": "3"}),
    "a Ray job": (f"ray job submit --address http://head:8265 -- {OURS}.train_ppo_ray --a b", "train_ppo_ray",
                  {"RAY_ADDRESS": "http://head:8265"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", WORDS)
def test_a_command_is_read_as_a_shell_reads_it(kind):
    text, script, environment = WORDS[kind]
    command = like.read_command(text)
    assert (command.script, command.argv, command.environment) == (script, ["--a", "b"], environment)
    assert command.own == (kind not in ("the host's own", "a file"))


@pytest.mark.parametrize("value", ["<|im_end|>", "<|user|>{}<|assistant|>", "<s>[INST]{}[/INST]", "{} > "])
def test_a_quoted_value_may_begin_as_a_redirection_does(value):
    argv = ["--reward.end", value, "--port", "5001"]
    assert like.read_command(shlex.join(["python", "-m", "openrlhf.cli.serve_rm", *argv]) + " > log").argv == argv


@pytest.mark.parametrize("text", ["", "python train.py", "make demo", "openrlhf-pgrpo report out"])
def test_words_without_a_script_of_the_host_are_refused(text):
    with pytest.raises(ValueError, match="--like needs a command that starts one of train_ppo_ray, .*, got"):
        like.read_command(text)


def test_an_open_quotation_is_refused():
    with pytest.raises(ValueError, match="got an open end .No closing quotation.: close it"):
        like.read_command(f"{OURS}.train_rm --a 'b")


def test_a_good_command_is_told_how_many_updates_it_makes(here):
    *host, tokens, found = diagnose_like(f"{OURS}.train_dpo {DPO}")
    assert tokens.level == OK and "not counted here: the folder of hub" in tokens.found
    assert found.level == OK and found.found.startswith("this run makes 6 updates of 4 pairs: 1 epoch of 24 pairs")
    assert [finding.subject for finding in host] == ["openrlhf"]


FAULTS = {
    "more processes than fit": (f"torchrun --nproc_per_node 4 -m openrlhf_pgrpo.cli.train_dpo {DPO}",
                                "--train.batch_size needs a multiple of 8"),
    "a wrong file": (f"{OURS}.train_dpo {DPO} --data.dataset lost.jsonl", "exists, got 'lost.jsonl'"),
    "a wrong flag": (f"{OURS}.train_dpo {DPO} --robust.eat 3", "unrecognized arguments: --robust.eat 3"),
    "a flag without effect": (f"{OURS}.train_dpo {DPO} --robust.eta 3", "--robust.eta needs --data.pref_group_key"),
    "no patch": (f"python -m openrlhf.cli.train_dpo {DPO}", "got the host's own openrlhf.cli.train_dpo, which is not"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
def test_what_would_go_wrong_is_a_fault_with_its_remedy(kind, here):
    text, said = FAULTS[kind]
    found = list(diagnose_like(text))[-1]
    assert found.level == FAULT and said in f"{found.found}: {found.remedy}", found


def test_a5_a_group_of_pairs_that_are_equal_once_they_are_cut_is_a_fault(here, tiny):
    """In a process of its own, with our hooks on the host's dataset, as in a run."""
    text = f"{OURS}.train_dpo {DPO} --model.model_name_or_path {tiny / 'model'} --data.pref_group_key g"
    same = "x" * 70
    pairs = [{"prompt": "p ", "chosen": f"{same * (g == 'b')}yes", "rejected": f"{same * (g == 'b')}no", "g": g}
             for g in "ab" * 12]  # fmt: skip
    (here / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    found = list(diagnose_like(text))[-1]
    assert found.level == FAULT and "answers differ in their first 64 tokens" in found.found, found
    assert "got none of 'b'" in found.found and "raise --data.max_len" in found.remedy


def test_the_command_line_says_it_in_seconds_and_by_its_exit_code(here):
    def doctor(*words):
        command = [sys.executable, "-m", "openrlhf_pgrpo.cli.main", "doctor", *words]
        return subprocess.run(command, capture_output=True, text=True)

    good = doctor("--like", f"{OURS}.train_dpo {DPO}")
    assert good.returncode == 0 and good.stdout.endswith("faults: 0; a run with this command can start\n")
    bad = doctor("--like", f"{OURS}.train_dpo {DPO} --train.batch_size 128")
    assert bad.returncode == 1 and "one update needs 128 pairs" in bad.stdout
    both = doctor("--like", "x", "--cluster")
    assert both.returncode == 1 and "leave --cluster and --model out" in both.stderr
