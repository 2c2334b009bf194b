"""The door to the host's reward-model trainer."""

from openrlhf_pgrpo.host import look, single_process
from openrlhf_pgrpo.host.door import Door
from openrlhf_pgrpo.host.rm import flags
from openrlhf_pgrpo.host.rm.seams import SEAMS


def start(args) -> None:
    """Lets one process train without a launcher, and tells the host's factory what to build.

    Raises:
        ValueError: the model to start from does not fit the flags.
    """
    from openrlhf_pgrpo.host.rm import model  # torch: not before the environment is set

    single_process.allow()
    model.prepare(args)


RM = Door(
    script="openrlhf.cli.train_rm",
    own_flag="model.margin_loss_enable",
    seams=SEAMS,
    extend=flags.extend,
    check=flags.check,
    look=look.rm,
    start=start,
)
