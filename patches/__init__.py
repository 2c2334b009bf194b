"""The patches of this folder, installed as `openrlhf_pgrpo.patches` so that `openrlhf-pgrpo patch` finds them."""
