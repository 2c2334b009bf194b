"""The last lines of a run that failed: what ended it, and how to go on.

Ray reports a death early; the output of its workers goes on after that and hides it. This runs in the driver.
"""

import re
import sys
import time
from pathlib import Path

from openrlhf_pgrpo.host import resume

# If a process cannot be reached, its node may have died. Ray takes about 15 seconds to say so.
OUT_OF_REACH = re.compile("is (temporarily )?unavailable|[Cc]onnection (closed|reset|refused)")
PATIENCE = 30  # seconds

ROLES = {
    "RolloutRayActor": "a rollout engine (vLLM)",
    "PolicyModelActor": "a training rank of the policy",
    "ReferenceModelActor": "a rank of the reference model",
    "CriticModelActor": "a training rank of the critic",
    "RewardModelActor": "a rank of the reward model",
}


def install(checkpoints: Path) -> None:
    """Prints two lines after an error of Ray that ends this process. Call it when Ray has started.

    Args:
        checkpoints: the host's ckpt.path.
    """
    import ray

    hook, alive = sys.excepthook, {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def lost_nodes() -> list[str]:
        return [node["NodeName"] for node in ray.nodes() if node["NodeID"] in alive and not node["Alive"]]

    def last_words(kind, error, trace):
        hook(kind, error, trace)
        if isinstance(error, ray.exceptions.RayError):
            deadline = time.monotonic() + (PATIENCE if OUT_OF_REACH.search(str(error)) else 0)
            while not (lost := lost_nodes()) and time.monotonic() < deadline:
                time.sleep(0.2)
            ray.shutdown()  # the workers' output ends here
            words = f"the run has failed: {what_ended_it(str(error), lost)}\n[pgrpo] "
            words += how_to_go_on(checkpoints, died=bool(lost) or is_death(str(error)))
            print(f"[pgrpo] {words}", file=sys.stderr, flush=True)

    sys.excepthook = last_words


def what_ended_it(error: str, lost: list[str]) -> str:
    """One line: the node or process that died, or else the last line of `error`. `lost` are names of nodes."""
    if lost:
        return f"node {', '.join(lost)} died"
    if died := re.findall(r"class_name: (\w+)", error):
        reason = re.findall(r"Worker exit detail: (.*?\.)(?:\s|$)", error) or ["Ray says why above."]
        return f"{ROLES.get(died[-1], died[-1])} died. {reason[-1]}"
    return [line.strip() for line in error.splitlines() if line.strip()][-1]


def is_death(error: str) -> bool:
    """Whether a process died or was out of reach, which a second try may be spared; else code has raised an error."""
    return "class_name: " in error or OUT_OF_REACH.search(error) is not None


def how_to_go_on(checkpoints: Path, died: bool) -> str:
    """One line. An error that code has raised comes again, unless its cause is mended.

    Args:
        died: as `is_death`.
    """
    first = "" if died else "mend its cause first, or it comes again; then "
    folder = checkpoints / "_actor"
    try:
        tag = resume.latest(folder)
    except (ValueError, OSError) as error:
        return f"{first}{error}"
    if tag is None:
        return f"{first}start again: there is no complete checkpoint in {checkpoints}"
    return f"{first}resume from {tag} in {checkpoints}: the same command, with --ckpt.load_enable"
