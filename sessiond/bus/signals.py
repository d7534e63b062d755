"""Listening to signals: which ones are wanted, and the queue of those that came."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from sessiond.bus.wire import Message
from sessiond.errors import Unreachable

SIGNALS_AT_ONCE = 10_000
"""Signals that wait for a slow listener before it is told that it has lost some."""


@dataclass(frozen=True, slots=True)
class Match:
    """Which signals of `sender`, a bus name, are wanted; what is empty matches all."""

    sender: str
    path: str = ""
    path_namespace: str = ""
    interface: str = ""
    member: str = ""
    arg0: str = ""

    def rule(self) -> str:
        """Return the match rule as the bus reads it."""
        keys = ("sender", "path", "path_namespace", "interface", "member", "arg0")
        pairs = [f"{key}='{getattr(self, key)}'" for key in keys if getattr(self, key)]
        return ",".join(["type='signal'", *pairs])

    def accepts(self, message: Message) -> bool:
        """Tell whether path, interface and member of a signal match."""
        return (
            self.path in ("", message.path)
            and self.interface in ("", message.interface)
            and self.member in ("", message.member)
            and (
                self.path_namespace in ("", message.path)
                or message.path.startswith(f"{self.path_namespace}/")
            )
        )


class Signals:
    """The signals that a `Match` accepts, in order.

    Iteration raises `Unreachable` when the sender has left the bus, or the listener was too slow.
    """

    def __init__(self, match: Match) -> None:
        self._match = match
        self._owner = ""
        self._failure = Unreachable(f"{match.sender} has left the bus.")
        self._sink, self._source = trio.open_memory_channel[Message](SIGNALS_AT_ONCE)

    def __aiter__(self) -> Signals:
        return self

    async def __anext__(self) -> Message:
        try:
            return await self._source.receive()
        except trio.EndOfChannel:
            raise self._failure from None

    def follow(self, owner: str) -> None:
        """Accept signals of this unique name from now on, the owner of the sender's name.

        The bus lets anyone send us a signal that looks like one of the sender's, but puts its true
        unique name on it.
        """
        self._owner = owner

    def owner_changed(self, name: str, new_owner: str) -> None:
        """End the iteration when the sender's name has passed to another, or to nobody."""
        if name == self._match.sender and self._owner and new_owner != self._owner:
            self._sink.close()

    def offer(self, message: Message) -> None:
        """Keep a signal for the listener when it is a wanted one."""
        if message.sender != self._owner or not self._match.accepts(message):
            return
        try:
            self._sink.send_nowait(message)
        except trio.WouldBlock:
            self._failure = Unreachable(
                f"More than {SIGNALS_AT_ONCE} signals came before they were read: some are lost."
            )
            self._sink.close()
        except trio.ClosedResourceError:
            return  # The listener is told the reason once it has read what came before.

    def close(self) -> None:
        """Forget what has not been read."""
        self._sink.close()
        self._source.close()
