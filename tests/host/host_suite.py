"""Runs the host's own tests with the seams of all doors in place. `python host_suite.py REPORT`, in its own process.

Those tests load most modules by file path, under names of their own, where no import hook sees them. So the seams go
into whatever is loaded from a file of the host. A module that several doors change gets the changes of all of them,
one around the other.

REPORT is a JSON file:

    outcomes   how many tests ended how
    replaced   module of the host -> for each time it was loaded, the names that our seams replaced in it
    stock      modules that also ran without all of these
    planted    the same, after one ran without
"""

import importlib
import importlib.metadata
import json
import os
import runpy
import sys
from collections import Counter, defaultdict
from functools import cache
from importlib.machinery import SourceFileLoader

import pytest
import wrapt

from openrlhf_pgrpo.host import doors, hooks, script
from openrlhf_pgrpo.host.cpu import launch

SEAMS = defaultdict(list)  # module of the host -> what installs our seams there
for door in (doors.PPO, doors.DPO, doors.RM, doors.SERVE):
    for name, seam in door.seams.items():
        SEAMS[name] += [install for install in seam.installs if install not in SEAMS[name]]
FILES = {os.path.realpath(script.path_of(name)): name for name in SEAMS}
# A test of the host cuts `evaluate` out of these files and runs it alone, where no seam can be.
CUT_FROM = {"openrlhf.trainer.dpo_trainer", "openrlhf.trainer.rm_trainer"}

outcomes, executed, replaced = Counter(), Counter(), defaultdict(list)


@cache
def host_module(file: str) -> str | None:
    """The module with seams that a file holds; None for any other file."""
    return FILES.get(os.path.realpath(file))


def execute(exec_module, loader, args, kwargs) -> None:
    """Every loader of a Python file does this, for an import and for a path."""
    exec_module(*args, **kwargs)
    if name := host_module(loader.path):
        (module,) = args
        before = contents(module)
        for install in SEAMS[name]:
            where, function = install.split(":")
            getattr(importlib.import_module(where), function)(module)
        replaced[name].append(sorted(key for key, value in contents(module).items() if value is not before.get(key)))


def contents(module) -> dict[str, object]:
    """What a module and its own classes hold, by name."""
    found = dict(vars(module))
    own = [value for value in found.values() if isinstance(value, type) and value.__module__ == module.__name__]
    return found | {f"{cls.__name__}.{name}": value for cls in own for name, value in vars(cls).items()}


def witness(event: str, arguments: tuple) -> None:
    """An audit hook. It also sees what runs where no seam is."""
    if event == "exec" and (name := host_module(arguments[0].co_filename)):
        executed[name] += 1


def stock() -> list[str]:
    """Modules of the host that ran without a seam, or with less of it than when they were imported."""
    return [
        name
        for name, found in replaced.items()
        if not found[0] or found != found[:1] * (len(found) if name in CUT_FROM else executed[name])
    ]


class Outcomes:
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            outcomes[report.outcome] += 1


def main(path: str) -> None:
    os.environ.update({hooks.DEVICE: "cpu", **launch.environment()})
    hooks.register({})  # what is ours besides seams
    sys.addaudithook(witness)
    wrapt.wrap_function_wrapper(SourceFileLoader, "exec_module", execute)
    for name in SEAMS:
        importlib.import_module(name)  # now: the tests put mocks in the places of what these import
    tests = [str(file.locate()) for file in importlib.metadata.files("openrlhf") if file.match("tests/test_*.py")]
    words = ["-q", "-c", os.devnull, "--rootdir", os.curdir, "-p", "no:cacheprovider"]
    pytest.main([*words, *tests], plugins=[Outcomes()])
    report = {"outcomes": outcomes, "replaced": replaced, "stock": stock()}
    runpy.run_path(str(script.path_of("openrlhf.datasets.utils")))
    with open(path, "w") as file:
        json.dump({**report, "planted": stock()}, file)


if __name__ == "__main__":
    main(sys.argv[1])
