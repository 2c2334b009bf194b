"""What our trainers cost on one device: memory and time of an update against the host's own, printed at the end."""

import pytest

pytestmark = pytest.mark.gpu

SKIPPED = 4  # updates in which kernels are chosen and memory is found
CONTENDERS = {
    "DPO": ("train_dpo",),
    "GR-DPO": ("train_dpo", "--data.pref_group_key", "who"),
    "scalar reward model": ("train_rm",),
    "8 base rewards, 6 users": ("train_rm", "--reward.factors", 8, "--data.user_key", "user"),
}


@pytest.mark.parametrize("name", CONTENDERS)
def test_memory_and_time_of_an_update(name, train, large, costs):
    """Without our flags, the host's own classes train."""
    door, *ours = CONTENDERS[name]
    flags = {
        "--model.model_name_or_path": large.model,
        "--data.dataset": large.pairs,
        "--data.prompt_key": "prompt",
        "--data.max_len": large.max_len,
        "--eval.dataset": large.pairs,  # after the last update, once all is measured
        "--eval.split": "train",
        "--train.batch_size": 8,
        "--train.micro_batch_size": 8,
        "--ds.zero_stage": 2,
        "--ds.attn_implementation": "sdpa",
    }
    words = [word for flag in flags.items() for word in flag]
    costs[name] = train(name.replace(" ", "-"), door, *words, *ours).costs(SKIPPED)


def test_ours_cost_what_the_hosts_cost(costs, device):
    if device == "cpu" or len(costs) < len(CONTENDERS):
        pytest.skip("needs all figures, of a GPU: on a shared CPU they say nothing")
    for ours, theirs in (("GR-DPO", "DPO"), ("8 base rewards, 6 users", "scalar reward model")):
        (seconds, memory), (plain_seconds, plain_memory) = costs[ours], costs[theirs]
        assert memory < 1.05 * plain_memory and seconds < 1.25 * plain_seconds, (ours, costs[ours], costs[theirs])
