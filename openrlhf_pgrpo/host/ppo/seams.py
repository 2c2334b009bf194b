"""What we replace in the host for PPO. Light: it runs in every Ray worker."""

from openrlhf_pgrpo.host.hooks import Seam
from openrlhf_pgrpo.host.shared_seams import CHECKPOINTS, READING, REWARD_MODEL

SEAMS = {
    "openrlhf.datasets.utils": Seam(
        READING.contract, (*READING.installs, "openrlhf_pgrpo.host.ppo.prompts:install_check")
    ),
    "openrlhf.datasets.prompts_dataset": Seam(
        {"PromptDataset.__init__": ("self", "dataset", "tokenizer", "strategy", "input_template")},
        ("openrlhf_pgrpo.host.ppo.prompts:install_tags",),
    ),
    "openrlhf.models.model": REWARD_MODEL,
    "openrlhf.utils.agent": Seam(
        {
            "SingleTurnAgentExecutor.__init__": ("self", "remote_rm_url"),
            "SingleTurnAgentExecutor._fetch_rewards_via_func": ("self", "queries_list", "prompts_list", "labels_list"),
            "SingleTurnAgentExecutor._fetch_rewards_via_http": ("self", "queries_list", "prompts_list", "labels_list"),
            "MultiTurnAgentExecutor.__init__": ("self", "agent_instance_cls"),
        },
        ("openrlhf_pgrpo.host.ppo.rewards:install_executors",),
    ),
    "openrlhf.trainer.ppo_utils.samples_generator": Seam(
        {
            "SamplesGenerator._process_response_into_experience": ("self", "response", "generate_kwargs"),
            "SamplesGenerator._dispatch_prompts_to_vllm": ("self", "prompts", "labels", "images", "generate_kwargs"),
            "SamplesGenerator.generate_samples": ("self", "generate_kwargs"),
        },
        (
            "openrlhf_pgrpo.host.ppo.rewards:install_samples",
            "openrlhf_pgrpo.host.ppo.waiting:install",
            "openrlhf_pgrpo.host.ppo.loader:install_whole_updates",
            "openrlhf_pgrpo.host.ppo.tokenizer:install",
        ),
    ),
    "openrlhf.trainer.ppo_utils.experience_maker": Seam(
        {
            "RemoteExperienceMaker.__init__": (
                *("self", "actor_model_group", "critic_model_group", "reward_model_group", "initial_model_group"),
                *("kl_controller", "strategy", "tokenizer", "kwargs"),
            ),
            "RemoteExperienceMaker.make_experience_batch": ("self", "rollout_samples"),
            "RemoteExperienceMaker.make_experience": ("self", "samples_list"),
            "RemoteExperienceMaker.compute_advantages_and_returns": ("self", "experiences"),
            "RemoteExperienceMaker.get_cumulative_returns": ("self", "rewards", "action_mask", "gamma"),
            "apply_length_penalties": ("experiences", "args"),
            "compute_reward": ("r", "kl_coef", "kl", "action_mask", "reward_clip_range"),
        },
        ("openrlhf_pgrpo.host.ppo.experience_maker:install",),
    ),
    "openrlhf.trainer.ppo_trainer": Seam(
        {
            "BasePPOTrainer.__init__": (
                *("self", "strategy", "actor_model_group", "critic_model_group", "reward_model_group"),
                *("reference_model_group", "vllm_engines", "tokenizer"),
            ),
            "BasePPOTrainer.save_logs_and_checkpoints": ("self", "global_step", "logs_dict", "client_states"),
            "BasePPOTrainer.init_checkpoint_states": ("self",),
            "prepare_datasets": ("strategy", "tokenizer"),
        },
        ("openrlhf_pgrpo.host.ppo.loader:install", "openrlhf_pgrpo.host.ppo.metrics:install"),
    ),
    "openrlhf.utils.deepspeed.deepspeed": CHECKPOINTS,
}
