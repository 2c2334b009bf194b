"""The doors to the host, one for each of its scripts. Start reading here.

A script that may be changed makes three calls:

    doors.PPO.activate()                      before anything of the host is imported
    args = doors.PPO.parse_args(parser)       instead of parser.parse_args()
    doors.PPO.prepare(args)                   before the script's own work

A script that is left as it is needs one: `doors.PPO.run()`.
"""

from openrlhf_pgrpo.host.dpo.door import DPO
from openrlhf_pgrpo.host.ppo.door import PPO
from openrlhf_pgrpo.host.rm.door import RM
from openrlhf_pgrpo.host.serve.door import SERVE

__all__ = ["DPO", "PPO", "RM", "SERVE"]
