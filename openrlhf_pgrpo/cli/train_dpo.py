"""`python -m openrlhf.cli.train_dpo` with GR-DPO and GR-IPO, `--robust.*`; the host stays as is."""

from openrlhf_pgrpo.host import doors

if __name__ == "__main__":
    doors.run("openrlhf.cli.train_dpo", doors.DPO)
