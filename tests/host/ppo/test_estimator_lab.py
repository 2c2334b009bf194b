"""The estimator lab's formulas for the host's own estimators are the host's."""

import numpy as np
import pytest
import torch

import estimator_lab as lab

pytestmark = pytest.mark.host


@pytest.mark.parametrize("name", lab.HOST)
@pytest.mark.parametrize("n", [2, 5])
def test_advantages_of_one_token_are_the_hosts(name, n, host_args, make_maker, make_experiences):
    args = host_args("--algo.advantage.estimator", name, "--rollout.n_samples_per_prompt", str(n))
    rewards = np.random.default_rng(n).normal(1, 12, (6, n)).astype(np.float32)  # beyond the clip at 10
    experiences = make_experiences(rewards, tokens=1)
    for experience in experiences:
        experience.action_mask[:] = True  # one token per answer, as in the lab
    (host,) = type(make_maker(args)).__bases__  # the host's class, under the add-on's
    experiences = make_maker(args, host).compute_advantages_and_returns(experiences)
    found = torch.cat([e.advantages.flatten() for e in experiences]).numpy()
    index = [i for e in experiences for i in e.index]
    advantages = lab.Contender.parse(name).start(1, 1)(rewards[None].astype(np.float64), np.zeros((1, 6), int))
    np.testing.assert_allclose(found, advantages.ravel()[index], rtol=1e-4, atol=1e-5)
