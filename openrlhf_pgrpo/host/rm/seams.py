"""What we replace in the host for reward models. There is no Ray here: every rank runs the host's script itself."""

from openrlhf_pgrpo.host.hooks import Seam
from openrlhf_pgrpo.host.shared_seams import CHECKPOINTS, PAIRS, READING, REWARD_MODEL

SEAMS = {
    "openrlhf.datasets.utils": READING,
    "openrlhf.models.model": Seam(
        {
            **REWARD_MODEL.contract,
            "get_llm_for_sequence_regression": (
                *("model_name_or_path", "model_type", "param_dtype", "load_in_4bit", "lora_rank", "lora_alpha"),
                *("target_modules", "lora_dropout", "normalize_reward", "attn_implementation", "ds_config"),
                *("init_value_head", "value_head_prefix", "device_map", "packing_samples", "experts_implementation"),
                "kwargs",
            ),
        },
        (*REWARD_MODEL.installs, "openrlhf_pgrpo.host.rm.model:install"),
    ),
    "openrlhf.datasets.reward_dataset": Seam(
        {**PAIRS, "RewardDataset.__getitem__": ("self", "idx")}, ("openrlhf_pgrpo.host.rm.data:install",)
    ),
    "openrlhf.utils.deepspeed.deepspeed": Seam(
        {
            **CHECKPOINTS.contract,
            "DeepspeedStrategy._get_model_parameters": ("self", "model", "optim", "weight_decay"),
        },
        ("openrlhf_pgrpo.host.rm.checkpoints:install", *CHECKPOINTS.installs),
    ),
    "openrlhf.trainer.rm_trainer": Seam(
        {
            "RewardModelTrainer.__init__": (
                *("self", "model", "strategy", "optim", "train_dataloader", "eval_dataloader", "scheduler"),
                *("tokenizer", "max_norm", "max_epochs", "loss", "disable_ds_ckpt", "save_hf_ckpt"),
            ),
            "RewardModelTrainer.concatenated_forward": (
                *("self", "model", "chosen_ids", "c_mask", "reject_ids", "r_mask"),
            ),
            "RewardModelTrainer.concatenated_inputs": ("self", "chosen_ids", "c_mask", "reject_ids", "r_mask"),
            "RewardModelTrainer.save_logs_and_checkpoints": (
                *("self", "args", "global_step", "step_bar", "logs_dict", "client_states"),
            ),
            "RewardModelTrainer.evaluate": ("self", "eval_dataloader", "steps"),
            "PairWiseLoss.forward": ("self", "chosen_reward", "reject_reward", "margin"),
        },
        ("openrlhf_pgrpo.host.rm.trainer:install",),
    ),
}
