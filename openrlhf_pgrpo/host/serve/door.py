"""The door to the host's reward server."""

import sys

from openrlhf_pgrpo.host import look
from openrlhf_pgrpo.host.door import Door
from openrlhf_pgrpo.host.flags import flatten, set_flags
from openrlhf_pgrpo.host.serve import flags
from openrlhf_pgrpo.host.serve.seams import SEAMS
from openrlhf_pgrpo.host.user_flags import set_user_flags


def start(args) -> None:
    """Serves a factorized model until it is stopped, then ends the process. The host's script serves any other model.

    Raises:
        ValueError: a profile that does not fit, or our flags for a plain model.
    """
    from openrlhf_pgrpo.host.user_rewards import factorized_folder  # torch: not before the environment is set

    folder = factorized_folder(args.reward.model_name_or_path, args.reward.chat_template)
    if folder is not None:
        from openrlhf_pgrpo.host.serve.server import serve  # the host's script: it is imported for this alone

        serve(args, folder)
        sys.exit()
    flat = flatten(args)
    if given := [*set_user_flags(flat), *set_flags(flags.add_texts, flat)]:
        raise ValueError(
            f"--{', --'.join(given)} needs a factorized reward model in --reward.model_name_or_path, got a plain one: "
            "name a factorized one or leave the flags out"
        )


SERVE = Door(
    script="openrlhf.cli.serve_rm",
    own_flag="reward.model_name_or_path",
    seams=SEAMS,
    extend=flags.extend,
    check=lambda args: None,
    look=look.serve,
    start=start,
    trains=False,
)
