"""What would go wrong with a training command? Reads its words as a shell would, and takes the look that its door
takes before anything heavy starts, and a longer one: the tokens of the rows are made and counted. The look runs in a
process of its own, with the environment that the words give it.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

from openrlhf_pgrpo.host import flags, script

DOORS = {"train_ppo_ray": "PPO", "train_dpo": "DPO", "train_rm": "RM", "serve_rm": "SERVE"}
EXAMPLE = "python -m openrlhf_pgrpo.cli.train_ppo_ray --actor.model_name_or_path ..."
# Where a shell ends the words of a command. shlex has taken the quotes off: '<|im_end|>' is a value.
ENDS = re.compile(r"&&|\|[|&]?|;|&|(&|\d*)[<>]{1,3}[^<>]*")
ANSWER = "ANSWER "


class Command(NamedTuple):
    """A training command, taken apart.

    Attributes:
        script: name of the host's script. argv: the words that reach it. environment: variables that the words set,
            and WORLD_SIZE, how many processes the launcher starts. own: whether it is our module.
    """

    script: str
    argv: list[str]
    environment: dict[str, str]
    own: bool


def read_command(text: str) -> Command:
    """Takes the text of a command apart.

    Raises:
        ValueError: an open quotation, or no script of the host among the words.
    """
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise ValueError(f"--like needs the words of a command, got an open end ({error}): close it") from error
    place = next((place for place, word in enumerate(words) if _script(word)), None)
    if place is None:
        raise ValueError(
            f"--like needs a command that starts one of {', '.join(DOORS)}, such as {EXAMPLE!r}, got {text.strip()!r}"
        )
    before, after = words[:place], words[place + 1 :]
    end = next((number for number, word in enumerate(after) if ENDS.fullmatch(word)), len(after))
    own = "openrlhf_pgrpo" in words[place]
    environment = dict(word.split("=", 1) for word in before if re.match(r"[A-Za-z_]\w*=", word))
    environment |= _launched(before)
    return Command(_script(words[place]), after[:end], environment, own)


def _script(word: str) -> str | None:
    """The script of the host that a word names, as a module or a file."""
    module = ".".join(PurePath(word).parts).removesuffix(".py") if word.endswith(".py") else word
    package, _, name = module.rpartition(".cli.")
    return name if name in DOORS and package.split(".")[-1] in ("openrlhf", "openrlhf_pgrpo") else None


def _launched(words: Sequence[str]) -> dict[str, str]:
    """Variables that a launcher sets, read from its words."""
    programs = {PurePath(word).name for word in words}
    if "job" in words and "submit" in words:  # the job will run on that cluster
        return {"RAY_ADDRESS": _option(words, "--address") or "auto"}
    if "deepspeed" in programs:
        if included := _option(words, "--include", "-i"):
            slots = [host.partition(":")[2] for host in included.split("@")]
            return {"WORLD_SIZE": str(sum(len(slot.split(",")) for slot in slots))}
        per_node, nodes = _option(words, "--num_gpus"), _option(words, "--num_nodes")
    elif programs & {"torchrun", "torch.distributed.run", "torch.distributed.launch"}:
        per_node = _option(words, "--nproc_per_node", "--nproc-per-node") or "1"
        nodes = _option(words, "--nnodes")
    else:
        return {}
    each = int(per_node) if (per_node or "").isdigit() else _gpus_here()
    return {"WORLD_SIZE": str(each * int((nodes or "1").split(":")[0]))}


def _option(words: Sequence[str], *names: str) -> str | None:
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else next(iter(words[number + 1 :]), None)
    return None


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count() or 1


def sentences(command: Command) -> list[str]:
    """What there is to say of a command.

    Raises:
        ValueError: what would go wrong with it, and what to do.
    """
    module = f"openrlhf.cli.{command.script}"
    ours = any(flag in word for word in command.argv for flag in ("pgrpo", "--robust.", f"--{flags.PREF_GROUP_KEY}"))
    if not command.own and ours and not script.is_patched(module):
        raise ValueError(
            f"our flags need python -m openrlhf_pgrpo.cli.{command.script}, got the host's own {module}, which is not "
            "patched: type ours, or run openrlhf-pgrpo patch"
        )
    code = f"from {__name__} import print_look; print_look()"
    ended = subprocess.run(
        [sys.executable, "-c", code, DOORS[command.script], *command.argv],
        env={**os.environ, **command.environment},
        capture_output=True,
        text=True,
    )
    answers = [line.removeprefix(ANSWER) for line in ended.stdout.splitlines() if line.startswith(ANSWER)]
    if ended.returncode == 0 and answers:
        return json.loads(answers[0])
    said = ended.stderr.strip() or f"it ended with code {ended.returncode}"
    refused = said.rpartition(": error: ")[2] if ": error: " in said else said.splitlines()[-1]
    raise ValueError(re.sub(r"\s+", " ", refused))


def print_look() -> None:
    """Runs in a process of its own, whose words are the name of a door and those of the command."""
    import datasets

    from openrlhf_pgrpo.host import doors

    datasets.disable_caching()  # of what is made of rows: a run with another strategy makes it again
    datasets.disable_progress_bars()
    door, argv = getattr(doors, sys.argv[1]), sys.argv[2:]
    print(ANSWER + json.dumps(door.seen(argv)))
