"""vLLM's engine core, which vLLM starts in a Python of its own, with our hooks. Ray's setup hook does not reach it.

Light: that process imports this file before vLLM, because `start` comes first in what it is given to unpickle.
"""

import functools

import wrapt

from openrlhf_pgrpo.host import hooks

hooks.register({})


def start(run, **settings) -> None:
    run(**settings)


class StartsHooked(wrapt.ObjectProxy):
    """A context of multiprocessing, whose processes register our hooks before they import what they run."""

    def Process(self, *, target, **settings):
        return self.__wrapped__.Process(target=functools.partial(start, target), **settings)
