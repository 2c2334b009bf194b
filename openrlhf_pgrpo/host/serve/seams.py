"""What we replace in the host for its reward server, in the server's process."""

from openrlhf_pgrpo.host.shared_seams import REWARD_MODEL

SEAMS = {"openrlhf.models.model": REWARD_MODEL}
