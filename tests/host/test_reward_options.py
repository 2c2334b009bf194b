"""Flags of the doors that train and serve factorized reward models, and of PPO with one."""

import json

import pytest

from openrlhf_pgrpo.host import doors, options, reward_model

pytestmark = pytest.mark.host

MODULE, SERVER = "openrlhf.cli.train_rm", "openrlhf.cli.serve_rm"
FACTORS = ("--reward.factors", 3, "--data.user_key", "user")


@pytest.fixture
def parse(host_parser, tiny, tmp_path, monkeypatch):
    """Nested arguments of the reward-model trainer from a command line, as its script gets them."""
    import datasets
    from openrlhf.datasets import utils
    from openrlhf.utils.config import hierarchize

    monkeypatch.setattr(utils, "blending_datasets", utils.blending_datasets.__wrapped__)  # without PPO's hook
    monkeypatch.setenv("RANK", "0")  # or parse_args would set all that names the only process
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(reward_model, "training", None)

    def parse(*argv, users=("bob", "ana", "bob"), **columns):
        rows = [{"user": user, "chosen": "y", "rejected": "n", **columns} for user in users]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        ours = ("--data.dataset", tmp_path / "pairs.jsonl", "--model.model_name_or_path", tiny / "model")
        return hierarchize(doors.parse_args(host_parser(MODULE), [str(word) for word in (*ours, *argv)]))

    return parse


def test_users_are_read_before_the_model_is_built(parse):
    args = parse(*FACTORS)
    assert reward_model.training == reward_model.Training(3, "last", ["ana", "bob"])
    assert (args.reward.l2, args.reward.coefficients_lr, args.reward.metrics_path) == (0.02, 0.01, None)
    assert args.ds.attn_implementation == "sdpa"
    parse(*FACTORS, "--reward.pooling", "mean", "--data.max_samples", 1)
    assert reward_model.training == reward_model.Training(3, "mean", ["bob"])
    reward_model.training = None
    parse()
    assert reward_model.training is None


def test_training_goes_on_from_a_factorized_model(parse, factorized):
    start = ("--model.model_name_or_path", factorized)
    parse(*FACTORS, *start)
    assert reward_model.training == reward_model.Training(3, "last", ["ana", "bob", "cleo"])


REFUSED = {
    "--reward.factors needs a number of base rewards >= 1, got 0": ("--reward.factors", 0, "--data.user_key", "user"),
    "--reward.factors needs --data.user_key, got none": ("--reward.factors", 2),
    "--reward.l2 needs a finite number >= 0, got -1.0": (*FACTORS, "--reward.l2", -1),
    "--reward.l2 needs a finite number >= 0, got nan": (*FACTORS, "--reward.l2", "nan"),
    "--reward.coefficients_lr needs a finite number > 0, got 0.0": (*FACTORS, "--reward.coefficients_lr", 0),
    "--reward.l2 needs --reward.factors, got none": ("--reward.l2", 0.1),
    "--data.user_key needs --reward.factors, got none": ("--data.user_key", "user"),
    "--model.loss_type logexp needs the loss of one reward": (*FACTORS, "--model.loss_type", "logexp"),
    "--model.margin_loss_enable True needs a margin on one": (*FACTORS, "--model.margin_loss_enable"),
    "--optim muon needs a matrix for Muon": (*FACTORS, "--optim", "muon"),
    "--data.user_key needs a column of the dataset, got 'who'": ("--reward.factors", 2, "--data.user_key", "who"),
    "--data.preference_key needs a column of the dataset, got 'share'": (*FACTORS, "--data.preference_key", "share"),
}


def test_an_empty_file_is_a_usage_message(parse, capsys):
    with pytest.raises(SystemExit):
        parse(*FACTORS, users=())
    assert "training needs at least one pair, got an empty dataset" in capsys.readouterr().err


@pytest.mark.parametrize("message", REFUSED)
def test_bad_values_are_a_usage_message(parse, capsys, message):
    with pytest.raises(SystemExit):
        parse(*REFUSED[message])
    assert f"error: {message}" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_a_usage_message(parse, capsys, factorized):
    start = ("--model.model_name_or_path", factorized)
    for words, users, message in (
        (start, ("ana",), "is a factorized reward model and needs --reward.factors"),
        ((*start, *FACTORS, "--reward.factors", 2), ("ana",), "--reward.factors needs to be 3, as in"),
        ((*start, *FACTORS, "--reward.pooling", "mean"), ("ana",), "--reward.pooling needs to be last, as in"),
        ((*start, *FACTORS, "--ds.value_head_prefix", "v"), ("ana",), "--ds.value_head_prefix needs to be score, as"),
        ((*start, *FACTORS), ("ana", "eve"), "every pair needs a user of the model"),
    ):
        with pytest.raises(SystemExit):
            parse(*words, users=users)
        assert message in capsys.readouterr().err


# ---- PPO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (("--reward.unknown_user", "mean"), "--reward.unknown_user needs a factorized reward model in --reward.model"),
        (("--reward.remote_url", "x", "--reward.profiles", "p"), "--reward.profiles needs a factorized reward model"),
        (("--reward.model_name_or_path", "FOLDER"), "needs --pgrpo.user_key, got none"),
        (
            ("--reward.model_name_or_path", "FOLDER", "--reward.unknown_user", "mean"),  # gae is the host's default
            "a critic cannot start from the base rewards of .*: name another model with --critic.model_name_or_path",
        ),
    ],
)
def test_ppo_refuses_what_cannot_work(host_args, factorized, words, message):
    with pytest.raises(ValueError, match=message):
        host_args(*(str(factorized) if word == "FOLDER" else word for word in words))


def test_ppo_takes_a_factorized_reward_model(host_args, factorized, tiny):
    keys = ("--pgrpo.group_key", "persona", "--pgrpo.user_key", "who")
    model = ("--reward.model_name_or_path", str(factorized))
    args = host_args("--advantage_estimator", "reinforce", *keys, *model)
    assert options.make_user_rewards(args).rows == {"ana": 0, "bob": 1, "cleo": 2}
    assert options.make_user_rewards(host_args(*keys, "--reward.model_name_or_path", str(tiny / "model"))) is None
    host_args("--advantage_estimator", "reinforce", *model, "--reward.unknown_user", "mean")
    host_args(*keys, *model, "--critic.model_name_or_path", "another")


# ---- the server -----------------------------------------------------------------------------------------------------


def test_the_server_leaves_plain_models_to_the_host(host_parser, tiny, factorized, monkeypatch, capsys):
    from openrlhf_pgrpo.host import reward_server

    served = []
    monkeypatch.setattr(reward_server, "serve", lambda *given: served.append(given))

    def start(folder, *words):
        words = ["--reward.model_name_or_path", str(folder), *words]
        return doors.parse_args(host_parser(SERVER), words)

    args = start(tiny / "model")
    assert served == [] and vars(args)["ds.attn_implementation"] == "sdpa"
    start(factorized, "--reward.user_key", "who")
    ((args, folder),) = served
    assert args.reward.user_key == "who" and folder.users == ["ana", "bob", "cleo"]
    with pytest.raises(SystemExit):
        start(tiny / "model", "--reward.unknown_user", "mean")
    assert "need a factorized reward model, got a plain one" in capsys.readouterr().err


def test_help_lists_everything(host_parser):
    for module, door, flags in (
        (MODULE, doors.RM, ("--reward.factors", "--reward.l2", "--data.user_key", "--data.preference_key")),
        (SERVER, doors.SERVER, ("--reward.unknown_user", "--reward.profiles", "--reward.user_key")),
    ):
        parser = host_parser(module)
        door.extend(parser)
        assert all(flag in parser.format_help() for flag in (*flags, "--pgrpo.device"))
