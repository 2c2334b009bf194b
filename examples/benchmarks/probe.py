"""The plug-in of the runs of `step_time.py`: answers of equal length, and a clock on the add-on's own code.

Every process that loads it registers all hooks. A hook runs only in a process that imports its module.
"""

import json
import os
import time
from functools import partial

import wrapt


@wrapt.when_imported("openrlhf.trainer.ppo_utils.samples_generator")
def equal_lengths(module):
    module.SamplingParams = partial(module.SamplingParams, ignore_eos=True)


@wrapt.when_imported("openrlhf_pgrpo.host.ppo.experience_maker")
def clock_advantages(module):
    def compute(wrapped, _maker, args, kwargs):
        began = time.perf_counter()
        experiences = wrapped(*args, **kwargs)
        write("advantages", time.perf_counter() - began)
        return experiences

    wrapt.wrap_function_wrapper(module, "PreferenceExperienceMaker.compute_advantages_and_returns", compute)


@wrapt.when_imported("openrlhf_pgrpo.host.ppo.metrics")
def clock_log(module):
    def step(wrapped, _log, args, kwargs):
        the_hosts, *rest = args
        inside = []

        def clocked(*args, **kwargs):
            began = time.perf_counter()
            result = the_hosts(*args, **kwargs)
            inside.append(time.perf_counter() - began)
            return result

        began = time.perf_counter()
        result = wrapped(clocked, *rest, **kwargs)
        write("log", time.perf_counter() - began - sum(inside))
        return result

    wrapt.wrap_function_wrapper(module, "StepLog.step", step)


def write(part: str, seconds: float) -> None:
    with open(os.environ["STEP_TIME_PROBE"], "a") as file:
        file.write(json.dumps({"part": part, "seconds": seconds}) + "\n")
