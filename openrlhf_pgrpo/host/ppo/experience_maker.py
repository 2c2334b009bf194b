"""The host's experience maker with our estimators instead of its reward shaping. It runs in the trainer actor."""

import numpy as np
import torch
from openrlhf.models.utils import compute_reward
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.length_penalty import apply_length_penalties
from openrlhf.utils.logging_utils import init_logger

from openrlhf_pgrpo import __version__
from openrlhf_pgrpo.core.estimator import RewardBatch, estimate
from openrlhf_pgrpo.core.history import segment_moments
from openrlhf_pgrpo.core.names import Names
from openrlhf_pgrpo.host import resume
from openrlhf_pgrpo.host.ppo import checkpoints, estimators, metrics
from openrlhf_pgrpo.host.run_log import SamplePicker
from openrlhf_pgrpo.host.tags import TaggedPrompt

logger = init_logger(__name__)


def install(module) -> None:
    """Replaces the experience maker that the host's trainers import with `PreferenceExperienceMaker`."""
    module.RemoteExperienceMaker = PreferenceExperienceMaker


class PreferenceExperienceMaker(RemoteExperienceMaker):
    """`RemoteExperienceMaker` whose advantages may come from a registered estimator.

    For names that the host does not know, `compute_advantages_and_returns` is ours and a sample without a reward is
    refused; the host's own estimators run its own code. Both get metrics per preference group, and both may be the
    base of a robust estimator, which multiplies their final advantages by a weight per preference group. It holds the
    estimator, the weights and their state for the life of the run.
    """

    # For an instance that was made without __init__, as tests of the host do.
    estimator = robust = user_rewards = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.estimator = estimators.make_estimator(self.args)
        self.robust = estimators.make_robust(self.args)
        self.user_rewards = estimators.make_user_rewards(self.args)
        self.pref_group_metrics, self.pref_group_samples = {}, []
        self.sample_picker = SamplePicker(self.tokenizer)
        checkpoints.attach(self.actor_model_group, self)
        self._log_methods()

    def _log_methods(self) -> None:
        """Logs which estimator, rewards and weights this run uses."""
        if self.estimator is not None:
            logger.info(
                f"advantages: {self.advantage_estimator} (openrlhf_pgrpo {__version__}) replaces "
                "RemoteExperienceMaker.compute_advantages_and_returns"
            )
            if self.args.algo.dynamic_filtering_enable:
                logger.info("dynamic filtering is on: prompts that it drops do not enter the reward history")
            if self.args.algo.advantage.gamma != 1.0:
                logger.warning(f"gamma is taken as 1.0 for {self.advantage_estimator}")
        if self.user_rewards is not None:
            users, name = len(self.user_rewards.users), self.user_rewards.folder.name
            logger.info(f"rewards: each sample's user, one of {users}, weighs the base rewards of {name}")
        if self.robust is not None:
            logger.info(
                f"advantages: {estimators.estimator_name(self.args)} weights those of {self.advantage_estimator} by "
                f"preference group, on the signal {self.args.robust.signal}"
            )

    # ---- state ----

    @property
    def _stateful_parts(self) -> dict:
        """The estimator and the weights of this run, by their names in a checkpoint; none for a plain host
        estimator."""
        parts = {"estimator": self.estimator, "robust": self.robust}
        return {name: part for name, part in parts.items() if part is not None}

    def checkpoint_state(self) -> dict:
        if not self._stateful_parts:
            return {"settings": {"advantage_estimator": self.advantage_estimator}, "estimator": {}}
        states = {name: part.state_dict() for name, part in self._stateful_parts.items()}
        return {"settings": estimators.settings(self.args), "estimator": {}, **states}

    def restore(self, state: dict | None) -> None:
        """Takes over the state of a resumed checkpoint.

        Raises:
            ValueError: the checkpoint has no state for this estimator, or one made under other settings.
        """
        name = estimators.estimator_name(self.args)
        if not self._stateful_parts or self.args.pgrpo.fresh_history:
            if state is not None and (state.get("estimator") or "robust" in state):
                logger.warning("the reward history in the checkpoint is not used and will not be saved again")
            return
        resume.check_schema(state, f"the state of {name}", checkpoints.OTHERWISE)
        resume.check_settings(state["settings"], estimators.settings(self.args), checkpoints.OTHERWISE)
        for part_name, part in self._stateful_parts.items():
            part.load_state_dict(state[part_name])
        logger.info(f"restored the state of {name} from the checkpoint")

    # ---- rewards ----

    @torch.no_grad()
    def make_experience(self, samples_list):
        """Calls the host's. Base rewards (B, D) of a factorized reward model become rewards (B,) of the users."""
        experiences = super().make_experience(samples_list)
        if self.user_rewards is not None:
            for experience in experiences:
                users = [getattr(prompt, "user", None) for prompt in experience.prompts]
                rewards = self.user_rewards(experience.rewards.double().numpy(), users)
                experience.rewards = experience.info["reward"] = torch.as_tensor(rewards, dtype=torch.float32)
        return experiences

    def make_experience_batch(self, rollout_samples):
        if self._stateful_parts and self.reward_model_group is None:
            _refuse_missing_rewards(rollout_samples)
        return super().make_experience_batch(rollout_samples)

    # ---- advantages ----

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences):
        """For the host's estimators, the host's own code. For ours, its steps (0.11.2) with the estimator instead of
        reward shaping. They are written out because the host applies length penalties, and logs the reward, only
        after shaping."""
        if self.estimator is None:
            experiences = super().compute_advantages_and_returns(experiences)
        else:
            for experience in experiences:
                rewards = experience.rewards.flatten()  # an HTTP server that answers with lists gives (B, 1)
                experience.rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
            apply_length_penalties(experiences, self.args)

        prompts = [prompt for experience in experiences for prompt in experience.prompts]
        batch = None
        if self._stateful_parts:
            batch = self._reward_batch(experiences, prompts)
        if self.estimator is not None:
            self._estimate(experiences, batch)
        if self.robust is not None:
            self._apply_weights(experiences, batch)
        if prompts and all(getattr(prompt, "pref_group", None) is not None for prompt in prompts):
            if batch is None:
                names, rows = _pref_group_rows(prompts)
            else:
                names, rows = batch.pref_group_names, batch.pref_group_codes
            self.pref_group_metrics = metrics.by_pref_group(experiences, names, rows, *self._stateful_parts.values())
            self.pref_group_samples = self.sample_picker.pick(experiences)
        return experiences

    def _reward_batch(self, experiences, prompts) -> RewardBatch:
        """What the estimator and the weights see, in the order of `experiences`."""
        rewards = torch.cat([experience.rewards.flatten() for experience in experiences]).double()
        # The host's `index` numbers samples prompt by prompt.
        index = torch.tensor([i for experience in experiences for i in experience.index])
        if self.robust is not None or self.estimator.uses_pref_groups:
            _refuse_missing_pref_groups(prompts)
        bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"every sample needs a finite reward, got {rewards[bad[0]].item()} for {_described(prompts[bad[0]])} "
                f"({len(bad)} of {len(rewards)} samples): correct the reward function or model"
            )
        return RewardBatch(
            rewards=rewards.numpy(),
            prompt_groups=(index // self.args.rollout.n_samples_per_prompt).numpy(),
            pref_groups=[getattr(prompt, "pref_group", None) or "" for prompt in prompts],
            users=[getattr(prompt, "user", None) for prompt in prompts],
            labels=[label for experience in experiences for label in experience.labels],
        )

    def _estimate(self, experiences, batch: RewardBatch) -> None:
        """Puts the estimator's advantages, with the KL penalty of each token, into `experiences`."""
        sizes = [len(experience.index) for experience in experiences]
        if self.args.rollout.n_samples_per_prompt > 1:
            for experience, stds in zip(experiences, _prompt_group_stds(batch).split(sizes)):
                experience.info["group_reward_std"] = stds
        advantages = estimate(self.advantage_estimator, self.estimator, batch)
        for experience, advantage in zip(experiences, torch.as_tensor(advantages, dtype=torch.float32).split(sizes)):
            reward = compute_reward(
                advantage,
                self.kl_ctl.value,
                experience.kl,
                action_mask=experience.action_mask,
                reward_clip_range=self.args.reward.clip_range,
            )
            experience.returns = self.get_cumulative_returns(reward, experience.action_mask, 1.0)
            experience.advantages = experience.returns.clone()
            experience.info["return"] = reward.sum(dim=-1)
            experience.kl = None

    def _apply_weights(self, experiences, batch: RewardBatch) -> None:
        """Multiplies final advantages, whitened and with KL, by the weights; PPO's minimum and clip commute with them.

        Returns stay as they are, because a critic learns them.
        """
        weights = torch.as_tensor(self.robust(batch), dtype=torch.float32)
        sizes = [len(experience.index) for experience in experiences]
        for experience, weight in zip(experiences, weights.split(sizes)):
            experience.advantages = experience.advantages * weight[:, None]


def _pref_group_rows(prompts) -> tuple[list[str], np.ndarray]:
    """The distinct preference groups (G,) of prompts, and the row (B,) of each prompt in them."""
    names = Names()
    rows = names.rows([prompt.pref_group for prompt in prompts])
    return list(names), rows


def _prompt_group_stds(batch: RewardBatch) -> torch.Tensor:
    """The host's `group_reward_std`: sample standard deviation of each sample's prompt group, (B,)."""
    moments = segment_moments(batch.prompt_groups, batch.rewards, batch.prompt_groups.max() + 1)
    return torch.as_tensor(moments.std("sample")[batch.prompt_groups], dtype=torch.float32)


def _refuse_missing_pref_groups(prompts) -> None:
    for prompt in prompts:
        if not isinstance(prompt, TaggedPrompt) or prompt.pref_group is None:
            raise ValueError(
                f"every prompt needs to carry its preference group, got one without: {_excerpt(prompt)}. An agent "
                "executor must return the very prompt object that it was given"
            )


def _refuse_missing_rewards(rollout_samples) -> None:
    """The host hides exceptions of reward functions and servers. Here they stop the run before any state changes."""
    missing = [sample for sample in rollout_samples if sample.rewards is None]
    if missing:
        raise ValueError(
            f"every sample needs a reward, got none for {_described(missing[0].prompts[0])} "
            f"({len(missing)} of {len(rollout_samples)} samples). The reward function or server raised an exception: "
            "it is in the output of the RolloutRayActor, in the line that begins '[SingleTurnExecutor] Failed to "
            "fetch reward from remote RM'"
        )


def _described(prompt: str) -> str:
    return f"preference group {getattr(prompt, 'pref_group', None)!r}, prompt {_excerpt(prompt)}"


def _excerpt(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 80 else f"...{prompt[-77:]}")
