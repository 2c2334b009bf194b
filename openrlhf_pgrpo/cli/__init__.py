"""The command line: `openrlhf-pgrpo`, and a module for each script of the host that is run through our doors."""
