"""What we replace in the host for DPO and IPO. There is no Ray here: every rank runs the host's script itself."""

from openrlhf_pgrpo.host.hooks import Seam
from openrlhf_pgrpo.host.shared_seams import CHECKPOINTS, PAIRS, READING

SEAMS = {
    "openrlhf.datasets.utils": READING,
    "openrlhf.datasets.reward_dataset": Seam(PAIRS, ("openrlhf_pgrpo.host.dpo.data:install",)),
    "openrlhf.utils.deepspeed.deepspeed": CHECKPOINTS,
    "openrlhf.trainer.dpo_trainer": Seam(
        {
            "DPOTrainer.__init__": (
                *("self", "model", "ref_model", "strategy", "tokenizer", "optim", "train_dataloader"),
                *("eval_dataloader", "scheduler", "max_norm", "beta", "max_epochs", "save_hf_ckpt", "disable_ds_ckpt"),
            ),
            "DPOTrainer.concatenated_forward": (
                *("self", "model", "chosen_ids", "c_mask", "reject_ids", "r_mask", "prompt_id_lens"),
            ),
            "DPOTrainer.save_logs_and_checkpoints": (
                *("self", "args", "global_step", "step_bar", "logs_dict", "client_states"),
            ),
            "DPOTrainer.evaluate": ("self", "eval_dataloader", "steps"),
            "DPOLoss.forward": (
                *("self", "policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps"),
                "reference_rejected_logps",
            ),
        },
        ("openrlhf_pgrpo.host.dpo.trainer:install",),
    ),
}
