"""`python -m openrlhf.cli.serve_rm` for models with base rewards and users too; the host stays as is."""

from openrlhf_pgrpo.host import doors

if __name__ == "__main__":
    doors.run("openrlhf.cli.serve_rm", doors.SERVER)
