"""Factorized reward models in `openrlhf.cli.train_rm`. It runs in every DeepSpeed rank."""
