"""The door to the host's PPO script."""

from openrlhf_pgrpo.host import look
from openrlhf_pgrpo.host.door import Door
from openrlhf_pgrpo.host.ppo import flags, ray_start
from openrlhf_pgrpo.host.ppo.seams import SEAMS

PPO = Door(
    script="openrlhf.cli.train_ppo_ray",
    own_flag=flags.ESTIMATOR,
    seams=SEAMS,
    extend=flags.extend,
    check=flags.check,
    look=look.ppo,
    start=ray_start.prepare,
    on_ray=True,
)
