"""The seams that several doors share. Light: it runs in every Ray worker."""

from openrlhf_pgrpo.host.hooks import Seam

REWARD_MODEL = Seam(
    {
        "_get_reward_model": ("base_pretrained_model", "base_llm_model", "value_head_prefix", "packing_samples"),
    },
    ("openrlhf_pgrpo.host.reward_factory:install",),
)

CHECKPOINTS = Seam(
    {
        "DeepspeedStrategy.__init__": (
            *("self", "seed", "full_determinism", "max_norm", "micro_train_batch_size", "train_batch_size"),
            *("zero_stage", "args"),
        ),
        "DeepspeedStrategy.save_ckpt": (
            *("self", "model", "save_dir", "tag", "max_num", "max_mem", "client_state", "save_latest"),
            *("metric_value", "metric_key"),
        ),
        "DeepspeedStrategy.load_ckpt": (
            *("self", "model", "load_dir", "tag", "load_module_strict", "load_optimizer_states"),
            *("load_lr_scheduler_states", "load_module_only"),
        ),
        "DeepspeedStrategy.save_model": ("self", "model", "tokenizer", "output_dir", "kwargs"),
        "DeepspeedStrategy._read_ckpt_metric": ("self", "ckpt_dir"),
    },
    ("openrlhf_pgrpo.host.whole_checkpoints:install",),
)

READING = Seam(
    {
        "blending_datasets": (
            *("datasets", "probabilities", "strategy", "seed", "max_count"),
            *("stopping_strategy", "dataset_split"),
        )
    },
    ("openrlhf_pgrpo.host.columns:install",),
)

# Pairs of a chosen and a rejected response, for DPO and for reward models.
PAIRS = {
    "RewardDataset.__init__": (
        *("self", "dataset", "tokenizer", "max_length", "strategy", "input_template", "is_dpo"),
        "num_processors",
    ),
    "RewardDataset.process_data": ("self", "data"),
}
