"""`python -m openrlhf.cli.train_rm` with base rewards and users, `--reward.factors`; the host's files stay as they
are."""

from openrlhf_pgrpo.host import doors

if __name__ == "__main__":
    doors.RM.run()
