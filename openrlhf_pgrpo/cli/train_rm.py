"""`python -m openrlhf.cli.train_rm` with base rewards and users, `--reward.factors`; the host stays as is."""

from openrlhf_pgrpo.host import doors

if __name__ == "__main__":
    doors.run("openrlhf.cli.train_rm", doors.RM)
