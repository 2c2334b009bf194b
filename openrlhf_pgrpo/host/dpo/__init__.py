"""DPO and IPO: group-robust weights in `openrlhf.cli.train_dpo`. It runs in every DeepSpeed rank."""
