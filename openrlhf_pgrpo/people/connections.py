"""Connections to the page: only so many, and none that stays without a request. uvicorn has no such limits."""

from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from openrlhf_pgrpo.host.serve.patience import Patience

MOST = 256  # connections; a browser has six. Beyond that, those that ask for nothing give way.
MOST_AT_ONCE = 100  # are taken at a time, so that many at once do not push out one whose request is about to be read
PATIENCE = 10.0  # seconds for a request to arrive


class Connection(Patience, H11Protocol):
    """uvicorn's HTTP, with an end to connections that send no whole request, or do not read what they are sent."""

    def seconds(self) -> float:
        return PATIENCE

    def end(self) -> None:
        self.transport.abort()  # close() would wait until the other side has read everything

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.began = self.loop.time()
        if len(self.connections) > MOST:
            waiting = [one for one in self.connections if one.waits]  # this one does
            first = min(waiting, key=lambda one: (one.cycle is not None, one.began))  # never asked, then the oldest
            self.connections.discard(first)
            first.transport.abort()
