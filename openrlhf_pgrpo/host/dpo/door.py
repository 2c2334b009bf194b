"""The door to the host's preference trainer."""

from openrlhf_pgrpo.host import look, single_process
from openrlhf_pgrpo.host.door import Door
from openrlhf_pgrpo.host.dpo import flags
from openrlhf_pgrpo.host.dpo.seams import SEAMS

DPO = Door(
    script="openrlhf.cli.train_dpo",
    own_flag="model.ipo_enable",
    seams=SEAMS,
    extend=flags.extend,
    check=flags.check,
    look=look.dpo,
    start=lambda args: single_process.allow(),
)
