"""`python -m openrlhf.cli.train_dpo` with GR-DPO and GR-IPO, `--robust.*`; the host's files stay as they are."""

from openrlhf_pgrpo.host import doors

if __name__ == "__main__":
    doors.DPO.run()
