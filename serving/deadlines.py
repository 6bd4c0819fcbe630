"""Connections that keep the service waiting are closed.

uvicorn has a timeout for idle connections between two requests, but none for a connection that never sends a request,
sends one a byte at a time, or does not read the answer.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.config import ServiceSettings

BYTES_PER_SECOND = 65_536
"""A body that arrives at least this fast may take as long as it needs."""
HEAD, BODY, REST, READING = "head", "body", "rest of a refused body", "reading the answer"


def protocol_with_deadlines(settings: ServiceSettings) -> type[H11Protocol]:
    """A class for uvicorn's setting `http`."""

    class DeadlineProtocol(H11Protocol):
        """Knows what it waits for, and since when.

        h11 says at any time whose turn it is. While it is the client's, one timer runs; it starts anew only when the
        client has done its part, so that single bytes gain no time.
        """

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self.timer: asyncio.TimerHandle | None = None
            self.awaited: tuple[str, object] | None = None
            self.since = 0.0
            self.received = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                transport.abort()
                return
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self.received += len(data)
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._watch()

        def _awaits(self) -> str | None:
            """What the client owes; None while the service works."""
            if self.flow.write_paused or self._is_flushing():
                return READING
            if self.transport.is_closing():
                return None
            if self.conn.their_state is h11.IDLE:
                return HEAD
            if self.conn.their_state is h11.SEND_BODY:
                return REST if self.cycle.response_complete else BODY
            return None

        def _is_flushing(self) -> bool:
            """The connection is to be closed as soon as the client has read the rest."""
            return self.transport.is_closing() and self.transport.get_write_buffer_size() > 0

        def _watch(self) -> None:
            """Start the timer if the client owes something new, and stop it if it owes nothing."""
            awaits = self._awaits()
            # the same debt in a later request is a new one
            awaited = None if awaits is None else (awaits, self.cycle)
            if awaited == self.awaited:
                return
            self._cancel_timer()
            self.awaited = awaited
            if awaits is not None:
                self.since = self.loop.time()
                self.received = 0
                self._start_timer(self._allowed())

        def _allowed(self) -> float:
            """Seconds that the client has from `since` on."""
            assert self.awaited
            awaits = self.awaited[0]
            if awaits == READING:
                return settings.answer_seconds
            if awaits == BODY:
                return settings.body_seconds + self.received / BYTES_PER_SECOND
            return settings.head_seconds

        def _start_timer(self, seconds: float) -> None:
            self.timer = self.loop.call_later(seconds, self._time_is_up)

        def _cancel_timer(self) -> None:
            self.awaited = None
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

        def _time_is_up(self) -> None:
            if self.flow.read_paused:
                self.since = self.loop.time()  # it is the service that does not read
            left = self.since + self._allowed() - self.loop.time()
            if left > 0:
                self._start_timer(left)
            else:
                # close() would wait for a client that does not read
                self.transport.abort()

    return DeadlineProtocol
