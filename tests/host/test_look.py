"""The look that every door takes before anything heavy starts."""

import ast
import json
import time

import pytest
import torch

from openrlhf_pgrpo.files import write_rows as write
from openrlhf_pgrpo.host import doors, flags, reader, script
from openrlhf_pgrpo.host.ppo import reward_sources

pytestmark = pytest.mark.host

SIZES = (
    "--vllm.num_engines 1 --rollout.batch_size 4 --rollout.n_samples_per_prompt 2 --rollout.micro_batch_size 4 "
    "--train.batch_size 8 --train.micro_batch_size 4 --data.max_len 64 --algo.kl.init_coef 0 --pgrpo.device cpu"
).split()
PAIR_SIZES = "--train.batch_size 4 --train.micro_batch_size 2 --data.max_len 64 --pgrpo.device cpu".split()
METRICS = '{"step": 1, "run": {"settings": {}}}\n{"step": 2}\n'
REWARD = "def reward_func(queries, prompts, labels):\n    return {}\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model, prompts, pairs and a reward function."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    write(tmp_path / "prompts.jsonl", [{"input": f"{i} says ", "answer": "x", "g": "ab"[i % 2]} for i in range(24)])
    write(tmp_path / "eval.jsonl", [{"input": "who says ", "answer": "x"}])
    pairs = [{"prompt": "p ", "chosen": f"yes {i}", "rejected": f"no {i}", "g": "ab"[i % 2]} for i in range(24)]
    write(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


@pytest.fixture
def seen(here):
    """What a door says of a command, or raises; later words win."""
    base = {
        "PPO": [*SIZES, "--actor.model_name_or_path", "model", "--data.prompt_dataset", "prompts.jsonl"]
        + ["--reward.remote_url", "reward.py", "--data.input_key", "input", "--data.label_key", "answer"],
        "DPO": [*PAIR_SIZES, "--model.model_name_or_path", "model", "--data.dataset", "pairs.jsonl"]
        + ["--data.prompt_key", "prompt"],
    }
    base["RM"] = [*base["DPO"], "--eval.dataset", "pairs.jsonl"]

    def seen(name, *words, tokens=False):
        door = getattr(doors, name)
        args = door.parse_args(script.host_parser(door.script), [*base[name], *map(str, words)])
        return door.look(flags.nest(args), tokens=tokens)

    return seen


@pytest.mark.parametrize(
    "name, said",
    [
        ("PPO", "this run makes 6 updates of 8 samples in 6 steps"),
        ("DPO", "this run makes 6 updates of 4 pairs"),
        ("RM", "this run makes 6 updates of 4 pairs"),
    ],
)
def test_a_look_says_how_many_updates_a_run_makes(name, said, seen):
    assert any(sentence.startswith(said) for sentence in seen(name))


@pytest.mark.parametrize(
    "door, flag, wrong, need",
    [
        ("PPO", "rollout.temperature", (0, -1, "nan"), "a finite number above 0"),
        ("PPO", "rollout.top_p", (0, 1.1), "a number above 0 to 1"),
        ("PPO", "actor.lr_warmup_ratio", (100, -1, "nan"), "a number from 0 to 1"),
        ("PPO", "algo.advantage.gamma", (1.5,), "a number from 0 to 1"),
        ("DPO", "lr_warmup_ratio", (100, -1, "nan"), "a number from 0 to 1"),
        ("DPO", "model.beta", (0, -0.1, "inf"), "a finite number above 0"),
        ("DPO", "model.label_smoothing", (0.5, 1), "a number from 0 to below 0.5"),
        ("RM", "max_norm", (-1, "nan"), "a finite number from 0"),
        ("RM", "min_lr_ratio", (2,), "a number from 0 to 1"),
        ("DPO", "ds.lora.rank 8 --ds.lora.alpha", (0,), "a finite number above 0"),
        ("DPO", "ds.lora.rank 8 --ds.lora.dropout", (1,), "a number from 0 to below 1"),
        ("PPO", "train.enable_ema --train.ema_beta", (1, -0.1), "a number from 0 to below 1"),
    ],
)
def test_a8_numbers_that_train_nonsense_or_nothing_are_refused(door, flag, wrong, need, seen):
    """A run with them ended with exit code 0; a warm-up of 100 is meant as a number of steps."""
    for number in wrong:
        with pytest.raises(ValueError, match=f"^--{flag.split('--')[-1]} needs {need}, got {number}"):
            seen(door, *f"--{flag}".split(), number)


def test_a8_adapters_that_are_not_there_may_have_any_numbers(seen):
    assert seen("DPO", "--ds.lora.alpha", 0)


@pytest.mark.parametrize("name, got", [("", "none"), ("pairs.jsonl", "the file 'pairs.jsonl'")])
@pytest.mark.parametrize("flag", ["ckpt.output_dir", "ckpt.path"])
def test_a16_a_folder_to_save_in_that_is_none_is_refused(flag, name, got, seen):
    """An unset $OUT was found when the trained model was to be saved."""
    for door in ("PPO", "DPO", "RM"):
        with pytest.raises(ValueError, match=f"--{flag} needs a folder, got {got}"):
            seen(door, f"--{flag}", name)


def test_a8_a_run_that_draws_too_few_samples_for_one_update_is_refused(seen):
    """24 prompts x 2 samples, and the host's batch of 128: all steps would train nothing."""
    with pytest.raises(ValueError, match="one update needs 128 samples .*, the run draws 48 samples"):
        seen("PPO", "--train.batch_size", 128)


@pytest.mark.parametrize("url", ["reward.py,other.py", "reward.py,http://a:5000/get_reward", "http://a:1/b,reward.py"])
def test_a11_more_than_one_source_with_a_file_is_refused(url, seen):
    """The host loads the first of them alone."""
    with pytest.raises(ValueError, match="--reward.remote_url needs one file or any number of URLs, got"):
        seen("PPO", "--reward.remote_url", url)


def test_a11_several_servers_are_fine(seen):
    assert seen("PPO", "--reward.remote_url", "http://a:5000/get_reward,https://b/get_reward")


@pytest.mark.parametrize(
    "flags", [("train.agent_func_path", "reward.remote_url"), ("reward.remote_url", "reward.model_name_or_path")]
)
def test_a11_two_kinds_of_rewards_at_once_are_refused(flags, seen, here):
    """The host uses one of them, and says nothing of the other."""
    (here / "agent.py").write_text("class AgentExecutor(Base): pass\n")
    sources = {"train.agent_func_path": "agent.py", "reward.remote_url": "reward.py"}
    sources["reward.model_name_or_path"] = "model"
    first, second = (f"--{flag} {sources[flag]}" for flag in flags)
    with pytest.raises(ValueError, match=f"needs one source of rewards, got {first} and {second}: leave out all but"):
        seen("PPO", *first.split(), *second.split())


CLASHES = {
    "needs engines that generate, got --vllm.num_engines None: pass": ("--vllm.num_engines", None),
    "PPO needs rewards, got none of --reward.remote_url": ("--reward.remote_url", ""),
    "--reward.remote_url needs a .py file, got 'lost.py', which does not exist": ("--reward.remote_url", "lost.py"),
    "--reward.remote_url needs a .py file or URLs .*, got 'a:5000'": ("--reward.remote_url", "a:5000"),
    "--train.agent_func_path needs a .py file, got 'agent'": (
        *("--reward.remote_url", "", "--train.agent_func_path", "agent"),
    ),
    "needs a class AgentExecutor at the top level, got none, of reward.py": (
        *("--reward.remote_url", "", "--train.agent_func_path", "reward.py"),
    ),
    "--data.prompt_dataset needs a file or folder that exists, got 'lost.jsonl'": (
        ("--data.prompt_dataset", "lost.jsonl")
    ),
    "--data.prompt_dataset needs data, got none": ("--data.prompt_dataset", ""),
    "--data.prompt_dataset needs rows, got the empty file 'void.jsonl'": ("--data.prompt_dataset", "void.jsonl"),
    "--data.prompt_dataset needs rows, got the empty folder 'void'": ("--data.prompt_dataset", "void"),
    "--data.prompt_dataset needs a file of .json, .*, got 'rows.txt'": ("--data.prompt_dataset", "rows.txt"),
    "--data.prompt_dataset needs files with rows, got the Python script 'reward.py'": (
        ("--data.prompt_dataset", "reward.py")
    ),
    "got an empty one": ("--data.prompt_dataset", "prompts.jsonl,"),
    "--data.prompt_split needs a split of 'prompts.jsonl' .*, got 'test'; splits are .'train'.": (
        ("--data.prompt_split", "test")
    ),
    "--data.prompt_dataset with 1 parts needs as many probabilities": ("--data.prompt_probs", "0.5,0.5"),
    "--data.input_key needs a column of 'prompts.jsonl', got 'prompt'; columns are": ("--data.input_key", "prompt"),
    "--data.label_key needs a column of 'prompts.jsonl', got 'label'": ("--data.label_key", "label"),
    "--data.pref_group_key needs a column of 'prompts.jsonl'": ("--data.pref_group_key", "persona"),
    "--eval.dataset needs a file or folder that exists, got 'lost.jsonl'": ("--eval.dataset", "lost.jsonl"),
    "--eval.split needs a split of 'eval.jsonl' .*, got 'test'": (
        "--eval.dataset",
        "eval.jsonl",
        "--eval.split",
        "test",
    ),
    "--actor.model_name_or_path needs a folder of a model, got './lost', which does not exist": (
        ("--actor.model_name_or_path", "./lost")
    ),
    "--data.prompt_dataset needs a file or folder that exists, got 'my rows'": ("--data.prompt_dataset", "my rows"),
    "--actor.model_name_or_path needs a folder of a model, got 'my model', which does not exist": (
        ("--actor.model_name_or_path", "my model")
    ),
    "--actor.model_name_or_path needs a folder of a model, got 'void', which has no config.json": (
        ("--actor.model_name_or_path", "void")
    ),
    "--actor.model_name_or_path needs a folder, got the file 'reward.py'": ("--actor.model_name_or_path", "reward.py"),
    "--critic.model_name_or_path needs a folder of a model, got './lost', which does not exist": (
        ("--critic.model_name_or_path", "./lost")
    ),
    "--critic.model_name_or_path needs a folder of a model, got 'void', which has no config.json": (
        ("--critic.model_name_or_path", "void")
    ),
    "--actor.model_name_or_path needs a folder or the name of a model on the hub, got none": (
        ("--actor.model_name_or_path", "")
    ),
}


@pytest.mark.parametrize("message", CLASHES)
def test_d5_what_a_glance_at_flags_and_files_shows_is_said(message, seen, here):
    """No engine, no reward, no data, a wrong file, column or split: needs, got, do."""
    (here / "void.jsonl").touch()
    (here / "rows.txt").write_text("a\n")
    (here / "void").mkdir()
    words = CLASHES[message]
    if words[-1] is None:
        door = doors.PPO
        args = door.parse_args(script.host_parser(door.script), [])
        with pytest.raises(ValueError, match=message):
            door.look(flags.nest(args))
        return
    with pytest.raises(ValueError, match=message) as refused:
        seen("PPO", *words)
    assert ": " in str(refused.value)


@pytest.mark.parametrize(
    "name, words, message",
    [
        ("DPO", ("--data.dataset", "lost.jsonl"), "--data.dataset needs a file or folder that exists"),
        ("RM", ("--data.chosen_key", "good"), "--data.chosen_key needs a column of 'pairs.jsonl', got 'good'"),
        ("DPO", ("--data.prompt_key", "question"), "--data.prompt_key needs a column of 'pairs.jsonl'"),
        ("DPO", ("--data.dataset_split", "test"), "--data.dataset_split needs a split of 'pairs.jsonl'"),
        ("DPO", ("--ref.model_name_or_path", "./lost"), "--ref.model_name_or_path needs a folder of a model"),
        ("RM", ("--eval.dataset", "lost.jsonl"), "--eval.dataset needs a file or folder that exists"),
        ("RM", ("--train.batch_size", 128), "one update needs 128 pairs .*, the run draws 24 pairs"),
        ("DPO", ("--data.pref_group_key", "tribe"), "--data.pref_group_key needs a column of 'pairs.jsonl'"),
    ],
)
def test_d5_the_trainers_of_pairs_look_as_well(name, words, message, seen):
    """The brothers of PPO: other flags, the same look."""
    with pytest.raises(ValueError, match=message):
        seen(name, *words)


def test_pairs_are_shared_among_the_processes_of_a_launcher(seen, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="--train.batch_size needs a multiple of 8"):
        seen("DPO")


@pytest.mark.parametrize(
    "flag", ["data.prompt_dataset", "reward.remote_url", "actor.model_name_or_path", "eval.dataset"]
)
def test_d5_what_only_the_cluster_can_see_is_a_note(flag, seen, monkeypatch):
    """A driver need not have the files of its cluster."""
    name = {"reward.remote_url": "/far/reward.py", "actor.model_name_or_path": "/far/model"}.get(flag, "/far/a.jsonl")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert any(f"--{flag} {name} is not on this machine" in sentence for sentence in seen("PPO", f"--{flag}", name))
    monkeypatch.setenv("RAY_ADDRESS", "")
    with pytest.raises(ValueError, match=f"--{flag} needs"):
        seen("PPO", f"--{flag}", name)


def test_a_name_that_the_hub_may_know_is_not_looked_up(seen):
    said = seen("PPO", "--actor.model_name_or_path", "owner/model", "--data.prompt_dataset", "owner/prompts")
    assert "--data.prompt_dataset owner/prompts is not on this machine" in said[0] and len(said) == 1


GOOD = {
    "plain": REWARD,
    "a test in an if": f"if True:\n    {REWARD.replace(chr(10), chr(10) + '    ')}",
    "imported": "from mine import reward_func\n",
    "renamed": "from mine import score as reward_func\n",
    "assigned": "reward_func = make()\n",
    "assigned in a try": "try:\n    reward_func = fast.f\nexcept NameError:\n    reward_func = slow\n",
    "everything": "from mine import *\n",
    "a class": "class reward_func:\n    def __new__(cls, q, p, l): return {}\n",
    "any arguments": "def reward_func(*args): return {}\n",
    "more with defaults": "def reward_func(q, p, l, scale=1, *, mode='a'): return {}\n",
    "decorated": "@cached\ndef reward_func(): return {}\n",
    "made late": "globals()['reward_func'] = f\n",
    "encoded": "# -*- coding: latin-1 -*-\n" + REWARD,
}


@pytest.mark.parametrize("kind", GOOD)
def test_d5_a_reward_function_may_come_about_in_many_ways(kind, seen, here):
    """The file is read and not run, so whatever may make the function is accepted."""
    (here / "reward.py").write_text(GOOD[kind])
    assert seen("PPO")


BAD = {
    "reward_func.* at the top level, got none": "def reward(queries, prompts, labels): return {}\n",
    "needs a function reward_func.*, got none": "class A:\n    def reward_func(self, q, p, l): return {}\n",
    "got an async one in line 1": "async def reward_func(q, p, l): return {}\n",
    "got one with other arguments in line 2": "\ndef reward_func(queries, labels): return {}\n",
    "got one with other arguments": "def reward_func(q, p, l, user): return {}\n",
    "got one with other arguments in": "def reward_func(q, p, l, *, user): return {}\n",
    "needs Python, got .* in line 1 of reward.py": "def reward_func(:\n",
    "needs Python, got .* of reward.py": "\0",
}


@pytest.mark.parametrize("message", BAD)
def test_d5_a_reward_file_without_its_function_is_refused_without_running_it(message, seen, here):
    """A glance at the file shows it."""
    (here / "reward.py").write_text(BAD[message] + "raise SystemExit('it ran')\n")
    with pytest.raises(ValueError, match=message):
        seen("PPO")


def test_an_agent_is_read_as_a_reward_function_is(seen, here):
    (here / "agent.py").write_text("class AgentExecutor(Base): pass\n")
    assert seen("PPO", "--reward.remote_url", "", "--train.agent_func_path", "agent.py")


def test_the_last_definition_counts():
    tree = ast.parse(REWARD + "async def reward_func(a, b, c): pass\n")
    assert "async" in reward_sources._reward_function(tree)


def test_a6_messages_without_their_template_are_refused_before_anything_starts(seen, here):
    """Prompts that are lists of messages need --data.apply_chat_template."""
    write(here / "prompts.jsonl", [{"input": [{"role": "user", "content": "hi"}], "answer": "x", "g": "a"}] * 24)
    with pytest.raises(ValueError, match="--data.input_key.*row 0.*--data.apply_chat_template"):
        seen("PPO", "--advantage_estimator", "pgrpo", "--data.pref_group_key", "g")


def test_d18_users_that_nothing_reads_get_a_word(seen, here):
    """A reward function sees labels, not users."""
    assert any("warning: --data.user_key g does nothing here" in said for said in seen("PPO", "--data.user_key", "g"))


@pytest.mark.parametrize("name", ["group_robust", "pgrpo_robust"])
def test_d18_online_weights_need_two_preference_groups(name, seen, here):
    """One preference group has nobody to be weighed against."""
    words = ("--advantage_estimator", name, "--data.pref_group_key", "g")
    assert seen("PPO", *words)
    write(here / "prompts.jsonl", [{"input": f"{i} says ", "answer": "x", "g": "ann"} for i in range(24)])
    with pytest.raises(ValueError, match=f"{name} needs at least two preference groups .* g, got 'ann': name another"):
        seen("PPO", *words)


def test_a14_a_folder_without_profiles_is_refused(here, factorized):
    """Else every elicited user would get the average's reward."""
    (here / "none").mkdir()
    for folder in ("nosuchfolder", "none"):
        words = ["--reward.model_name_or_path", str(factorized), "--reward.profiles", folder]
        words += ["--reward.unknown_user", "mean", "--pgrpo.device", "cpu"]
        args = doors.SERVE.parse_args(script.host_parser(doors.SERVE.script), words)
        with pytest.raises(ValueError, match=f"--reward.profiles: .*{folder}"):
            doors.SERVE.look(flags.nest(args))


def test_rows_of_several_files_and_folders_are_read_as_the_run_reads_them(seen, here):
    from datasets import Dataset

    rows = [{"input": "b says ", "answer": "x", "g": "a"}] * 8
    Dataset.from_list(rows).save_to_disk(here / "saved")
    Dataset.from_list(rows).to_parquet(here / "more.parquet")
    said = seen("PPO", "--data.prompt_dataset", "prompts.jsonl, more.parquet,saved")
    assert any("episode of 40 prompts" in sentence for sentence in said)
    said = seen("PPO", "--data.prompt_dataset", "prompts.jsonl", "--data.max_samples", 8)
    assert any("episode of 8 prompts" in sentence for sentence in said)


@pytest.mark.parametrize("name", ["train_ppo_ray", "train_dpo", "train_rm", "serve_rm"])
def test_the_parser_is_that_of_the_script(name, monkeypatch):
    """Built without the script's imports, it has the same flags, types and defaults."""
    import argparse
    import runpy

    class Built(Exception):
        pass

    def stop(parser, *args):
        raise Built(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Built) as built:
        runpy.run_module(f"openrlhf.cli.{name}", run_name="__main__")
    monkeypatch.undo()

    def shape(parser):
        return [
            (action.option_strings, action.dest, action.type, action.choices, action.nargs, action.default)
            for action in parser._actions
            if "run_name" not in action.dest  # by the minute
        ]

    assert shape(script.host_parser(f"openrlhf.cli.{name}")) == shape(built.value.args[0])
    assert not script.is_patched(f"openrlhf.cli.{name}")


def test_a_look_at_many_rows_takes_little_beside_reading_them(seen, here, monkeypatch):
    """1e5 prompts: less than a second of a quiet core, three here, since tests run beside others."""
    rows = [{"input": f"{i} says hello to everybody ", "answer": "x", "g": f"g{i % 50}"} for i in range(100_000)]
    write(here / "prompts.jsonl", rows)
    reading = []

    def timed(*args):
        began = time.process_time()
        dataset = read(*args)
        reading.append(time.process_time() - began)
        return dataset

    read = reader._read
    monkeypatch.setattr(reader, "_read", timed)
    began = time.process_time()
    said = seen("PPO", "--advantage_estimator", "pgrpo", "--data.pref_group_key", "g")
    spent = time.process_time() - began - sum(reading)
    assert any("25000 updates" in sentence for sentence in said)
    assert spent < 3, f"{spent:.1f} s beside {sum(reading):.1f} s of reading"


# ---- what only tokens show ------------------------------------------------------------------------------------------


def alike_after(tokens, g):
    """A pair whose answers differ after so many tokens, with a tokenizer of bytes."""
    same = "x" * (tokens - 2)
    return {"prompt": "p ", "chosen": f"{same}yes", "rejected": f"{same}no", "g": g}


@pytest.fixture
def counted(seen, tiny):
    """What `doctor --like` says of a command: all that a look does, and what the tokens show."""
    folders = {"PPO": "--actor.model_name_or_path", "DPO": "--model.model_name_or_path"}
    return lambda name, *words: seen(name, folders[name], tiny / "model", *words, tokens=True)


def test_a5_pairs_that_are_cut_to_equal_texts_are_counted_by_preference_group(counted, seen, here):
    """The doctor said that all is well; only the run, its model loaded, counted them."""
    words = ("--data.pref_group_key", "g", "--data.max_len", 24)
    write(here / "pairs.jsonl", [alike_after(6, "a")] * 12 + [alike_after(6, "b")] * 10 + [alike_after(30, "b")] * 2)
    assert any(
        said == "2 of 24 pairs teach nothing, because their answers are equal in their first 24 tokens "
        "(--data.max_len): 2 of 12 of 'b'"
        for said in counted("DPO", *words)
    )
    assert not any("teach nothing" in said for said in seen("DPO", *words))  # a run says it itself, later


@pytest.mark.parametrize(
    "name, flag", [("PPO", "data.prompt_dataset"), ("PPO", "eval.dataset"), ("RM", "data.dataset")]
)
def test_every_part_of_the_data_has_a_row_in_the_run(name, flag, seen, here):
    """The host puts parts behind one another, and keeps the first rows: whole preference groups were never seen."""
    source = here / ("prompts.jsonl" if name == "PPO" else "pairs.jsonl")
    (here / "more.jsonl").write_bytes(source.read_bytes())
    words = (f"--{flag}", f"{source.name},more.jsonl", "--eval.split", "train", "--data.max_samples")
    with pytest.raises(
        ValueError, match=f"--{flag} needs a row of every part, got none of 'more.jsonl', because .* 24"
    ):
        seen(name, *words, 24)
    seen(name, *words, 25)
    mixed = {"data.prompt_dataset": "--data.prompt_probs", "data.dataset": "--data.dataset_probs"}
    if flag in mixed:
        seen(name, *words, 24, mixed[flag], "0.5,0.5")


def test_a_trainer_on_pairs_evaluates_on_all_rows(seen, here):
    write(
        here / "eval_pairs.jsonl", [{"prompt": "p ", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(24)]
    )
    with open(here / "eval_pairs.jsonl", "a") as file:
        file.write('{"prompt": "p ", "chosen": "yes", "rejected": null}\n')
    with pytest.raises(ValueError, match="row 24 of 'eval_pairs.jsonl'"):
        seen("DPO", "--data.max_samples", 12, "--eval.dataset", "eval_pairs.jsonl", "--eval.split", "train")


@pytest.mark.parametrize("flag", ["--data.dataset", "--eval.dataset"])
def test_a5_a_preference_group_without_a_pair_that_can_teach_is_refused(flag, counted, here):
    write(here / "cut.jsonl", [alike_after(6, "a")] * 12 + [alike_after(30, "b")] * 12)
    with pytest.raises(ValueError, match="every preference group needs pairs whose answers differ .* got none of 'b'"):
        counted("DPO", "--data.pref_group_key", "g", "--data.max_len", 24, "--eval.split", "train", flag, "cut.jsonl")


def test_a4_prompts_that_rollouts_cut_are_counted(counted, here):
    """The host cuts them when they are sampled, with a warning for each among the lines of the engines."""
    write(here / "prompts.jsonl", [{"input": "x" * (40 + i), "answer": "x"} for i in range(24)])
    cut = [said for said in counted("PPO", "--rollout.max_new_tokens", 8) if "are cut" in said]
    assert cut == [
        "7 of 24 prompts are cut from the left to 56 tokens, to leave room for an answer in --data.max_len 64"
    ]
    assert not any("are cut" in said for said in counted("PPO"))


def test_tokens_of_a_model_elsewhere_are_not_counted_and_that_is_said(seen):
    said = seen("DPO", "--model.model_name_or_path", "owner/model", tokens=True)
    assert "tokens of 'pairs.jsonl' are not counted here: the folder of owner/model is needed for that" in said


def test_b1_a_model_is_replaced_only_by_the_run_that_wrote_it(seen, here):
    """The output folder is the policy itself, or holds a model of somebody else; or it is that of an earlier run."""
    with pytest.raises(ValueError, match="--ckpt.output_dir needs a folder of its own, got model, the model that is"):
        seen("DPO", "--ckpt.output_dir", "model")
    (here / "theirs").mkdir()
    (here / "theirs" / "config.json").write_text("{}")
    for door in ("PPO", "DPO", "RM"):
        with pytest.raises(ValueError, match="--ckpt.output_dir needs a folder without a model, got theirs"):
            seen(door, "--ckpt.output_dir", "theirs")
    (here / "theirs" / "metrics.jsonl").write_text(METRICS)
    for door in ("PPO", "DPO", "RM"):
        said = seen(door, "--ckpt.output_dir", "theirs")
        assert "the model in theirs, which an earlier run left there, will be replaced at the end of this run" in said
        assert seen(door, "--ckpt.output_dir", "new") == [line for line in said if "theirs" not in line]


def checkpoint(folder):
    """A whole one, as DeepSpeed writes it."""
    (folder / "global_step1").mkdir(parents=True)
    torch.save({}, folder / "global_step1" / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("global_step1")


@pytest.mark.parametrize("door", ["PPO", "DPO", "RM"])
def test_b1_a_resume_of_nothing_does_not_replace_a_model(door, seen, here):
    """Without a checkpoint the run starts anew, so the model in its output folder may be anybody's."""
    (here / "theirs").mkdir()
    (here / "theirs" / "config.json").write_text("{}")
    words = ("--ckpt.load_enable", "--ckpt.path", "ckpt", "--ckpt.output_dir", "theirs")
    with pytest.raises(ValueError, match="--ckpt.output_dir needs a folder without a model, got theirs"):
        seen(door, *words)
    checkpoint(here / "ckpt" / ("_actor" if door == "PPO" else ""))
    assert not any("will be replaced" in said for said in seen(door, *words))


@pytest.mark.parametrize(
    "file, text",
    [("theirs/metrics.jsonl", ""), ("theirs/metrics.jsonl", '{"loss": 1}\n'), ("theirs/metrics.jsonl", "[1]\n")]
    + [("theirs/metrics.jsonl", "step 1\n"), ("theirs/metrics.jsonl", '{"step": true}\n'), ("here.jsonl", METRICS)],
)
@pytest.mark.parametrize("door", ["PPO", "DPO"])
def test_b1_only_metrics_of_ours_beside_a_model_make_it_ours(door, file, text, seen, here):
    (here / "theirs").mkdir()
    (here / "theirs" / "config.json").write_text("{}")
    (here / file).write_text(text)
    words = ("--data.pref_group_key", "g", "--logger.metrics_path", file, "--ckpt.output_dir", "theirs")
    with pytest.raises(ValueError, match="--ckpt.output_dir needs a folder without a model, got theirs"):
        seen(door, *words)


def test_b1_a_critic_is_written_beside_the_policy_and_replaces_nothing_of_others(seen, here):
    """The host adds _critic to the name of the folder."""
    (here / "out_critic").mkdir()
    (here / "out_critic" / "config.json").write_text("{}")
    words = ("--ckpt.output_dir", "out", "--ckpt.path", "ckpt", "--advantage_estimator", "gae")
    words += ("--critic.num_gpus_per_node", 1, "--actor.num_gpus_per_node", 1)
    assert seen("PPO", *words)
    words += ("--critic.save_value_network",)
    refused = r"--ckpt.output_dir \(with _critic, .*\) needs a folder without a model, got out_critic"
    with pytest.raises(ValueError, match=refused):
        seen("PPO", *words)
    with pytest.raises(ValueError, match="needs a folder of its own, got out_critic, the model that is read"):
        seen("PPO", *words, "--critic.model_name_or_path", "out_critic")
    (here / "out").mkdir()
    (here / "out" / "metrics.jsonl").write_text(METRICS)  # that run saved no critic
    with pytest.raises(ValueError, match=refused):
        seen("PPO", *words)
    (here / "out" / "metrics.jsonl").write_text(METRICS.replace("{}", '{"critic.save_value_network": true}'))
    assert any("the model in out_critic, which an earlier run left" in said for said in seen("PPO", *words))
    (here / "out" / "metrics.jsonl").unlink()
    checkpoint(here / "ckpt" / "_critic")
    assert seen("PPO", *words, "--ckpt.load_enable")


@pytest.mark.parametrize("template", ["User: ", "User: {{}}", "User: {0}", "{", "{} {}"])
@pytest.mark.parametrize("door", ["PPO", "DPO", "RM"])
def test_a6_a_template_without_a_place_for_the_prompt_is_refused(door, template, seen):
    """The host would print a line and leave the template out."""
    with pytest.raises(ValueError, match="--data.input_template needs one {}, where the prompt goes"):
        seen(door, "--data.input_template", template)
    assert seen(door, "--data.input_template", "User: {} {{sic}}")


@pytest.mark.parametrize("door", ["DPO", "RM"])
def test_d18_a_template_that_no_prompt_of_pairs_gets_is_said(door, seen, here):
    """The host writes it around a column of prompts alone."""
    words = ("--data.input_template", "Q: {}")
    assert not any("input_template" in said for said in seen(door, *words))
    said = seen(door, *words, "--data.prompt_key", "")
    assert "warning: --data.input_template does nothing without --data.prompt_key" in said
    answer = [{"role": "assistant", "content": "yes"}]
    turns = [{"prompt": [{"role": "user", "content": f"{i}?"}], "chosen": answer} for i in range(24)]
    no = [{"role": "assistant", "content": "no"}]
    write(here / "pairs.jsonl", [{**row, "rejected": no} for row in turns])
    said = seen(door, *words, "--data.apply_chat_template")
    assert "warning: --data.input_template does nothing beside --data.apply_chat_template" in said


LEARNED = {"model_type": "gpt2", "n_positions": 32}


@pytest.mark.parametrize(
    "config",
    [LEARNED, {"model_type": "opt", "max_position_embeddings": 32}, {"model_type": "vision", "text_config": LEARNED}],
)
@pytest.mark.parametrize(
    "door, flag", [("PPO", "actor"), ("PPO", "critic"), ("DPO", "model"), ("DPO", "ref"), ("RM", "model")]
)
def test_d10_texts_beyond_the_positions_of_a_model_are_refused(door, flag, config, seen, here):
    """Else the first long answer is an IndexError, in the middle of an epoch."""
    (here / "short").mkdir()
    (here / "short" / "config.json").write_text(json.dumps(config))
    words = (f"--{flag}.model_name_or_path", "short")
    refused = f"--data.max_len needs at most 32 tokens, the positions of --{flag}.model_name_or_path short, got 64"
    with pytest.raises(ValueError, match=refused):
        seen(door, *words)
    assert seen(door, *words, "--data.max_len", 32)


@pytest.mark.parametrize("door, flag", [("PPO", "actor"), ("DPO", "model"), ("RM", "model")])
def test_d10_positions_that_are_computed_have_no_end(door, flag, seen, here):
    """A model with rotary positions runs on, and becomes worse."""
    (here / "short").mkdir()
    config = here / "short" / "config.json"
    config.write_text('{"model_type": "llama", "max_position_embeddings": 32}')
    said = seen(door, f"--{flag}.model_name_or_path", "short")
    assert any(f"64 is more than the 32 tokens that --{flag}.model_name_or_path short was made for" in s for s in said)
    for text in ('{"model_type": "bloom"}', '{"max_position_embeddings": -1}', "[]", "{", '{"text_config": 3}'):
        config.write_text(text)
        assert not any("made for" in said for said in seen(door, f"--{flag}.model_name_or_path", "short"))
    rope = {"rope_type": "yarn", "factor": 4}
    config.write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 32, "rope_parameters": rope}))
    assert not any("made for" in said for said in seen(door, f"--{flag}.model_name_or_path", "short"))


def test_d18_a_history_that_no_preference_group_can_fill_is_said(seen, here):
    """12 rows of each of two groups x 2 samples are 24 rewards an episode."""
    words = ("--advantage_estimator", "pgrpo", "--data.pref_group_key", "g")
    assert not any("min_count" in said for said in seen("PPO", *words, "--pgrpo.min_count", 24))
    said = seen("PPO", *words, "--pgrpo.min_count", 25)
    assert any("warning: --pgrpo.min_count 25 is never reached, because the largest" in line for line in said)
    assert not any(
        "min_count" in line for line in seen("PPO", *words, "--pgrpo.min_count", 25, "--train.num_episodes", 2)
    )


def test_d18_one_preference_group_is_one_history(seen, here):
    words = ("--advantage_estimator", "pgrpo", "--data.pref_group_key", "g")
    one = "all prompts are of one preference group, 'a': pgrpo has one history for all rewards"
    assert one not in seen("PPO", *words)
    write(here / "prompts.jsonl", [{"input": f"{i} says ", "answer": "x", "g": "a"} for i in range(24)])
    assert one in seen("PPO", *words)
    assert not any("one history" in said for said in seen("PPO"))


@pytest.mark.parametrize(
    "door, flag", [("PPO", "data.prompt_dataset"), ("DPO", "data.dataset"), ("RM", "eval.dataset")]
)
def test_b1_metrics_are_not_written_over_data(door, flag, seen, here):
    rows = [json.loads(line) for line in (here / "prompts.jsonl").read_text().splitlines()]
    pairs = [json.loads(line) for line in (here / "pairs.jsonl").read_text().splitlines()]
    (here / "data").mkdir()
    write(here / "data" / "rows.jsonl", [{**row, **pair, "step": 9} for row, pair in zip(rows, pairs)])
    for data in ("data/rows.jsonl", "data"):
        words = [
            f"--{flag}",
            data,
            "--logger.metrics_path",
            here / "data" / "rows.jsonl",
            "--data.pref_group_key",
            "g",
        ]
        if door == "RM":
            words[-2:] = ["--reward.factors", 2, "--data.user_key", "g"]
        with pytest.raises(ValueError, match=f"--logger.metrics_path needs a file of its own, got .*data of --{flag}"):
            seen(door, *words)


def test_a7_a_prompt_of_signs_that_nobody_sees_is_blank(seen, here):
    write(here / "prompts.jsonl", [{"input": "\u200b", "answer": "x", "g": "a"}] * 24)
    with pytest.raises(ValueError, match=r"needs a text in 'input' .*, got a blank text, '\\u200b' in row 0"):
        seen("PPO")
