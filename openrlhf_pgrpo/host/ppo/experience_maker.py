"""The host's experience maker with our estimators instead of its reward shaping. It runs in the trainer actor."""

from contextlib import contextmanager

import numpy as np
import torch
from openrlhf.models.utils import compute_reward
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.length_penalty import apply_length_penalties
from openrlhf.utils.logging_utils import init_logger

from openrlhf_pgrpo import __version__
from openrlhf_pgrpo.core.estimator import RewardBatch, SampleError, estimate
from openrlhf_pgrpo.core.history import segment_moments
from openrlhf_pgrpo.core.names import Names
from openrlhf_pgrpo.host import resume
from openrlhf_pgrpo.host.ppo import checkpoints, estimators, metrics
from openrlhf_pgrpo.host.ppo.rewards import excerpt, whose
from openrlhf_pgrpo.host.run_log import SamplePicker
from openrlhf_pgrpo.host.tags import TaggedPrompt

logger = init_logger(__name__)


def install(module) -> None:
    """Replaces the experience maker that the host's trainers import with `PreferenceExperienceMaker`."""
    module.RemoteExperienceMaker = PreferenceExperienceMaker


class PreferenceExperienceMaker(RemoteExperienceMaker):
    """`RemoteExperienceMaker` whose advantages may come from a registered estimator.

    For names that the host does not know, `compute_advantages_and_returns` is ours; the host's own estimators run its
    own code. For both, a sample without a finite reward, an action token or finite advantages is refused, and named;
    both get metrics per preference group, and both may be the base of a robust estimator, which multiplies their final
    advantages by a weight per preference group. It holds the estimator, the weights and their state for the life of
    the run.
    """

    # For an instance that was made without __init__, as tests of the host do.
    estimator = robust = user_rewards = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.estimator = estimators.make_estimator(self.args)
        self.robust = estimators.make_robust(self.args)
        self.user_rewards = estimators.make_user_rewards(self.args)
        self.pref_group_metrics, self.pref_group_samples, self.partial_logs = {}, [], {}
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
        kl = {"kl_coef": self.kl_ctl.value}  # which --algo.kl.target adapts
        if not self._stateful_parts:
            return {"settings": {"advantage_estimator": self.advantage_estimator}, "estimator": {}, **kl}
        states = {name: part.state_dict() for name, part in self._stateful_parts.items()}
        return {"settings": self._settings(), "estimator": {}, **states, **kl}

    def _settings(self) -> dict:
        """The settings that give the state its meaning. Not `outliers`: a run that was refused because of one may be
        resumed with the other choice."""
        found = estimators.settings(self.args)
        return {name: value for name, value in found.items() if not name.endswith(".outliers")}

    def restore(self, state: dict | None) -> None:
        """Takes over the state of a resumed checkpoint.

        Raises:
            ValueError: the checkpoint has no state for this estimator, or one made under other settings.
        """
        name = estimators.estimator_name(self.args)
        if self.args.algo.kl.target is not None and state is not None:
            self.kl_ctl.value = state.get("kl_coef", self.kl_ctl.value)
        if not self._stateful_parts or self.args.pgrpo.fresh_history:
            if state is not None and (state.get("estimator") or "robust" in state):
                logger.warning("the reward history in the checkpoint is not used and will not be saved again")
            return
        resume.check_schema(state, f"the state of {name}", checkpoints.OTHERWISE)
        resume.check_settings(state["settings"], self._settings(), checkpoints.OTHERWISE)
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
        """Calls the host's. Logs that only some samples have are taken out: the host can neither batch nor average
        them, and ranks that reduce other keys wait for each other for ever.

        Raises:
            ValueError: a sample without an action token. Nothing has changed.
        """
        _refuse_missing_actions(rollout_samples, self.args)
        self.partial_logs = metrics.take_partial_logs(rollout_samples)
        return super().make_experience_batch(rollout_samples)

    # ---- advantages ----

    @torch.no_grad()
    def compute_advantages_and_returns(self, experiences):
        """For the host's estimators, the host's own code. For ours, its steps (0.11.2) with the estimator instead of
        reward shaping. They are written out because the host applies length penalties, and logs the reward, only
        after shaping.

        Raises:
            ValueError: a reward or an advantage that is not finite, or a reward that the estimator or the signal of
                the weights refuses.
        """
        prompts = [prompt for experience in experiences for prompt in experience.prompts]
        _refuse_infinite_rewards(experiences, prompts)
        if self.estimator is None:
            experiences = super().compute_advantages_and_returns(experiences)
        else:
            for experience in experiences:
                rewards = experience.rewards.flatten()  # an HTTP server that answers with lists gives (B, 1)
                experience.rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
            apply_length_penalties(experiences, self.args)

        batch = None
        with _naming_prompts(prompts):
            if self._stateful_parts:
                batch = self._reward_batch(experiences, prompts)
            if self.estimator is not None:
                self._estimate(experiences, batch)
            if self.robust is not None:
                self._apply_weights(experiences, batch)
        self._check_advantages(experiences, prompts)
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
        tokens = None
        if estimators.loss_counts_tokens(self.args):
            tokens = torch.cat([experience.action_mask.sum(-1) for experience in experiences]).numpy()
        weights = torch.as_tensor(self.robust(batch, tokens), dtype=torch.float32)
        sizes = [len(experience.index) for experience in experiences]
        for experience, weight in zip(experiences, weights.split(sizes)):
            experience.advantages = experience.advantages * weight[:, None]

    def _check_advantages(self, experiences, prompts) -> None:
        for experience in experiences:
            if experience.advantages.shape != experience.action_mask.shape:
                found, needed = tuple(experience.advantages.shape), tuple(experience.action_mask.shape)
                raise ValueError(
                    f"the estimator {self.advantage_estimator} needs to give one advantage per token, shape {needed}, "
                    f"got {found} for {whose(experience.prompts[0])}"
                )
        finite = [(e.advantages.isfinite() | ~e.action_mask.bool()).all(-1) for e in experiences]
        bad = (~torch.cat(finite)).nonzero().flatten().tolist() if finite else []
        if bad:
            rewards = torch.cat([experience.rewards.flatten() for experience in experiences])
            low, high = self.args.reward.clip_range
            raise ValueError(
                f"every sample needs finite advantages, got others from the estimator {self.advantage_estimator} "
                f"for {whose(prompts[bad[0]])} ({len(bad)} of {len(prompts)} samples). Its reward is "
                f"{rewards[bad[0]].item():.6g}, so look at --reward.clip_range, which is {low} to {high}, and at KL "
                "and values: a policy or critic that has diverged gives no finite ones"
            )


@contextmanager
def _naming_prompts(prompts):
    """Adds the prompt to an error about a sample, which the methods know by its number alone."""
    try:
        yield
    except SampleError as error:
        raise ValueError(f"{error}; it is of {whose(prompts[error.sample])}") from error


def _pref_group_rows(prompts) -> tuple[list[str], np.ndarray]:
    """The distinct preference groups (G,) of prompts, and the row (B,) of each prompt in them."""
    names = Names()
    rows = names.rows([prompt.pref_group for prompt in prompts])
    return list(names), rows


def _prompt_group_stds(batch: RewardBatch) -> torch.Tensor:
    """The host's `group_reward_std`: sample standard deviation of each sample's prompt group, (B,)."""
    moments = segment_moments(batch.prompt_groups, batch.rewards, batch.prompt_groups.max() + 1)
    return torch.as_tensor(moments.std(ddof=1)[batch.prompt_groups], dtype=torch.float32)


def _refuse_infinite_rewards(experiences, prompts) -> None:
    rewards = [experience.rewards.flatten() for experience in experiences]
    bad = (~torch.cat(rewards).isfinite()).nonzero().flatten().tolist() if rewards else []
    if bad:
        raise ValueError(
            f"every sample needs a finite reward, got {torch.cat(rewards)[bad[0]].item()} for "
            f"{whose(prompts[bad[0]])} ({len(bad)} of {len(prompts)} samples): correct the reward function or model"
        )


def _refuse_missing_pref_groups(prompts) -> None:
    for prompt in prompts:
        if not isinstance(prompt, TaggedPrompt) or prompt.pref_group is None:
            raise ValueError(
                f"every prompt needs to carry its preference group, got one without: {excerpt(prompt)}. An agent "
                "executor must return the very prompt object that it was given"
            )


def _refuse_missing_actions(rollout_samples, args) -> None:
    """Such a sample trains nothing, while its reward would enter baselines and the history."""
    missing = [sample for sample in rollout_samples if not sample.action_mask.any()]
    if missing:
        sample = missing[0]
        raise ValueError(
            f"every sample needs an action token, got none for {whose(sample.prompts[0])} ({len(missing)} of "
            f"{len(rollout_samples)} samples): {sample.sequences.shape[-1]} tokens came back, --data.max_len is "
            f"{args.data.max_len} and --rollout.max_new_tokens {args.rollout.max_new_tokens}. Leave room for the "
            "prompt and an answer in --data.max_len; an agent must generate at least once"
        )
