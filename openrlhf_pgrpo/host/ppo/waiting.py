"""What a rollout waits for, if nothing has come back for minutes: a reward function that never returns says nothing.

The host waits for its engines with `ray.wait` in turns of ten seconds. Here that one call, in that one module, also
looks at the clock; so there is no thread. Remove it once the host says what it waits for.
"""

import time
from collections import Counter

import wrapt

PATIENCE = 180.0  # seconds without a finished prompt before the first line; each next line waits twice as long
MOST_PREF_GROUPS = 8


def install(module) -> None:
    """Lets `SamplesGenerator` say what it waits for. `module` is the host's samples_generator."""
    watch = Watch()

    def dispatch(wrapped, generator, args, kwargs):
        refs = wrapped(*args, **kwargs)
        watch.sent(args[0] if args else kwargs["prompts"], refs)
        return refs

    wrapt.wrap_function_wrapper(module, "SamplesGenerator._dispatch_prompts_to_vllm", dispatch)
    module.ray = WatchedRay(module.ray, watch)


class WatchedRay(wrapt.ObjectProxy):
    """The module `ray` whose `wait` tells a `Watch` what it saw."""

    def __init__(self, ray, watch):
        super().__init__(ray)
        self._self_watch = watch

    def wait(self, refs, **kwargs):
        ready, pending = self.__wrapped__.wait(refs, **kwargs)
        self._self_watch.looked(ready, pending)
        return ready, pending


class Watch:
    """Prints a line if no prompt has come back for PATIENCE seconds, and again at growing intervals."""

    def __init__(self, clock=time.monotonic):
        self.clock, self.prompts = clock, {}
        self._restart()

    def sent(self, prompts, refs) -> None:
        """`refs` are what the engines will answer to `prompts`."""
        if not self.prompts:
            self._restart()
        self.prompts.update(zip(refs, prompts))

    def looked(self, ready, pending) -> None:
        """`ready` have come back, `pending` have not."""
        if ready:
            for ref in ready:
                self.prompts.pop(ref, None)
            self._restart()
            return
        waited = self.clock() - self.since
        if pending and waited >= self.patience:
            self.patience *= 2
            print(self._line([self.prompts[ref] for ref in pending if ref in self.prompts], waited), flush=True)

    def _restart(self) -> None:
        self.since, self.patience = self.clock(), PATIENCE

    @staticmethod
    def _line(prompts, waited: float) -> str:
        of_group = Counter(getattr(prompt, "pref_group", None) for prompt in prompts).most_common()
        shown = ", ".join(f"{group!r} ({count})" for group, count in of_group[:MOST_PREF_GROUPS] if group is not None)
        more = f" and {len(of_group) - MOST_PREF_GROUPS} more" if len(of_group) > MOST_PREF_GROUPS else ""
        began = time.strftime("%H:%M:%S", time.localtime(time.time() - waited))
        first = str(prompts[0]) if prompts else ""
        return (
            f"[pgrpo] still waiting for {len(prompts)} prompts"
            + (f" of the preference groups {shown}{more}" if shown else "")
            + f": none has come back since {began}, {waited / 60:.0f} minutes ago. The first is {first[-77:]!r}. "
            "Either answers are long, or a reward function, server or agent does not return"
        )
