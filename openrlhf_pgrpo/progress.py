"""What a command shows while it works: bars on stderr, if that is a terminal, and else nothing.

A bar is drawn once its work has taken two seconds, and then every second, even where nothing can be counted or a step
takes minutes.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
DELAY, EVERY = 2.0, 1.0  # seconds
TIME_ALONE = "{desc} ... {elapsed}"


@contextmanager
def progress(
    what: str, total: int | None = None, unit: str = "rows", done: int = 0
) -> Iterator[Callable[[int], object]]:
    """Shows `what` is being done during the block. Yields a function that counts.

    Args:
        total: the end of the count. None: nothing is counted, and the time alone is shown. done: where it begins.
    """
    from tqdm import tqdm  # not before the command has set TQDM_DISABLE

    shape: dict = {"total": total, "initial": done, "unit": f" {unit}", "leave": None}  # a bar inside another goes
    if total is None:
        shape = {"bar_format": TIME_ALONE, "leave": False}
    # Without smoothing the time to go follows from all that is done: like steps often come one after the other.
    with tqdm(desc=what, delay=DELAY, smoothing=0, disable=None, **shape) as bar:
        ended = threading.Event()
        clock = threading.Thread(target=_draw, args=(bar, ended), daemon=True)
        if not bar.disable:
            clock.start()
        try:
            yield bar.update
        finally:
            ended.set()
            if not bar.disable:
                clock.join()


def along(rows: Sequence[T], what: str, unit: str = "rows") -> Iterator[T]:
    """The rows, one after the other, with a bar that counts them."""
    with progress(what, len(rows), unit) as count:
        for row in rows:
            yield row
            count(1)


def _draw(bar, ended: threading.Event) -> None:
    wait = DELAY
    while not ended.wait(wait):
        bar.refresh()
        bar.last_print_t = bar._time()  # else the bar would not know at its end that it was drawn
        wait = EVERY
