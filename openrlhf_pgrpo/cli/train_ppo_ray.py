"""`python -m openrlhf.cli.train_ppo_ray` with `--advantage_estimator pgrpo` and `--pgrpo.*`; the host stays as is."""

from openrlhf_pgrpo.host.doors import run

if __name__ == "__main__":
    run("openrlhf.cli.train_ppo_ray")
