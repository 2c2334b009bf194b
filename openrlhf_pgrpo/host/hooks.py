"""How we get into a host that has no plug-in mechanism. Light: it runs in every Ray worker and imports nothing heavy.

The host trains in Ray actors that import it afresh, so a patch made in the driver alone is silently lost there.
Instead, every process registers post-import hooks (wrapt) on the modules that *define* what we replace: the driver in
`Door.activate`, before it imports the host, and every Ray worker in `ppo.worker.setup`, which Ray calls first. A hook
checks the shape of its seam and then hands over to short files, most of them in the door's folder.
"""

import importlib
import inspect
import os
import sys
from typing import NamedTuple

import wrapt

from openrlhf_pgrpo.host.cpu import patches
from openrlhf_pgrpo.host.versions import HOST_VERSIONS, SeamError
from openrlhf_pgrpo.models import remote_code

DEVICE = "OPENRLHF_PGRPO_DEVICE"  # environment variable: gpu or cpu, chosen once by the driver


class Seam(NamedTuple):
    """A place of the host that we replace: the functions it must have, with parameters, and what replaces them."""

    contract: dict[str, tuple[str, ...]]
    installs: tuple[str, ...]  # each "package.module:function", called with the host's module, in this order


def register(seams: dict[str, Seam]) -> None:
    """Registers the hooks of this process; `seams` maps modules of the host to seams. A second call changes nothing.

    Raises:
        SeamError: one of these modules was imported before, or hooks for others were registered.
    """
    if register.done is not None:
        if not seams.keys() <= register.done.keys():
            raise SeamError("openrlhf_pgrpo opens one door a process, got a second one: start another process for it")
        return
    hooks = [(name, _hook(seam)) for name, seam in seams.items()]
    hooks += remote_code.HOOKS.items()
    if os.environ[DEVICE] == "cpu":
        hooks += patches.PATCHES.items()
        patches.import_faster()
    for name, _ in hooks:
        # The package itself may be imported: `python -m` imports the parents of the host's script before it runs it.
        if name.startswith("openrlhf.") and name in sys.modules:
            raise SeamError(f"openrlhf_pgrpo needs to come before the host, got {name} already imported")
    register.done = seams
    for name, hook in hooks:  # those of modules that were imported run at once, and may ask again
        wrapt.register_post_import_hook(hook, name)


register.done = None  # what was registered, by the host's module


def _hook(seam: Seam):
    def check_and_install(module) -> None:
        for path, expected in seam.contract.items():
            check_contract(module, path, expected)
        for install in seam.installs:
            where, function = install.split(":")
            getattr(importlib.import_module(where), function)(module)

    return check_and_install


def check_contract(module, path: str, expected: tuple[str, ...]) -> None:
    """Raises SeamError unless `path` in `module` is a function with the parameters `expected`, by name and order."""
    found = module
    for name in path.split("."):
        found = getattr(found, name, None)
    parameters = tuple(inspect.signature(found).parameters) if callable(found) else None
    if parameters and parameters[-1] == "_ray_trace_ctx":  # ray.remote adds it to all methods of a class, in place
        parameters = parameters[:-1]
    if parameters != expected:
        raise SeamError(
            f"openrlhf_pgrpo needs {module.__name__}.{path}({', '.join(expected)}), found "
            f"{'nothing callable' if parameters is None else '(' + ', '.join(parameters) + ')'}: install one of the "
            f"hosts it was tested with, openrlhf {', '.join(HOST_VERSIONS)}"
        )
