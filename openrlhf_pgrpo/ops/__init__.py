"""Before a run: is this machine or cluster ready, and is the host patched?"""
