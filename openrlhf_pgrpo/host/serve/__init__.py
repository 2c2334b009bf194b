"""The host's reward server `openrlhf.cli.serve_rm` for factorized reward models. It runs in the server's process."""
