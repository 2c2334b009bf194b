"""A run that made no update leaves no model, and ends with an error; what is saved can be read as the umask says."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from openrlhf_pgrpo.host import saved_models

pytestmark = pytest.mark.host


# One rank of two with real engines: what each of them hears that saves a model. `moving average CONFIG` is of one that
# is averaged in 7 updates, `trained` one of ZeRO-3 whose 3 weights are 2 on each rank, the last of them nobody's.
RANK = """
import json, sys
from types import SimpleNamespace
import torch
from openrlhf_pgrpo.host import hooks, saved_models

hooks.register({})
import deepspeed

rank, folder, configs = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
deepspeed.init_distributed("gloo")
torch.use_deterministic_algorithms(True)  # memory that nobody has written is nan

def heard(updates, engine):
    strategy = SimpleNamespace(
        args=SimpleNamespace(ckpt=SimpleNamespace(output_dir=folder)),
        time_steps={"ema": updates},
        print=print,
        is_rank_0=lambda: rank == 0,
        all_reduce=lambda number, op: number,
    )
    try:
        saved_models.save(lambda model, output_dir: None, strategy, (engine, folder), {})
    except RuntimeError as error:
        return str(error)
    return "saved"

def weights(config):
    return torch.nn.Linear(3, 1, bias=False, dtype=torch.bfloat16 if config["bf16"]["enabled"] else None)

found = {}
for name, config in configs.items():
    engine, *_ = deepspeed.initialize(model=weights(config), config=config)
    found[f"moving average {name}"] = [heard(updates, engine) for updates in (0, 7)]

config = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
}
engine, *_ = deepspeed.initialize(model=weights(config), config=config)
found["untrained"] = heard(0, engine)
engine.backward(engine(torch.ones(1, 3, dtype=torch.bfloat16)).sum())
engine.step()
found["trained"] = heard(0, engine)
(weight,) = engine.parameters()
found["nobody's"] = weight.ds_tensor[1].isnan().item()
weight.ds_tensor[0] = float("nan")
found["nan"] = heard(0, engine)
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def found(hooks, tmp_path_factory):
    """What two ranks with real engines found."""
    from openrlhf.utils.deepspeed.deepspeed_utils import get_eval_ds_config

    configs = {}
    for stage, kind in ((0, "fp32"), (0, "bf16"), (3, "bf16")):
        config = get_eval_ds_config(offload=True, stage=stage, param_dtype=kind)  # as the host's moving average
        configs[f"{stage} {kind}"] = config | {"train_micro_batch_size_per_gpu": 1}
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(folder), json.dumps(configs)],
            env={**os.environ, "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def engine(steps, skipped=0, average=False, weights=()):
    return SimpleNamespace(
        global_steps=steps,
        skipped_steps=skipped,
        optimizer_name=lambda: None if average else "adamw",
        parameters=lambda: weights,
    )


@pytest.fixture
def save(tmp_path):
    """Saves as the host does at the end of a run, or in the middle. Returns what was printed."""

    def save(model, folder="out", averaged=0, elsewhere=0):
        printed = []
        strategy = SimpleNamespace(
            args=SimpleNamespace(ckpt=SimpleNamespace(output_dir=str(tmp_path / "out"))),
            time_steps={"ema": averaged},
            print=printed.append,
            is_rank_0=lambda: True,
            all_reduce=lambda number, op: max(number, elsewhere),
        )

        def host(model, tokenizer, output_dir, **kwargs):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "config.json").write_text("{}")
            weights = tmp_path / folder / "model.safetensors"
            weights.write_text("")
            weights.chmod(0o600)

        saved_models.save(host, strategy, (model, None, str(tmp_path / folder)), {})
        return printed

    return save


@pytest.mark.parametrize(
    "model, reason",
    [
        (engine(0), "were all samples filtered"),
        (engine(3, skipped=3), "3 steps were left out, because gradients were not finite"),
        (SimpleNamespace(model=engine(0)), "were all samples filtered"),  # the host's `Actor` around the engine
        (engine(0, average=True), "were all samples filtered"),
    ],
)
def test_a8_a_run_without_an_update_saves_nothing_and_fails(save, tmp_path, model, reason):
    with pytest.raises(RuntimeError, match=f"needs at least one update, got none .*{reason}.*nothing is saved to"):
        save(model)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model, averaged", [(engine(1), 0), (engine(0, average=True), 1)])
def test_a_trained_model_is_saved(save, tmp_path, model, averaged):
    assert save(model, averaged=averaged) == [] and (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("config", ["0 fp32", "0 bf16", "3 bf16"])
def test_a_moving_average_is_known_in_whatever_precision(found, config):
    """In bfloat16 DeepSpeed gives it an optimizer that does nothing, with ZeRO-3 one that holds the weights."""
    for of_rank in found:
        untrained, averaged = of_rank[f"moving average {config}"]
        assert "needs at least one update, got none" in untrained and averaged == "saved"


def test_a12_updates_that_were_left_out_are_said_at_the_end(save, tmp_path):
    """DeepSpeed drops them silently: half of a run may have trained nothing."""
    (said,) = save(engine(6, skipped=3))
    assert "3 of 6 updates were left out, because their gradients were not finite" in said
    assert save(engine(6, skipped=3), folder="global_step6_hf") == []
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a8_a_copy_in_the_middle_is_left_out_until_there_was_an_update(save, tmp_path):
    (said,) = save(engine(0), folder="global_step1_hf")
    assert "no update has been made yet" in said and not (tmp_path / "global_step1_hf").exists()


def test_e2_weights_get_the_mode_of_the_other_files(save, tmp_path):
    save(engine(1))
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {
        (tmp_path / "out" / "config.json").stat().st_mode & 0o777
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("folder", ["out", "global_step2_hf"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_a12_weights_that_are_not_finite_are_never_saved(save, tmp_path, bad, folder, kind):
    """With bfloat16 DeepSpeed makes the update whatever the gradient is."""
    weights = [torch.full((300, 300), 500.0, dtype=kind), torch.ones(5, dtype=kind)]  # a sum beyond float16
    save(engine(2, weights=weights), folder="fine")
    weights[1][3] = bad
    with pytest.raises(
        RuntimeError, match="needs finite weights, got nan or inf after 2 updates: nothing is saved to"
    ):
        save(engine(2, weights=weights), folder=folder)
    assert not (tmp_path / folder).exists()


def test_a12_a_rank_leaves_with_the_others(save):
    with pytest.raises(RuntimeError, match="needs finite weights"):
        save(engine(2, weights=[torch.ones(4)]), elsewhere=1)


def test_a12_a_rank_looks_at_its_part_of_the_weights_and_at_no_more(found):
    """ZeRO-3 gives all ranks equally much, and does not write what is beyond the last weight."""
    for of_rank in found:
        assert "needs at least one update" in of_rank["untrained"] and of_rank["trained"] == "saved"
        assert "needs finite weights, got nan or inf after 1 updates" in of_rank["nan"]
    assert [of_rank["nobody's"] for of_rank in found] == [False, True]
