"""`python -m openrlhf.cli.train_ppo_ray` with `--advantage_estimator pgrpo`; the host's files stay as they are."""

from openrlhf_pgrpo.host import doors

if __name__ == "__main__":
    doors.PPO.run()
