"""One of our commands, `python tests/gpu/launcher.py train_dpo ...`, on a machine that may lack flash-attn, with its
time and memory written down: MEASURES names the file.

Nothing of training is replaced. Without flash-attn the host cannot be imported, so its names stand in, as they do on
a CPU. TORCH_ADAM takes PyTorch's AdamW, where DeepSpeed's cannot be compiled. DETERMINISTIC makes two runs equal.
"""

import atexit
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch
import wrapt

from openrlhf_pgrpo.host import doors
from openrlhf_pgrpo.host.cpu import patches

DOORS = {"train_dpo": doors.DPO, "train_rm": doors.RM, "serve_rm": doors.SERVE}


@wrapt.when_imported("openrlhf")
def without_flash_attn(host):
    patches.stand_in_for_flash_attn()


@wrapt.when_imported("openrlhf.utils.deepspeed.deepspeed_utils")
def without_a_compiler(module):
    if "TORCH_ADAM" in os.environ:
        patches.patch_optimizer(module)


@wrapt.when_imported("openrlhf.utils.deepspeed.deepspeed")
def measured(module):
    """Writes when each update was done, in seconds, and the most memory that this process has held, in bytes."""
    cuda, ends = torch.cuda.is_available(), []

    def step(update, _, args, kwargs):
        update(*args, **kwargs)
        if cuda:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    def write():
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB
        memory = torch.cuda.max_memory_allocated() if cuda else resident
        Path(os.environ["MEASURES"]).write_text(json.dumps({"ends": ends, "memory": memory}))

    wrapt.wrap_function_wrapper(module, "DeepspeedStrategy.optimizer_step", step)
    atexit.register(write)


if __name__ == "__main__":
    if "DETERMINISTIC" in os.environ:
        torch.use_deterministic_algorithms(True, warn_only=True)
    door = DOORS[sys.argv.pop(1)]
    door.run()
