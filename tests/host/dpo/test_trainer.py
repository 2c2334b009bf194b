"""Group-robust weights in the host's preference trainer: its real classes, on a model of a table of numbers."""

import copy
import importlib
import json
import os
import pickle
import runpy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openrlhf_pgrpo.core.group_weights import GroupWeights, RobustOptions
from openrlhf_pgrpo.host import doors
from openrlhf_pgrpo.host.dpo import flags as dpo_flags

pytestmark = pytest.mark.host

MODULE = "openrlhf.cli.train_dpo"
GROUP = ("--data.pref_group_key", "who")


@pytest.fixture
def parse(host_parser, tmp_path, monkeypatch):
    """Nested arguments of the preference trainer from a command line, as its script gets them."""
    from openrlhf.utils.config import hierarchize

    monkeypatch.setenv("RANK", "0")  # otherwise start would set the variables of a single process

    def parse(*argv):
        words = [str(word) for word in (*argv, "--ckpt.output_dir", tmp_path, "--ckpt.path", tmp_path / "ckpt")]
        flat = doors.DPO.parse_args(host_parser(MODULE), words)
        args = hierarchize(flat)
        doors.DPO.start(args)
        args.eval.steps, args.ckpt.save_steps = 1, float("inf")
        return args

    return parse


# ---- flags ----------------------------------------------------------------------------------------------------------


def test_flags_and_defaults(parse, host_parser):
    args = parse(*GROUP, "--ds.lora.rank", 8)  # LoRA needs no GPU here
    expected = dict(weights="exact", save_best=False, patience=0, plateau="stop")
    assert expected.items() <= vars(args.robust).items()
    assert args.data.pref_group_key == "who" and args.logger.metrics_path is None
    assert args.robust.eta == RobustOptions().eta and args.ds.attn_implementation == "sdpa"
    parser = host_parser(MODULE)
    doors.DPO.extend(parser)
    assert "--robust.chi" in parser.format_help()


REFUSED = {
    "--robust.chi needs a number from 0 to 1, got 1.5": (*GROUP, "--robust.chi", 1.5),
    "--robust.eta needs a finite number >= 0, got nan": (*GROUP, "--robust.eta", "nan"),
    "--robust.mu needs numbers": (*GROUP, "--robust.mu", '{"a": 0.5, "b": 0.6}'),
    "--robust.patience needs a number of evaluations >= 0, got -1": (*GROUP, "--robust.patience", -1),
    "--robust.patience needs --eval.dataset, got none": (*GROUP, "--robust.patience", 4),
    "--robust.save_best needs --eval.dataset, got none": (*GROUP, "--robust.save_best"),
    "--robust.chi needs --data.pref_group_key, got none": ("--robust.chi", 0),
    # What would do nothing.
    "--robust.save_best needs something to keep, got --ckpt.disable_ds without --ckpt.save_hf": (
        *(*GROUP, "--robust.save_best", "--ckpt.disable_ds", "--eval.dataset", "pairs.jsonl"),
    ),
    "--robust.mu needs --robust.chi below 1, got 1.0, with which it does": (*GROUP, "--robust.mu", "share"),
    "--robust.eta needs --robust.chi above 0, got 0.0": (*GROUP, "--robust.chi", 0, "--robust.eta", 1),
    "--robust.weights needs --robust.chi above 0": (*GROUP, "--robust.chi", 0, "--robust.weights", "previous"),
    "--robust.plateau needs --robust.patience above 0, got 0": (*GROUP, "--robust.plateau", "reduce_lr"),
    "--model.label_smoothing needs the loss of DPO, got --model.ipo_enable": (
        *("--model.ipo_enable", "--model.label_smoothing", 0.3),
    ),
}
TAKEN = [
    (*GROUP, "--robust.save_best", "--ckpt.disable_ds", "--ckpt.save_hf", "--eval.dataset", "pairs.jsonl"),
    (*GROUP, "--robust.chi", 0, "--robust.mu", "share"),
    (*GROUP, "--robust.chi", 0.5, "--robust.mu", "share", "--robust.eta", 1, "--robust.weights", "previous"),
    (*GROUP, "--robust.mu", '{"a": 0.5, "b": 0.5}'),  # these are the preference groups
    ("--model.label_smoothing", 0.3),
]


@pytest.mark.parametrize("message", REFUSED)
def test_bad_values_are_a_usage_message(parse, capsys, message):
    with pytest.raises(SystemExit):
        parse(*REFUSED[message])
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("words", TAKEN)
def test_what_has_an_effect_is_taken(parse, words):
    parse(*words)


def test_the_reference_is_a_setting_if_it_is_another_model(parse, tmp_path, monkeypatch):
    """Without the flag it is the policy, which may lie elsewhere in each job."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    for given, kept in ((None, None), ("policy", None), ("./m", str(tmp_path / "m")), ("owner/name", "owner/name")):
        args = parse(
            "--model.model_name_or_path", "policy", *(() if given is None else ("--ref.model_name_or_path", given))
        )
        assert dpo_flags.settings(args)["ref.model_name_or_path"] == kept


def test_without_a_launcher_this_is_the_only_process(parse, monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "7")
    parse()
    assert {os.environ[name] for name in names} == {"7"}
    monkeypatch.delenv("RANK")
    parse()
    assert [os.environ[name] for name in names[:3]] == ["0", "0", "1"]


# ---- data -----------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of characters, as far as the host's dataset asks for one."""

    eos_token, eos_token_id, pad_token_id, unk_token_id = "$", 1, 0, None
    convert_tokens_to_ids = staticmethod(ord)

    def __call__(self, text, max_length, **kwargs):
        ids = torch.tensor([[ord(letter) for letter in text[:max_length]]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def apply_chat_template(self, conversation, tokenize, add_generation_prompt=False):
        """Thoughts are dropped, as templates of reasoning models do, after a prompt that ends with their start."""
        start = "<A><think>" if conversation[0]["content"] == "Think!" else "<A>"
        turns = [f"<{turn['role'][0].upper()}>{turn['content'].split('</think>')[-1]}" for turn in conversation]
        return "".join(turns) + start * add_generation_prompt


def dataset_of(args, rows, max_length=30, printed=None):
    from datasets import Dataset
    from openrlhf.datasets.reward_dataset import RewardDataset

    if "prompt" in rows[0]:
        args.data.prompt_key = "prompt"
    strategy = SimpleNamespace(args=args, print=[].append if printed is None else printed.append)
    return RewardDataset(Dataset.from_list(rows), Words(), max_length, strategy, is_dpo=True, num_processors=2)


def rows_of(*names, prompt="p"):
    return [{"prompt": prompt * (1 + i), "chosen": "y", "rejected": "n", "who": who} for i, who in enumerate(names)]


def test_a_pair_carries_its_preference_group_on_the_length_of_its_prompt(parse):
    rows = rows_of("a", "b", "a", "c")
    plain, ours = dataset_of(parse(), rows), dataset_of(parse(*GROUP), rows)
    assert not hasattr(plain, "pref_groups") and ours.pref_groups == {"a": 2, "b": 1, "c": 1}
    batch = ours.collate_fn([ours[i] for i in range(4)])
    assert batch[-1] == plain.collate_fn([plain[i] for i in range(4)])[-1] == [1, 2, 3, 4]
    for lengths in (batch[-1], copy.deepcopy(batch[-1]), pickle.loads(pickle.dumps(batch[-1]))):
        assert [length.pref_group for length in lengths] == ["a", "b", "a", "c"]


@pytest.mark.parametrize(
    "key, rows, message",
    [
        ("whose", rows_of("a", "b"), "needs a column of the pairs, got 'whose'; columns are .*'who'"),
        ("who", rows_of("a", None), "every row needs a name in 'who' .*, got null in row 1"),
        ("who", rows_of("a") + rows_of("b", prompt="p" * 40), "a pair that fits --data.max_len 30, got none of 'b'"),
    ],
)
def test_a_pair_without_a_preference_group_is_refused(parse, key, rows, message):
    with pytest.raises(ValueError, match=message):
        dataset_of(parse("--data.pref_group_key", key), rows)


# ---- pairs that teach nothing, or the wrong thing -------------------------------------------------------------------


def check(args, rows, training=True, prompt_key="prompt"):
    from datasets import Dataset

    from openrlhf_pgrpo.host.dpo import data

    args.data.prompt_key = prompt_key
    return data.check(Dataset.from_list(rows), args, "'x.jsonl'", training)


def pair_of(who, chosen="yes", rejected="no", prompt="p", **more):
    return dict(prompt=prompt, chosen=chosen, rejected=rejected, who=who, **more)


LATE = "a" * 28  # answers that differ only after what --data.max_len 24 keeps


@pytest.mark.parametrize("answers", [(LATE + "x", LATE + "y"), ("tie", "tie"), ("tie", "tie\n")])
def test_a5_a_preference_group_whose_answers_are_equal_is_refused(parse, answers):
    """Its loss would stay ln 2 for ever, and draw all the weight."""
    rows = [pair_of("a")] * 3 + [pair_of("b", *answers)] * 8
    where = "their first 24 tokens .--data.max_len." if answers[0] != "tie" else "the pairs"
    with pytest.raises(
        ValueError, match=f"answers differ in {where}, got none of 'b'; pair 3 is the first of 8: drop"
    ):
        dataset_of(parse(*GROUP), rows, 24)


def test_a5_equal_answers_are_counted_per_preference_group(parse):
    rows, printed = [pair_of("a"), pair_of("b"), pair_of("b", LATE + "x", LATE + "y"), pair_of("c")], []
    dataset_of(parse(*GROUP), rows, 24, printed)
    assert printed == [
        "[pgrpo] 1 of 4 pairs teach nothing, because their answers are equal in their first 24 tokens (--data.max_len)"
        ": 1 of 2 of 'b'"
    ]
    (said,) = check(parse(*GROUP), [pair_of("a"), pair_of("b"), pair_of("b", "tie", "tie")])
    assert said == ("1 of 3 pairs teach nothing, because their answers are equal in 'x.jsonl': 1 of 2 of 'b'")


def test_a5_without_preference_groups_all_pairs_are_one(parse):
    printed = []
    dataset_of(parse(), [pair_of("a"), pair_of("b", LATE + "x", LATE + "y")], 24, printed)
    assert printed == [
        "[pgrpo] 1 of 2 pairs teach nothing, because their answers are equal in their first 24 tokens (--data.max_len)"
    ]
    with pytest.raises(
        ValueError, match="^training needs pairs whose answers differ in .*, got none; pair 0 is the fir"
    ):
        dataset_of(parse(), [pair_of("a", LATE + "x", LATE + "y")], 24)


def test_a5_only_what_the_host_cuts_to_equal_tokens_counts(parse):
    """The last token that is kept becomes the end: a difference there is lost, one before it is not."""
    for common, equal in ((21, False), (22, True), (23, True), (40, True)):
        rows, printed = [pair_of("a"), pair_of("b"), pair_of("b", "a" * common + "x", "a" * common + "y")], []
        dataset = dataset_of(parse(*GROUP), rows, 24, printed)
        chosen, _, rejected, *_ = dataset[2]
        assert torch.equal(chosen, rejected) == equal == bool(printed)


def test_a13_an_answer_that_is_nothing_but_its_end_is_refused(parse):
    with pytest.raises(ValueError, match="words before its end token, got one that is .* in row 1 of the pairs: fill"):
        dataset_of(parse(), [pair_of("a"), pair_of("b", "$", "no")], 24)


def test_b5_texts_that_may_stand_for_a_missing_value_are_said(parse):
    rows = [pair_of("nan", prompt="None"), pair_of("b", rejected="null")]
    said = check(parse(*GROUP), rows)
    assert [sentence.split(" is a text")[0] for sentence in said] == [
        "warning: 'None' (--data.prompt_key) in row 0 of 'x.jsonl'",
        "warning: 'null' (--data.rejected_key) in row 1 of 'x.jsonl'",
        "warning: 'nan' (--data.pref_group_key) in row 0 of 'x.jsonl'",
    ]


PRINTED = "[{'role': 'user', 'content': 'hi'}]"


@pytest.mark.parametrize("text", [PRINTED, PRINTED.replace("'", '"')])
def test_a6_messages_that_were_printed_are_refused(parse, text):
    """As pandas writes lists into CSV: the policy would be trained on the text of a Python list."""
    for key in ("prompt", "chosen"):
        with pytest.raises(
            ValueError, match=f"a text in '{key}' .*, got messages that were printed, .*: save them as a"
        ):
            check(parse(), [{**pair_of("a"), key: text}])


@pytest.mark.parametrize("blank", ["\x00", "\u3164", "\u2800", "\ufe0f", "\u034f", "\u200b"])
def test_b5_what_nobody_sees_is_no_text(parse, blank):
    for key in ("prompt", "chosen", "rejected"):
        with pytest.raises(ValueError, match=f"a text in '{key}' .*, got a blank text, .* in row 0"):
            check(parse(), [{**pair_of("a"), key: blank}])
    with pytest.raises(ValueError, match="a name in 'who' .*, got a blank text"):
        check(parse(*GROUP), [pair_of(blank), pair_of("b")])


@pytest.mark.parametrize("nothing", ["", "\u200b", [{"type": "text", "text": ""}]])
def test_b5_a_user_who_says_nothing_is_refused(parse, nothing):
    parts = isinstance(nothing, list)  # a column holds one kind of content
    said = [[{"type": "text", "text": text}] if parts else text for text in ("yes", "no")]
    turns = [[{"role": "user", "content": nothing}, *answer(text)] for text in said]
    row = {"chosen": turns[0], "rejected": turns[1]}
    with pytest.raises(ValueError, match="as the content of message 0 in row 0 of 'x.jsonl'"):
        check(parse("--data.apply_chat_template"), [row], prompt_key=None)


def test_b5_answers_that_repeat_their_prompt_are_refused(parse):
    """The host wrote the prompt twice, and trained on that."""
    twice = [pair_of("a", f"{n}? so", f"{n}? no", prompt=f"{n}? ") for n in range(10)]
    with pytest.raises(
        ValueError, match="begin after their prompt, got ones that repeat it in row 0 of 'x.jsonl' .and"
    ):
        check(parse(), twice)
    hello = pair_of("a", "Hello!", "Hello?", prompt="Hello")
    for rows, row in (([pair_of("a"), *twice], 1), ([hello, hello], 0)):
        (said,) = check(parse(), rows)
        assert said.startswith(f"warning: both answers begin with the text of their prompt in row {row} of 'x.jsonl'")
    start, chosen, rejected = ([{"role": "user", "content": "why?"}], *map(answer, ("so", "no")))
    row = {"prompt": start, "chosen": start + chosen, "rejected": start + rejected}
    chat = parse("--data.apply_chat_template")
    with pytest.raises(ValueError, match="that repeat it in row 1 of 'x.jsonl': leave out --data.prompt_key, or cut"):
        check(chat, [{**row, "chosen": chosen, "rejected": rejected}, row])
    # An answer of several messages is one, as long as it does not begin with the prompt.
    steps = [*answer("let me look"), {"role": "user", "content": "well?"}]
    assert check(chat, [{**row, "chosen": steps + chosen, "rejected": steps + rejected}]) == []


def answer(text):
    return [{"role": "assistant", "content": text}]


def test_a4_pairs_without_room_for_an_answer_are_counted(parse):
    rows, printed = [pair_of("a"), pair_of("b"), pair_of("b", prompt="p" * 40)], []
    assert dataset_of(parse(*GROUP), rows, 24, printed).pref_groups == {"a": 1, "b": 1}
    assert printed == [
        "[pgrpo] 1 of 3 pairs are left out, because their prompts leave no room for an answer in --data.max_len 24"
        ": 1 of 2 of 'b'"
    ]
    with pytest.raises(ValueError, match="^training needs a pair that fits --data.max_len 24, got none: raise it"):
        dataset_of(parse(), rows[2:], 24)


def test_a1_preferences_that_no_loss_reads_are_refused(parse):
    for flags in ((), GROUP):
        assert check(parse(*flags), [pair_of("a", preference=1.0), pair_of("b", preference=1.0)]) == []
        with pytest.raises(
            ValueError, match="answers as chosen ones, got 0.0 in 'preference' in row 1 of 'x.jsonl': swap"
        ):
            check(parse(*flags), [pair_of("a", preference=1.0), pair_of("b", preference=0.0)])


@pytest.mark.parametrize("key", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize(
    "value, said", [(None, "null"), ("", "an empty text"), (3, "int 3"), (["a"], "a list, .'a'.")]
)
def test_b5_a_missing_text_is_refused(parse, key, value, said):
    with pytest.raises(ValueError, match=f"a text in '{key}' .--data.{key}_key., got {said} in row 0 of 'x.jsonl'"):
        check(parse(), [{**pair_of("a"), key: value}])


def test_one_preference_group_is_refused_before_the_model_is_built(parse):
    with pytest.raises(ValueError, match="at least two preference groups in 'who' .*, got 'a' alone in 'x.jsonl'"):
        check(parse(*GROUP), [pair_of("a")])
    assert check(parse(*GROUP), [pair_of("a")], training=False) == []


def user(text):
    return {"role": "user", "content": text}


def reply(text):
    return {"role": "assistant", "content": text}


CHAT = "--data.apply_chat_template"


def test_d19_conversations_whose_prompts_differ_are_refused(parse):
    """The host cut the rejected answer out by the length of the chosen one's prompt: it became ""."""
    pairs = [
        dict(chosen=[user("why?"), reply("so")], rejected=[user("why?"), reply("no")]),
        dict(chosen=[user("once upon a time"), reply("so")], rejected=[user("?"), reply("no")]),
    ]
    with pytest.raises(ValueError, match="different ones in 'chosen' and 'rejected' in row 1 of 'x.jsonl': corr"):
        check(parse(CHAT), pairs, prompt_key=None)
    assert check(parse(CHAT), pairs[:1], prompt_key=None) == []


NO_CONVERSATION = {
    "'so', .* in row 0": "so",
    "null in row 0": None,
    "a list, .. in row 0": [],
    "null as the content of message 1": [user("why?"), reply(None)],
    "an empty text as the content of the last message": [user("why?"), reply("")],
    "a last message of the role 'user' in row 0 .*: end it with": [user("why?")],
    "one message in row 0 .*: add the prompt": [reply("so")],
}


@pytest.mark.parametrize("said", NO_CONVERSATION)
def test_d19_what_is_no_conversation_is_refused(parse, said):
    value = NO_CONVERSATION[said]
    with pytest.raises(
        ValueError, match=f"every row needs .* in 'chosen' .--data.chosen_key., got {said.split(', .*')[0]}"
    ):
        check(parse(CHAT), [dict(chosen=value, rejected=value)], prompt_key=None)


def test_d19_a_column_of_prompts_holds_conversations_too(parse):
    good = dict(prompt=[user("why?")], chosen=[reply("so")], rejected=[reply("no")])
    assert check(parse(CHAT), [good]) == []
    for prompt, said in (("why?", "'why.'"), ([user("a"), reply("b")], "a last message of the assistant")):
        with pytest.raises(
            ValueError, match=f"an answer can follow in 'prompt' .--data.prompt_key., got {said} in row 0"
        ):
            check(parse(CHAT), [{**good, "prompt": prompt}])


@pytest.mark.parametrize("form", ["prompt", "conversation"])
def test_d19_a_template_that_does_not_begin_with_the_prompt_is_refused(parse, form):
    """The host takes for the answer what follows after as many characters as the prompt has."""

    def rows(text):
        start = [user(text)]
        if form == "prompt":
            return [dict(prompt=start, chosen=[reply("so it is said")], rejected=[reply("not at all")])]
        return [dict(chosen=[*start, reply("so it is said")], rejected=[*start, reply("not at all")])]

    dataset = dataset_of(parse(CHAT), rows("why?"), 60)
    assert (dataset.prompts[0], dataset.chosens[0], dataset.rejects[0]) == (
        "<U>why?<A>",
        "so it is said",
        "not at all",
    )
    with pytest.raises(
        ValueError, match="begins a conversation with its prompt, got 'so it is said' .* with '<think>'"
    ):
        dataset_of(parse(CHAT), rows("Think!"), 60)


# ---- training -------------------------------------------------------------------------------------------------------


class Table(torch.nn.Module):
    """A policy that knows each pair by its number: log-probabilities of the chosen and the rejected answer."""

    model = None  # the engine that is saved
    dropout = 0.0

    def __init__(self, pairs: int, seed: int):
        super().__init__()
        self.logps = torch.nn.Parameter(torch.randn(pairs, 2, generator=torch.Generator().manual_seed(seed)))


NAMES = ["a", "b", "a", "a", "b", "a", "a", "a"]


@pytest.fixture
def make(parse, make_strategy, monkeypatch):
    """A trainer of the host's script on `names`, one pair each, as many a step, evaluated on `evaluation`."""
    runpy.run_module(MODULE, run_name="imported")
    import openrlhf.trainer.dpo_trainer as host

    def rows(self, model, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens):
        logps = torch.nn.functional.dropout(model.logps[chosen_ids[:, 0]], model.dropout, model.training)
        return logps[:, 0], logps[:, 1], 0, 0

    monkeypatch.setattr(importlib.import_module("openrlhf_pgrpo.host.dpo.trainer").DPOTrainer,
                        "concatenated_forward", rows)  # fmt: skip

    def make(*flags, key=GROUP, names=NAMES, evaluation=None, micro_batches=1, states=None, replicas=1, seed=1):
        args = parse(*key, *flags, *(("--eval.dataset", "pairs.jsonl") if evaluation else ()))
        args.train.batch_size = len(names)
        strategy = make_strategy(args, micro_batches)
        if states is not None:
            strategy.client_states = states
        policy = Table(len(names), seed)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        train = loader(names, len(names) // micro_batches)
        trainer = host.DPOTrainer(
            model=policy,
            ref_model=Table(len(names), 2),
            tokenizer=None,
            strategy=strategy,
            optim=optimizer,
            train_dataloader=train,
            eval_dataloader=evaluation and loader(evaluation, 2, replicas),
            scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
            beta=args.model.beta,
            max_epochs=args.train.max_epochs,
        )
        return trainer

    return make


def loader(names, size, replicas=1, drop_last=False):
    from openrlhf_pgrpo.host.dpo.data import TaggedLength

    pairs = [TaggedLength(i, name) for i, name in enumerate(names)]
    seen = pairs + pairs[: -len(pairs) % replicas]  # as the host's sampler fills the last round

    class Sampled(list):
        drop_last = False
        sampler = SimpleNamespace(
            rank=0, num_replicas=replicas,
            dataset=type("Pairs", (list,), {"pref_groups": {name: names.count(name) for name in names}})(pairs),
        )  # fmt: skip

    own = seen[::replicas]
    batches = [own[i : i + size] for i in range(0, len(own) - (size - 1) * drop_last, size)]
    numbers = [torch.tensor([[[int(pair)]] for pair in batch]) for batch in batches]
    return Sampled((number, number, number, number, batch) for number, batch in zip(numbers, batches))


def steps(trainer):
    with open(trainer.args.ckpt.output_dir + "/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def pair_losses(trainer, policy):
    """Losses (B,) of `policy`, (B, 2) log-probabilities, by the formulas of the papers."""
    h = (policy - trainer.ref_model.logps).detach() @ torch.tensor([1.0, -1.0])
    beta = trainer.args.model.beta
    return (h - 1 / (2 * beta)) ** 2 if trainer.args.model.ipo_enable else -torch.nn.functional.logsigmoid(beta * h)


@pytest.mark.parametrize("loss", [(), ("--model.ipo_enable", "--robust.eta", "0.001")])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("form", ["exact", "previous"])
def test_a_step_follows_algorithm_1(make, loss, micro_batches, form):
    trainer = make("--robust.eta", "1", *loss, "--robust.weights", form, micro_batches=micro_batches)
    before = trainer.model.logps.detach().clone().requires_grad_()
    trainer.fit(trainer.args, 0, 1)

    losses, few = pair_losses(trainer, before), torch.tensor([name == "b" for name in NAMES])
    adversary = GroupWeights(trainer.weights.options, {"a": 6, "b": 2})
    if form == "exact":
        adversary.update(np.array([0, 1]), np.array([losses[~few].mean(), losses[few].mean()]), np.array([6.0, 2.0]))
    of_a, of_b = adversary.group_weights()
    # The gradient of 1/B sum_i w_i l_i at the old policy, with weights that are constants to it.
    h = (before - trainer.ref_model.logps.detach()) @ torch.tensor([1.0, -1.0])
    beta = trainer.args.model.beta
    of_pair = (h - 1 / (2 * beta)) ** 2 if loss else -torch.nn.functional.logsigmoid(beta * h)
    (torch.where(few, of_b, of_a) * of_pair).mean().backward()
    assert torch.allclose(trainer.model.logps, before - before.grad, rtol=0, atol=1e-5 * float(losses.max()))

    (row,) = steps(trainer)
    assert row["estimator"] == ("GR-IPO" if loss else "GR-DPO") and row["run"]["settings"]["robust.weights"] == form
    assert row["pref_groups"]["b"]["weight"] == pytest.approx(of_b)
    assert row["pref_groups"]["b"]["loss"] == pytest.approx(float(losses[few].mean()))
    assert (row["pref_groups"]["b"]["samples"], row["pref_groups"]["b"]["share"]) == (2, 0.25)


@pytest.mark.parametrize("gpu", [False, True])
def test_dropout_is_the_same_when_losses_are_seen_ahead(make, monkeypatch, gpu):
    """Also with --pgrpo.device cpu on a machine that has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    trainer = make(micro_batches=4)
    trainer.model.dropout = 0.5
    trainer.fit(trainer.args, 0, 1)
    (row,) = steps(trainer)
    groups = row["pref_groups"].values()  # as seen ahead; the host logs what it trained on
    weighted = sum(group["samples"] * group["weight"] * group["loss"] for group in groups) / len(NAMES)
    assert row["train"]["loss_mean"] == pytest.approx(weighted)


def test_fixed_weights_are_importance_sampling(make):
    trainer = make("--robust.chi", "0")
    trainer.fit(trainer.args, 0, 1)
    (row,) = steps(trainer)
    assert row["estimator"] == "IS-DPO"
    assert row["pref_groups"]["a"]["weight"] == pytest.approx(0.5 / 0.75)
    assert row["pref_groups"]["b"]["weight"] == pytest.approx(0.5 / 0.25)


def test_fixed_weights_need_no_look_ahead(make):
    """It costs a forward pass, and nothing is other than with it, to the bit."""
    found = {}
    for ahead in (False, True):
        trainer = make("--robust.chi", "0", micro_batches=4)
        assert not trainer.looks_ahead
        if ahead:
            trainer.looks_ahead, trainer.train_dataloader.before_step = True, trainer._move_weights_ahead
        trainer.model.dropout = 0.5
        torch.manual_seed(0)
        trainer.fit(trainer.args, 0, 1)
        (row,) = steps(trainer)
        found[ahead] = trainer.model.logps, {key: row[key] for key in ("train", "pref_groups")}
    assert torch.equal(found[False][0], found[True][0]) and found[False][1] == found[True][1]


def test_a_step_starts_and_ends_with_its_epoch(make):
    """Nine pairs are two steps of four: the ninth is left, whatever the micro batch."""
    from openrlhf_pgrpo.host.pairs import WholeSteps

    for size, micro_batches in ((4, 1), (2, 2), (1, 4)):
        looked = []
        steps = WholeSteps(loader(["a"] * 9, size, drop_last=True), micro_batches, looked.append, lambda: False)
        seen = [int(pair) for batch in steps for pair in batch[-1]]
        assert seen == [*range(8)] and len(steps) == 2 * micro_batches == sum(map(len, looked))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_loss_that_is_not_finite_stops_before_anything_moves(make, bad, micro_batches):
    trainer = make(micro_batches=micro_batches)
    with torch.no_grad():
        trainer.ref_model.logps[4, 0] = bad
    before, alpha = trainer.model.logps.detach().clone(), trainer.weights.alpha
    with pytest.raises(ValueError, match="finite loss.*, got (nan|inf) .*preference group 'b'; neither weights nor"):
        trainer.fit(trainer.args, 0, 1)
    assert torch.equal(trainer.model.logps, before) and np.array_equal(trainer.weights.alpha, alpha)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(names=["a"] * 4), "at least two preference groups, got .'a'."),
        (dict(evaluation=["a", "c"]), "--eval.dataset needs pairs of the preference groups trained on, .*, got 'c'"),
    ],
)
def test_preference_groups_that_do_not_fit_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_per_preference_group(make):
    trainer = make(evaluation=["a", "b", "a", "a", "b"], seed=6)
    trainer.fit(trainer.args, 0, 1)
    losses = pair_losses(trainer, trainer.model.logps)[:5]
    of_a, of_b = float(losses[[0, 2, 3]].mean()), float(losses[[1, 4]].mean())
    (row,) = steps(trainer)
    assert row["pref_groups"]["a"]["eval_loss"] == pytest.approx(of_a) and row["pref_groups"]["b"]["eval_pairs"] == 2
    right = losses < np.log(2)  # a positive h
    accuracies = float(right[[0, 2, 3]].float().mean()), float(right[[1, 4]].float().mean())
    assert accuracies[0] != accuracies[1]
    assert row["pref_groups"]["a"]["eval_accuracy"] == pytest.approx(accuracies[0])
    assert row["evaluation"] == {
        "worst_group": "a" if of_a > of_b else "b",
        "worst_group_loss": pytest.approx(max(of_a, of_b)),
        "loss_gap": pytest.approx(abs(of_a - of_b)),
        "worst_group_accuracy": pytest.approx(min(accuracies)),
        "accuracy_gap": pytest.approx(abs(accuracies[0] - accuracies[1])),
    }


def test_a_pair_that_fills_the_last_round_of_ranks_does_not_count(make):
    """Five pairs for four ranks: the first of them sees pairs 0 and 4, the others one and a repeated one."""
    trainer = make(evaluation=["a", "b", "a", "a", "b"], replicas=4)
    trainer.eval_dataloader.sampler.rank = 3  # its own pair 3, then a repeated one: here the batch of pairs 0 and 4
    trainer.fit(trainer.args, 0, 1)
    (row,) = steps(trainer)
    assert row["pref_groups"]["a"]["eval_pairs"] == 1 and "eval_pairs" not in row["pref_groups"]["b"]


def worst(trainer, values):
    """Runs one evaluation after the other, each with that loss of the worst preference group."""
    trainer.client_states = {"consumed_samples": 8}
    for step, value in enumerate(values, 1):
        trainer._act_on_evaluation(value, step)


def test_the_best_checkpoint_is_that_of_the_lowest_worst_loss(make):
    trainer = make("--robust.save_best", evaluation=["a", "b"])
    worst(trainer, [0.5, 0.6, 0.4, 0.45])
    assert [tag for tag, _, _ in trainer.strategy.saved] == ["best_global_step1", "best_global_step3"]
    _, states, metric = trainer.strategy.saved[-1]
    assert metric["metric_value"] == -0.4 and states["consumed_samples"] == 8
    assert states["openrlhf_pgrpo"]["plateau"] == {"best": 0.4, "waited": 0, "ended": False}


def test_training_ends_on_a_plateau(make):
    trainer = make("--robust.patience", "2", "--train.max_epochs", "3", evaluation=["a", "b"])
    worst(trainer, [0.5, 0.6, 0.4, 0.5])
    assert not trainer.plateau.ended
    worst(trainer, [0.4])  # not lower: the second in a row
    assert trainer.plateau.ended and "training ends" in trainer.strategy.printed[-1]
    before = trainer.model.logps.detach().clone()
    trainer.fit(trainer.args, 0, 1)
    assert torch.equal(trainer.model.logps, before)  # no step more


def test_a_run_that_ended_on_a_plateau_says_so_and_can_go_on(make):
    flags = ("--robust.patience", "2", "--train.max_epochs", "3")
    trainer = make(*flags, evaluation=["a", "b"])
    worst(trainer, [0.5, 0.6, 0.6])
    states = pickle.loads(pickle.dumps(trainer.client_states))
    again = make(*flags, evaluation=["a", "b"], states=states)
    assert again.plateau.ended and any("the run is complete: it has ended on a plateau" in said
                                       for said in again.strategy.printed)  # fmt: skip
    for patience in ("0", "9"):
        longer = make("--robust.patience", patience, "--train.max_epochs", "3", evaluation=["a", "b"], states=states)
        assert not longer.plateau.ended


def test_the_rate_falls_on_a_plateau_until_it_is_too_low(make):
    trainer = make("--robust.patience", "2", "--robust.plateau", "reduce_lr", evaluation=["a", "b"])
    worst(trainer, [0.5, 0.5, 0.5, 0.5])  # two that are not lower, and one
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1) and trainer.weights.options.eta == 0.05
    trainer.optimizer.step()
    trainer.scheduler.step()
    assert trainer.scheduler.get_last_lr() == [pytest.approx(0.1)] and not trainer.plateau.ended
    worst(trainer, [0.5] * 15)
    assert trainer.plateau.ended  # 1e-9


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_state_is_restored_to_the_bit(make):
    trainer = make("--robust.patience", "5", evaluation=["a", "b"], seed=6)
    trainer.args.ckpt.save_steps = 1
    trainer.fit(trainer.args, 0, 1)
    ((_, states, _),) = trainer.strategy.saved
    resumed = make("--robust.patience", "5", evaluation=["a", "b"], states=pickle.loads(pickle.dumps(states)))
    assert np.array_equal(resumed.weights.log_alpha, trainer.weights.log_alpha) and trainer.weights.alpha[0] != 0.5
    assert resumed.plateau == trainer.plateau and resumed.plateau.best < np.inf


def test_a_checkpoint_that_does_not_fit_is_refused(make, chat_policy):
    trainer = make()
    trainer.client_states = {}
    chat = ("--data.apply_chat_template", "--model.model_name_or_path", chat_policy)
    state = trainer._state()
    for states, flags, message in (
        ({"consumed_samples": 8}, (), "in schema 2, got one without"),
        ({"openrlhf_pgrpo": {**state, "schema": 7}}, (), "in schema 2, got schema 7"),
        ({"openrlhf_pgrpo": state}, ("--robust.eta", "0.2"), "--robust.eta 0.1 in the checkpoint, 0.2 now"),
        ({"openrlhf_pgrpo": state}, ("--model.beta", "0.2"), "--model.beta 0.1 in the checkpoint, 0.2 now"),
        ({"openrlhf_pgrpo": state}, ("--data.max_len", "9"), "--data.max_len 512 in the checkpoint, 9 now"),
        ({"openrlhf_pgrpo": state}, ("--data.chosen_key", "x"), "--data.chosen_key 'chosen' in the checkpoint, 'x'"),
        ({"openrlhf_pgrpo": state}, ("--data.input_template", "Q: {}"), "_template None in the checkpoint, 'Q: {}'"),
        ({"openrlhf_pgrpo": state}, chat, "template, the digest of the template, None in the checkpoint, '"),
        ({"openrlhf_pgrpo": state}, ("--ref.model_name_or_path", "x"), "_path None in the checkpoint, 'x' now"),
    ):
        with pytest.raises(ValueError, match=message):
            make(*flags, states=states)
    with pytest.raises(ValueError, match="resuming needs the data on which the weights were made"):
        make(names=["a", "b"], states={"openrlhf_pgrpo": state})


def test_the_checkpoint_of_another_method_is_refused(make):
    trainer = make()
    plain, robust = {"consumed_samples": 8}, {"consumed_samples": 8, "openrlhf_pgrpo": trainer._state()}
    with pytest.raises(ValueError, match="--data.pref_group_key 'who' in the checkpoint, None now: use those, or"):
        make(key=(), states=robust)
    with pytest.raises(ValueError, match="a checkpoint that holds group-robust weights in schema 2, got one without"):
        make(states=plain)
    for states in (plain, None):
        make(key=(), states=states)


def test_loading_keeps_what_the_hosts_script_throws_away(hooks):
    from openrlhf.utils.deepspeed.deepspeed import DeepspeedStrategy

    deepspeed = importlib.import_module("deepspeed")
    engine = deepspeed.DeepSpeedEngine.__new__(deepspeed.DeepSpeedEngine)
    torch.nn.Module.__init__(engine)
    strategy = DeepspeedStrategy.__new__(DeepspeedStrategy)
    for path, states in ((None, {}), ("there", {"mine": 1})):
        engine.load_checkpoint = partial(lambda found, *args, **kwargs: found, (path, states))
        strategy.load_ckpt(engine, "folder", "global_step1")
        assert getattr(strategy, "client_states", None) == (states if path else None)


def test_ipo_with_a_step_size_for_dpo_is_warned_of(make):
    assert "IPO's loss starts at 2500" in make("--model.ipo_enable", "--model.beta", "0.01").strategy.printed[-1]
    quiet = make("--model.ipo_enable", "--model.beta", "0.01", "--robust.eta", "5e-7")
    assert "warning" not in quiet.strategy.printed[-1]
