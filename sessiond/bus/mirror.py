"""A copy of what the daemon's objects are, kept up to date by its signals.

    async with mirror(client) as copy:
        while True:
            show(copy.sessions())
            await copy.next_change()

Properties that change without a signal, such as how full a session is, are as of the last
`refresh`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress

from sessiond.bus import names
from sessiond.bus.client import Client, Events, JobInfo, ManagerInfo, SessionInfo, validated
from sessiond.errors import NoSuchSession

UNANNOUNCED = ("BytesUsed", "InodesUsed")
"""Properties of sessions that change without a signal."""

_Properties = dict[str, object]


class Mirror:
    """All objects of the daemon, as of the last signal that was read."""

    def __init__(self, client: Client, events: Events) -> None:
        self._client = client
        self._events = events
        self._objects: dict[str, dict[str, _Properties]] = {}

    async def read(self) -> None:
        """Ask for everything.

        Signals that were sent before the answer are read after it: they repeat how it came about,
        and end with the same.
        """
        manager = await self._client.property_values()
        self._objects = await self._client.managed_objects()
        self._objects[self._client.path] = {names.MANAGER: manager}

    async def refresh(self, sessions: Iterable[str]) -> None:
        """Ask for what no signal tells of these sessions; those that have ended are passed over."""
        for session_id in sessions:
            session = self._client.session_named(session_id)
            with suppress(NoSuchSession):
                values = await session.property_values()
                # Of the rest, a signal may have told newer values while the answer waited.
                told = {name: values[name] for name in UNANNOUNCED if name in values}
                self._update(session.path, names.SESSION, told)

    async def next_change(self) -> None:
        """Read one signal. Raises `Unreachable` when the daemon has ended."""
        event = await anext(self._events)
        match (event.interface, event.member, event.arguments):
            case (names.PROPERTIES, "PropertiesChanged", (str(interface), dict(changed), _)):
                self._update(event.path, interface, changed)
            case (names.OBJECT_MANAGER, "InterfacesAdded", (str(path), dict(interfaces))):
                self._objects[path] = interfaces
            case (names.OBJECT_MANAGER, "InterfacesRemoved", (str(path), _)):
                self._objects.pop(path, None)

    def _update(self, path: str, interface: str, changed: _Properties) -> None:
        """Note what has changed of an object, unless it is gone."""
        known = self._objects.get(path, {}).get(interface)
        if known is not None:
            known |= changed

    def manager(self) -> ManagerInfo:
        """Return the properties of the manager."""
        return validated(ManagerInfo, self._objects[self._client.path][names.MANAGER])

    def sessions(self) -> list[SessionInfo]:
        """Return all sessions, by their ids."""
        found = [
            validated(SessionInfo, interfaces[names.SESSION])
            for interfaces in self._objects.values()
            if names.SESSION in interfaces
        ]
        return sorted(found, key=lambda info: info.id)

    def last_job(self, session: SessionInfo) -> JobInfo | None:
        """Return the job that runs on a session, or else ran last; None if none did."""
        job = self._objects.get(session.last_job)
        return None if job is None else validated(JobInfo, job[names.JOB])


@asynccontextmanager
async def mirror(client: Client) -> AsyncIterator[Mirror]:
    """Yield a copy of what there is now. Raises `Unreachable` when the daemon is not on the bus."""
    async with client.events() as events:
        copy = Mirror(client, events)
        await copy.read()
        yield copy
