"""Which checkpoints a training of a factorized reward model takes, and that plain ones are left to the host."""

from types import SimpleNamespace

import pytest
import torch

from openrlhf_pgrpo.core.names import Names
from openrlhf_pgrpo.models.form import PLAIN, Form

pytestmark = pytest.mark.host

USERS = ["ana", "bob", "cleo"]


class Host:
    """Replaces the host's module. Its methods only say that they were called."""

    class DeepspeedStrategy:
        use_ds_universal_ckpt = False

        def __init__(self):
            reward = SimpleNamespace(factors=None)
            ckpt, device = SimpleNamespace(load_enable=False, output_dir="out"), SimpleNamespace(device="cpu")
            self.args = SimpleNamespace(ckpt=ckpt, reward=reward, pgrpo=device, train=SimpleNamespace())
            self.printed = []

        def print(self, line):
            self.printed.append(line)

        def is_rank_0(self):
            return True

        def _get_model_parameters(self, model, *, optim=None, weight_decay=0.0):
            return model, [{"params": list(model.parameters()), "weight_decay": weight_decay}]

        def load_ckpt(self, model, load_dir, tag=None):
            return "loaded", {}

        def save_ckpt(self, model, save_dir, tag=None):
            return "saved by DeepSpeed"

        def save_model(self, model, tokenizer, output_dir, **kwargs):
            return "saved by the host"

        def _read_ckpt_metric(self, ckpt_dir):
            return None

        def _unwrap_model(self, model):
            return model


@pytest.fixture
def new_strategy(hooks):
    """A strategy of the host, with our hooks, in a training with these settings."""
    from openrlhf_pgrpo.host import whole_checkpoints
    from openrlhf_pgrpo.host.rm import checkpoints

    module = SimpleNamespace(DeepspeedStrategy=type("DeepspeedStrategy", (Host.DeepspeedStrategy,), {}))
    checkpoints.install(module)
    whole_checkpoints.install(module)

    def new_strategy(users=USERS, user_key="user", **options):
        strategy = module.DeepspeedStrategy()
        reward = SimpleNamespace(**{"factors": 2, "l2": 0.3, **options})
        keys = dict(prompt_key="prompt", chosen_key="chosen", rejected_key="rejected")
        data = SimpleNamespace(user_key=user_key, preference_key=None, max_len=64, **keys)
        strategy.args.reward, strategy.args.data, strategy.reward_users = reward, data, Names(users)
        return strategy

    return new_strategy


def model_of(pooling="last", form=PLAIN):
    return SimpleNamespace(config=SimpleNamespace(base_reward_pooling=pooling, base_reward_form=form.record()))


MODEL = model_of()


@pytest.fixture
def folder(new_strategy, tmp_path):
    """A folder with a checkpoint of DeepSpeed."""
    from openrlhf_pgrpo.host.rm.checkpoints import state

    write(tmp_path, state(new_strategy(), MODEL))
    return tmp_path


def write(folder, state):
    (folder / "global_step1").mkdir(exist_ok=True)
    torch.save({"module": {}, "openrlhf_pgrpo": state}, folder / "global_step1" / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("global_step1")


def test_a_checkpoint_that_fits_is_taken(new_strategy, folder, tmp_path_factory):
    strategy = new_strategy()
    assert strategy.load_ckpt(MODEL, str(folder)) == ("loaded", {})
    assert strategy.load_ckpt(MODEL, str(folder), tag="global_step1") == ("loaded", {})
    nothing = tmp_path_factory.mktemp("nothing")
    assert strategy.load_ckpt(MODEL, str(nothing)) == (None, {})  # the host starts anew
    assert "there is no complete checkpoint in" in strategy.printed[-1]


def test_a_checkpoint_of_other_settings_is_refused(new_strategy, folder):
    other = new_strategy(factors=3, l2=0.1, user_key="who")
    with pytest.raises(ValueError) as refused:
        other.load_ckpt(model_of("mean"), str(folder))
    for message in (
        "--reward.factors 2 in the checkpoint, 3 now",
        "--reward.pooling 'last' in the checkpoint, 'mean' now",
        "--reward.l2 0.3 in the checkpoint, 0.1 now",
        "--data.user_key 'user' in the checkpoint, 'who' now",
    ):
        assert message in str(refused.value)


def test_a_checkpoint_of_other_texts_is_refused(new_strategy, folder):
    """It went on, and the model's folder said of all texts that they had been written in the new way."""
    other = new_strategy()
    other.args.data.max_len, other.args.data.prompt_key = 32, None
    for form, message in (
        (Form(input_template="Q: {}"), "--data.input_template None in the checkpoint, 'Q: {}' now"),
        (Form("{{ x }}"), "--data.apply_chat_template, the digest of the template, None in the checkpoint, '"),
    ):
        with pytest.raises(ValueError) as refused:
            other.load_ckpt(model_of(form=form), str(folder))
        assert message in str(refused.value)
        assert "--data.max_len 64 in the checkpoint, 32 now" in str(refused.value)
        assert "--data.prompt_key 'prompt' in the checkpoint, None now" in str(refused.value)


@pytest.mark.parametrize(
    "users, message",
    [
        (["ana", "bob"], "3 users in the checkpoint, 2 now, 'cleo' only there"),
        (["ana", "bob", "cleo", "eve"], "3 users in the checkpoint, 4 now, 'eve' only now"),
        (["bob", "ana", "cleo"], "3 users in the checkpoint, 3 now, in another order"),
    ],
)
def test_a_checkpoint_of_other_users_is_refused(new_strategy, folder, users, message):
    with pytest.raises(ValueError, match=message):
        new_strategy(users).load_ckpt(MODEL, str(folder))


@pytest.mark.parametrize("state, found", [(None, "got one without"), ({"schema": 7}, "got schema 7")])
def test_a_checkpoint_of_something_else_is_refused(new_strategy, folder, state, found):
    write(folder, state)
    with pytest.raises(ValueError, match=f"that holds a factorized reward model in schema 2, {found}"):
        new_strategy().load_ckpt(MODEL, str(folder))


def test_a_plain_reward_model_is_left_to_the_host(new_strategy, folder):
    write(folder, None)
    strategy, model = new_strategy(factors=None), torch.nn.Linear(2, 1)
    ((group),) = strategy._get_model_parameters(model)[1]
    assert len(group["params"]) == 2
    assert strategy.load_ckpt(None, str(folder)) == ("loaded", {})


def test_a_plain_run_refuses_the_checkpoint_of_a_factorized_one(new_strategy, folder):
    """DeepSpeed would speak of a head of another shape."""
    with pytest.raises(ValueError, match="--reward.factors 2 in the checkpoint, None now: use those, or start anew"):
        new_strategy(factors=None).load_ckpt(None, str(folder))
