"""An end to connections that send no whole request. uvicorn waits for ever for the first request of a connection, and
for the rest of a head. The reward server and the page of `openrlhf-pgrpo elicit` do not.
"""

from typing import Any


class Patience:
    """Comes before a protocol of uvicorn among the bases of a class."""

    def seconds(self) -> float:
        """How long a request may take to arrive."""
        raise NotImplementedError

    def end(self) -> None:
        """Ends the connection."""
        raise NotImplementedError

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.watch = self.loop.call_later(self.seconds(), self._look, None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.watch.cancel()
        super().connection_lost(exc)

    @property
    def waits(self) -> bool:
        """Whether the server has nothing to do for it."""
        return self.cycle is None or self.cycle.response_complete

    def _look(self, earlier: Any) -> None:
        """Ends the connection unless a request came since `earlier`, or is being answered."""
        if self.waits and self.cycle is earlier:
            self.end()
        else:
            self.watch = self.loop.call_later(self.seconds(), self._look, self.cycle)
