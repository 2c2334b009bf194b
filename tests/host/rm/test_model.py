"""From a plain backbone to a factorized reward model with as many users as the data have."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openrlhf_pgrpo.core.names import Names
from openrlhf_pgrpo.host import doors
from openrlhf_pgrpo.models.folder import Folder
from openrlhf_pgrpo.models.form import PLAIN, Form

pytestmark = pytest.mark.host

FACTORS = ("--reward.factors", 3, "--data.user_key", "user")
LORA = dict(lora_rank=2, target_modules="all-linear")


@pytest.fixture
def host(fresh):
    """The host's module that builds models, with our hook."""
    from openrlhf_pgrpo.host.rm import model

    module = fresh("openrlhf.models.model")
    model.install(module)
    return module


@pytest.fixture
def build(host, monkeypatch):
    """What the host's script builds under its arguments, which offer bf16 only."""
    from openrlhf_pgrpo.host.rm import model

    monkeypatch.setattr("openrlhf.utils.utils.convert_to_torch_dtype", lambda name: torch.float32)

    def build(args, **options):
        model.prepare(args)
        zero = {"zero_optimization": {"stage": 2}}
        return host.get_llm_for_sequence_regression(
            *(args.model.model_name_or_path, "reward"),
            **dict(attn_implementation="sdpa", ds_config=zero, init_value_head=True, **options),
        )

    return build


def parameters(args, users, model) -> list[dict]:
    """The groups of parameters that the optimizer gets, by the host's own function."""
    from openrlhf.utils.deepspeed.deepspeed_utils import get_optimizer_grouped_parameters

    from openrlhf_pgrpo.host.rm.model import trained_parameters

    strategy = SimpleNamespace(args=args, reward_users=Names(users))
    return trained_parameters(strategy, lambda model: (model, get_optimizer_grouped_parameters(model, 0.1)), model)[1]


def test_training_starts_with_a_random_head_and_short_coefficients(parse, build):
    args = parse(*FACTORS, "--reward.pooling", "mean")
    model = build(args)
    parameters(args, [f"u{i}" for i in range(400)], model)
    assert (model.config.base_rewards, model.config.base_reward_users) == (3, 400)
    assert model.config.base_reward_pooling == "mean" and model.coefficients.shape == (400, 3)
    assert float(model.score.weight.detach().std()) == pytest.approx(1 / 65, rel=0.2)
    assert float(model.coefficients.detach().std()) == pytest.approx(0.1 / 3**0.5, rel=0.1)


def test_every_rank_starts_with_the_same_coefficients(parse, build):
    tables = []
    for rank, seed in enumerate((42, 42, 43)):
        args = parse(*FACTORS, "--train.seed", seed)
        torch.manual_seed(rank)  # what happened before differs from rank to rank
        model = build(args)
        parameters(args, "abcd", model)
        tables.append(model.coefficients.detach())
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


def test_the_table_has_a_learning_rate_of_its_own(parse, build):
    args = parse(*FACTORS, "--reward.coefficients_lr", 0.5)
    model = build(args)
    *others, table = parameters(args, "ab", model)
    assert [id(parameter) for parameter in table.pop("params")] == [id(model.coefficients)]
    assert table == {"lr": 0.5, "weight_decay": 0.0}
    found = {id(parameter) for group in others for parameter in group["params"]}
    assert found == {id(parameter) for parameter in model.parameters()} - {id(model.coefficients)}
    assert [group["weight_decay"] for group in others] == [0.1, 0.0] and not any("lr" in group for group in others)


def test_head_and_table_train_beside_adapters(parse, build):
    args = parse(*FACTORS, "--ds.lora.rank", 2)
    model = build(args, **LORA)
    parameters(args, "ab", model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"base_model.model.score.weight", "base_model.model.coefficients"} < trained
    assert all("lora_" in name for name in trained if not name.endswith(("score.weight", "coefficients")))
    assert not any("score" in name and "lora_" in name for name in trained)
    assert model.get_base_model().coefficients.shape == (2, 3)


def test_zero_3_gets_one_dtype(parse, build):
    args = parse(*FACTORS, "--ds.zero_stage", 3)
    model = build(args, **LORA)
    model.get_base_model().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    parameters(args, "ab", model)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.bfloat16}


def test_two_trainings_in_one_process_do_not_know_each_other(parse, build):
    """Models and users of both are built in turns: nothing of the first may be left in the second."""
    runs = [(parse(*FACTORS), "abc"), (parse(*FACTORS, "--reward.factors", 2, "--reward.pooling", "mean"), "xy")]
    models = [build(args) for args, _ in runs]
    for (args, users), model in zip(runs, models):
        parameters(args, users, model)
    assert [tuple(model.coefficients.shape) for model in models] == [(3, 3), (2, 2)]
    assert [model.config.base_reward_pooling for model in models] == ["last", "mean"]
    plain = build(parse())  # the host's own, after both
    assert type(plain).__qualname__ == "_get_reward_model.<locals>.RewardModel"


# ---- folders that a run leaves ----


@pytest.fixture
def save(fresh, tmp_path, monkeypatch):
    """Saves a model that has had an update, in a run of one process, by the host's own class with our hooks."""
    from transformers import AutoTokenizer

    from openrlhf_pgrpo.host import whole_checkpoints
    from openrlhf_pgrpo.host.rm import checkpoints

    module = fresh("openrlhf.utils.deepspeed.deepspeed")
    monkeypatch.setattr(module, "torch_dist_barrier_and_cuda_sync", lambda: None)
    monkeypatch.setattr("openrlhf.utils.distributed_util.torch_dist_barrier_and_cuda_sync", lambda: None)
    checkpoints.install(module)
    whole_checkpoints.install(module)

    def save(args, model, users):
        strategy = module.DeepspeedStrategy.__new__(module.DeepspeedStrategy)
        strategy.args, strategy.reward_users = args, Names(users)
        strategy.all_reduce = lambda value, op: value
        model.global_steps, model.skipped_steps = 1, 0
        model.optimizer_name = lambda: "an optimizer"
        strategy.save_model(model, AutoTokenizer.from_pretrained(args.model.model_name_or_path), tmp_path / "copy")
        return tmp_path / "copy"

    return save


@pytest.mark.parametrize("rank", [0, 2])
def test_a_copy_of_a_run_without_zero_is_whole(parse, build, save, rank):
    """DeepSpeed knows no float32 copy of a weight then. And the host names the head in the last model alone."""
    args = parse(*FACTORS, "--ds.zero_stage", 0, "--ds.value_head_prefix", "foo")
    lora = {**LORA, "lora_rank": rank} if rank else {}
    model = build(args, value_head_prefix="foo", **lora)
    parameters(args, "ab", model)
    folder = Folder(save(args, model, "ab"))
    plain = model.get_base_model() if rank else model
    assert (folder.head_name, folder.users) == ("foo", ["a", "b"])
    assert np.array_equal(folder.tensor("foo.weight"), plain.foo.weight.detach())
    assert np.array_equal(folder.coefficients, plain.coefficients.detach())


def test_a_copy_of_a_plain_run_names_its_head(parse, build, save):
    """Whoever read the copy drew another head."""
    args = parse("--ds.value_head_prefix", "foo")
    folder = save(args, build(args, value_head_prefix="foo"), "")
    assert json.loads((folder / "config.json").read_text())["value_head_prefix"] == "foo"


# ---- a factorized model to start from ----


def test_training_goes_on_from_a_factorized_model(parse, build, factorized):
    args, folder = parse(*FACTORS, "--model.model_name_or_path", factorized), Folder(factorized)
    model = build(args)
    parameters(args, folder.users, model)
    assert np.array_equal(model.score.weight.detach(), folder.tensor("score.weight"))
    assert np.array_equal(model.coefficients.detach(), folder.coefficients)


def test_a4_a_longest_text_that_the_backbone_cannot_read_is_refused(parse, build):
    """On a GPU a position beyond the table takes the process down, in the middle of an epoch."""
    with pytest.raises(ValueError, match="--data.max_len needs to be at most 256, .* got 257: lower it"):
        build(parse(*FACTORS, "--data.max_len", 257))


def test_a4_the_folder_knows_the_longest_text_of_its_training(parse, build, factorized):
    for start, users in (((), "ab"), (("--model.model_name_or_path", factorized), Folder(factorized).users)):
        args = parse(*FACTORS, "--data.max_len", 40, *start)
        model = build(args)
        parameters(args, users, model)
        assert model.config.base_reward_max_length == 40 and not model.config.base_reward_fitted


CHAT = ("--data.apply_chat_template", "--data.tokenizer_chat_template", "{{ messages[0]['content'] }}?")


def test_a2_the_folder_knows_how_the_texts_of_its_training_are_written(parse, build, factorized):
    """It did not: a model trained on templated texts was used on plain ones, .953 of the pairs against .625."""
    for words, form in (
        ((), PLAIN),
        (("--data.input_template", "Q: {}"), Form(input_template="Q: {}")),
        (CHAT, Form(CHAT[2], {"eos_token": "<eos>", "pad_token": "<pad>"})),
    ):
        args = parse(*FACTORS, *words)
        model = build(args)
        parameters(args, "ab", model)
        assert Form.of_model(model.config, "here") == form
    start = ("--model.model_name_or_path", factorized)
    with pytest.raises(
        ValueError, match="training needs prompts written as those of .*, plain, got by a chat template"
    ):
        build(parse(*FACTORS, *start, *CHAT))
    with pytest.raises(ValueError, match="needs a model that has one, got none in the tokenizer of"):
        build(parse(*FACTORS, CHAT[0]))


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "is a factorized reward model and needs --reward.factors"),
        ((*FACTORS, "--reward.factors", 2), "--reward.factors needs to be 3, as in"),
        ((*FACTORS, "--reward.pooling", "mean"), "--reward.pooling needs to be last, as in"),
        ((*FACTORS, "--ds.value_head_prefix", "v"), "--ds.value_head_prefix needs to be score, as"),
        ((*FACTORS, "--data.max_len", 257), "--data.max_len needs to be at most 256, the longest text that"),
    ],
)
def test_a_model_that_does_not_fit_is_a_usage_message(
    host, host_parser, factorized, annotations, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.setenv("RANK", "0")  # otherwise start would set the variables of a single process
    monkeypatch.chdir(tmp_path)  # with the folders of the run
    data = ("--data.dataset", annotations, "--data.prompt_key", "prompt")
    words = [str(word) for word in ("--model.model_name_or_path", factorized, *data, *words)]
    args = doors.RM.parse_args(host_parser(doors.RM.script), words)
    with pytest.raises(SystemExit) as refused:
        doors.RM.prepare(args)
    assert refused.value.code == 2 and message in capsys.readouterr().err
