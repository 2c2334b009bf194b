"""Connections to the page: only so many, and none that stays without a request. uvicorn has no such limits."""

from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 128  # connections; a browser has six. Beyond that, those that ask for nothing give way.
MOST_AT_ONCE = 16  # are taken at a time, so that many at once do not push out one whose request is about to be read
PATIENCE = 10.0  # seconds for a request to arrive


class Connection(H11Protocol):
    """uvicorn's HTTP, with an end to connections that send no whole request, or do not read what they are sent."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.began = self.loop.time()
        self.watch = self.loop.call_later(PATIENCE, self._look, None)
        if len(self.connections) > MOST:
            waiting = [one for one in self.connections if one.waits]  # this one does
            first = min(
                waiting, key=lambda one: (one.cycle is not None, one.began)
            )  # one that never asked, the oldest
            self.connections.discard(first)
            first.transport.abort()

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
            self.transport.abort()  # close() would wait until the other side has read everything
        else:
            self.watch = self.loop.call_later(PATIENCE, self._look, self.cycle)
