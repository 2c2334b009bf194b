"""`python -m openrlhf.cli.serve_rm` for models with base rewards and users too; the host's files stay as they are."""

from openrlhf_pgrpo.host import doors

if __name__ == "__main__":
    doors.SERVE.run()
