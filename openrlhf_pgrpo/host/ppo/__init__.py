"""PPO with Ray and vLLM: preference groups, users and estimators of ours in `openrlhf.cli.train_ppo_ray`."""
