"""The host's experience maker with our estimators in the place of its reward shaping."""

import torch
from openrlhf.models.utils import compute_reward
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.length_penalty import apply_length_penalties
from openrlhf.utils.logging_utils import init_logger

from openrlhf_pgrpo import __version__
from openrlhf_pgrpo.core.history import segment_moments
from openrlhf_pgrpo.core.registry import RewardBatch
from openrlhf_pgrpo.host import checkpoints, metrics, options
from openrlhf_pgrpo.host.prompts import TaggedPrompt
from openrlhf_pgrpo.host.run_log import SamplePicker

logger = init_logger(__name__)


def install(module) -> None:
    """Puts `PreferenceExperienceMaker` in the place from which the host's trainers import theirs."""
    module.RemoteExperienceMaker = PreferenceExperienceMaker


class PreferenceExperienceMaker(RemoteExperienceMaker):
    """`RemoteExperienceMaker` whose advantages may come from a registered estimator.

    For names that the host does not know, `compute_advantages_and_returns` is ours and a sample without a reward is
    refused; the host's own estimators run its own code. Both get metrics per preference group, and both may be the
    base of a robust estimator, which multiplies their final advantages by a weight per preference group. Holds the
    estimator, the weights and their state for the life of the run.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.estimator = options.make_estimator(self.args)
        self.robust = options.make_robust(self.args)
        self.pref_group_metrics, self.pref_group_samples = {}, []
        self.sample_picker = SamplePicker(self.tokenizer)
        self.user_rewards = options.make_user_rewards(self.args)
        checkpoints.attach(self.actor_model_group, self)
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
            users, name = len(self.user_rewards.rows), self.user_rewards.folder.name
            logger.info(f"rewards: each sample's user, one of {users}, weighs the base rewards of {name}")
        if self.robust is not None:
            logger.info(
                f"advantages: {options.estimator_name(self.args)} weights those of {self.advantage_estimator} by "
                f"preference group, on the signal {self.args.robust.signal}"
            )

    # ── State ──

    @property
    def _ours(self) -> dict:
        """What of ours takes part in this run, by its name in a checkpoint; a plain host estimator leaves it empty."""
        parts = {"estimator": self.estimator, "robust": self.robust}
        return {name: part for name, part in parts.items() if part is not None}

    def checkpoint_state(self) -> dict:
        if not self._ours:
            return {"settings": {"advantage_estimator": self.advantage_estimator}, "estimator": {}}
        states = {name: part.state_dict() for name, part in self._ours.items()}
        return {"settings": options.settings(self.args), "estimator": {}, **states}

    def restore(self, state: dict | None) -> None:
        """Takes over the state of a resumed checkpoint.

        Raises:
            ValueError: the checkpoint has no state for this estimator, or one made under other settings.
        """
        name = options.estimator_name(self.args)
        if not self._ours or self.args.pgrpo.fresh_history:
            if state is not None and (state["estimator"] or "robust" in state):
                logger.warning("the reward history in the checkpoint is not used and will not be saved again")
            return
        if state is None:
            raise ValueError(
                f"resuming with {name} needs a checkpoint that holds its state, got one saved "
                "without openrlhf_pgrpo: pass --pgrpo.fresh_history to start with an empty history"
            )
        checkpoints.check_settings(state["settings"], options.settings(self.args))
        for part_name, part in self._ours.items():
            part.load_state_dict(state[part_name])
        logger.info(f"restored the state of {name} from the checkpoint")

    # ── Rewards ──

    @torch.no_grad()
    def make_experience(self, samples_list):
        """The host's; where the reward model is a factorized one, what it gives as (B, D) becomes the users' (B,)."""
        experiences = super().make_experience(samples_list)
        if self.user_rewards is not None:
            for experience in experiences:
                users = [getattr(prompt, "user", None) for prompt in experience.prompts]
                rewards = self.user_rewards(experience.rewards.double().numpy(), users)
                experience.rewards = experience.info["reward"] = torch.as_tensor(rewards, dtype=torch.float32)
        return experiences

    # ── Advantages ──

    def make_experience_batch(self, rollout_samples):
        if self._ours and self.reward_model_group is None:
            _refuse_missing_rewards(rollout_samples)
        return super().make_experience_batch(rollout_samples)

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences):
        if self.estimator is None:
            experiences = super().compute_advantages_and_returns(experiences)
        else:
            experiences = self._estimate(experiences)
        if self.robust is not None:
            self._weigh(experiences)
        prompts = [prompt for experience in experiences for prompt in experience.prompts]
        if all(isinstance(prompt, TaggedPrompt) for prompt in prompts):
            self.pref_group_metrics = metrics.by_pref_group(experiences, *self._ours.values())
            self.pref_group_samples = self.sample_picker.pick(experiences)
        return experiences

    def _weigh(self, experiences) -> None:
        """Multiplies final advantages, whitened and with KL, by the weights; PPO's minimum and clip commute with them.

        Returns stay: they are what a critic learns.
        """
        batch = _reward_batch(experiences, self.args.rollout.n_samples_per_prompt, uses_pref_groups=True)
        weights = torch.as_tensor(self.robust(batch), dtype=torch.float32)
        sizes = [len(experience.index) for experience in experiences]
        for experience, weight in zip(experiences, weights.split(sizes)):
            experience.advantages = experience.advantages * weight[:, None]

    def _estimate(self, experiences):
        """The host's `compute_advantages_and_returns` (0.11.2), step by step, with the estimator for its shaping.

        It is written out because the host's method would apply length penalties, and log the reward, after shaping.
        """
        args = self.args
        for experience in experiences:
            rewards = experience.rewards.flatten()  # an HTTP server that answers with lists gives (B, 1)
            experience.rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
        apply_length_penalties(experiences, args)

        uses_pref_groups = self.estimator.uses_pref_groups or self.robust is not None
        batch = _reward_batch(experiences, args.rollout.n_samples_per_prompt, uses_pref_groups)
        sizes = [len(experience.index) for experience in experiences]
        if args.rollout.n_samples_per_prompt > 1:
            for experience, stds in zip(experiences, _prompt_group_stds(batch).split(sizes)):
                experience.info["group_reward_std"] = stds

        advantages = torch.as_tensor(self.estimator(batch), dtype=torch.float32)
        for experience, advantage in zip(experiences, advantages.split(sizes)):
            reward = compute_reward(
                advantage,
                self.kl_ctl.value,
                experience.kl,
                action_mask=experience.action_mask,
                reward_clip_range=args.reward.clip_range,
            )
            experience.returns = self.get_cumulative_returns(reward, experience.action_mask, 1.0)
            experience.advantages = experience.returns.clone()
            experience.info["return"] = reward.sum(dim=-1)
            experience.kl = None
        return experiences


def _reward_batch(experiences, n_samples_per_prompt: int, uses_pref_groups: bool) -> RewardBatch:
    """What the estimator sees, in the order of `experiences`; the host's `index` numbers samples prompt by prompt."""
    rewards = torch.cat([experience.rewards.flatten() for experience in experiences]).double()
    prompts = [prompt for experience in experiences for prompt in experience.prompts]
    index = torch.tensor([i for experience in experiences for i in experience.index])
    if uses_pref_groups:
        for prompt in prompts:
            if not isinstance(prompt, TaggedPrompt):
                raise ValueError(
                    f"every prompt needs to carry its preference group, got one without: {_excerpt(prompt)}. An agent "
                    "executor must return the very prompt object that it was given"
                )
    bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"every sample needs a finite reward, got {rewards[bad[0]].item()} for {_who(prompts[bad[0]])} "
            f"({len(bad)} of {len(rewards)} samples): correct the reward function or model"
        )
    return RewardBatch(
        rewards=rewards.numpy(),
        prompt_groups=(index // n_samples_per_prompt).numpy(),
        pref_groups=[getattr(prompt, "pref_group", "") for prompt in prompts],
        users=[getattr(prompt, "user", None) for prompt in prompts],
        labels=[label for experience in experiences for label in experience.labels],
    )


def _prompt_group_stds(batch: RewardBatch) -> torch.Tensor:
    """The host's `group_reward_std`: sample standard deviation of each sample's prompt group, (B,)."""
    moments = segment_moments(batch.prompt_groups, batch.rewards, batch.prompt_groups.max() + 1)
    return torch.as_tensor(moments.std("sample")[batch.prompt_groups], dtype=torch.float32)


def _refuse_missing_rewards(rollout_samples) -> None:
    """The host swallows exceptions of reward functions and servers; here they stop the run before state changes."""
    missing = [sample for sample in rollout_samples if sample.rewards is None]
    if missing:
        raise ValueError(
            f"every sample needs a reward, got none for {_who(missing[0].prompts[0])} "
            f"({len(missing)} of {len(rollout_samples)} samples). The reward function or server raised an exception: "
            "it is in the output of the RolloutRayActor, in the line that begins '[SingleTurnExecutor] Failed to "
            "fetch reward from remote RM'"
        )


def _who(prompt: str) -> str:
    return f"preference group {getattr(prompt, 'pref_group', None)!r}, prompt {_excerpt(prompt)}"


def _excerpt(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 80 else f"...{prompt[-77:]}")
