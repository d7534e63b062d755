"""systemd-logind, asked whether users are there."""

from __future__ import annotations

from sessiond.bus import names
from sessiond.bus.connection import connect
from sessiond.bus.wire import BusError
from sessiond.errors import Failed, NotSupported
from sessiond.session.model import Uid
from sessiond.session.presence import Attendance

_BUS = "org.freedesktop.login1"
_PATH = "/org/freedesktop/login1"
_MANAGER = f"{_BUS}.Manager"
_USER = f"{_BUS}.User"
_NO_SUCH_USER = f"{_BUS}.NoSuchUser"
_PRESENT = frozenset({"active", "online"})


class LogindPresence:
    """Implements `Presence`, over a connection of its own for each question: they are few."""

    def __init__(self, address: str | None = None) -> None:
        """`address` of the bus is the system bus's unless given."""
        self._address = address

    async def attendance(self, uid: Uid) -> Attendance:
        try:
            values = await self._properties(uid)
        except BusError as error:
            if error.name == _NO_SUCH_USER:
                return Attendance(logged_in=False)
            raise NotSupported(
                f"systemd-logind, which knows whether users are idle, does not tell: {error.text}"
            ) from error
        # Others are logging out, or have left only programs behind.
        if values.get("State") not in _PRESENT:
            return Attendance(logged_in=False)
        idle, since = values.get("IdleHint"), values.get("IdleSinceHintMonotonic")
        if not isinstance(idle, bool) or not isinstance(since, int):
            raise Failed("The answer of systemd-logind is not understood.")
        return Attendance(logged_in=True, idle_since=since / 1e6 if idle else None)

    async def _properties(self, uid: Uid) -> dict[str, object]:
        async with connect(self._address) as bus:
            (user,) = await bus.call(_BUS, _PATH, _MANAGER, "GetUser", "u", uid)
            (values,) = await bus.call(_BUS, str(user), names.PROPERTIES, "GetAll", "s", _USER)
        assert isinstance(values, dict)
        return values
