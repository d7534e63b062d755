"""sessiond as a desktop program sees it: its objects, which are followed, and calls to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

from gi.repository import Gio, GLib, GObject

from sessiond.desktop.state import Job, Published, Session, Snapshot

BUS = "org.sessiond.Overlay1"
ROOT_PATH = "/org/sessiond/Overlay1"
MANAGER = f"{BUS}.Manager"
_INTERFACES: dict[type[Published], str] = {
    Session: f"{BUS}.Session",
    Snapshot: f"{BUS}.Snapshot",
    Job: f"{BUS}.Job",
}

_P = TypeVar("_P", bound=Published)

CALL_TIMEOUT = 330_000
"""Milliseconds: a person may be asked for a password, for which sessiond waits 300 seconds."""


class Failure(NamedTuple):
    """Why something did not succeed."""

    name: str
    """The D-Bus error name; empty if the bus itself could not be spoken to."""
    text: str
    """What the daemon said, or else the bus."""

    @classmethod
    def of(cls, error: GLib.Error) -> Failure:
        """Return what an error of Gio's stands for."""
        name = Gio.DBusError.get_remote_error(error) or ""
        return cls(name, error.message.removeprefix(f"GDBus.Error:{name}: "))


class Daemon(GObject.Object):
    """The daemon, on the bus or not.

    `changed` is emitted once for all that came at the same time: objects that appeared, went away
    or have other properties, or the daemon itself. Whoever listens looks at all anew.
    """

    __gsignals__: ClassVar = {"changed": (GObject.SignalFlags.RUN_FIRST, None, ())}

    def __init__(self) -> None:
        super().__init__()
        self.failure: Failure | None = None
        """Why there is nothing to be seen, if there is no bus, or the daemon does not answer."""
        self._connection: Gio.DBusConnection | None = None
        self._objects: Gio.DBusObjectManagerClient | None = None
        self._telling = False

    def start(self) -> None:
        """Begin to follow it, or begin again; `changed` says that something is known."""
        self.failure = None
        self._objects = None
        Gio.bus_get(Gio.BusType.SYSTEM, None, self._connected)

    @property
    def known(self) -> bool:
        """Whether it is known what there is: the daemon's objects, or that it is not there."""
        return self._objects is not None or self.failure is not None

    @property
    def present(self) -> bool:
        """Whether it is on the bus, and its objects are known."""
        return self._objects is not None and self._objects.get_name_owner() is not None

    def session(self, path: str) -> Session | None:
        """Return the session at an object path, or None if it is not there."""
        return self._read(Session, path)

    def snapshot(self, path: str) -> Snapshot | None:
        """Return the snapshot at an object path, or None if it is not there."""
        return self._read(Snapshot, path)

    def job(self, path: str) -> Job | None:
        """Return the job at an object path, or None if it is not there."""
        return self._read(Job, path)

    def sessions(self) -> list[Session]:
        """Return all sessions."""
        if self._objects is None:
            return []
        paths = (found.get_object_path() for found in self._objects.get_objects())
        return [session for path in paths if (session := self.session(path))]

    def call(
        self,
        target: Published,
        method: str,
        arguments: GLib.Variant,
        done: Callable[..., None],
        failed: Callable[[Failure], None],
    ) -> None:
        """Call a method; `done` gets what it returns, `failed` why it did not.

        Who has to give a password for it is asked.
        """
        interface = _INTERFACES[type(target)]
        self._call(target.path, interface, method, arguments, done, failed)

    def call_for_descriptor(
        self,
        target: Published,
        method: str,
        arguments: GLib.Variant,
        done: Callable[[int], None],
        failed: Callable[[Failure], None],
    ) -> None:
        """Call a method that returns a descriptor, which becomes the caller's to close."""

        def answered(connection: Gio.DBusConnection, result: Gio.AsyncResult) -> None:
            try:
                answer, descriptors = connection.call_with_unix_fd_list_finish(result)
                descriptor = descriptors.get(answer.get_child_value(0).get_handle())
            except GLib.Error as error:
                failed(Failure.of(error))
            else:
                done(descriptor)

        if self._connection is None:
            failed(self.failure or Failure("", ""))
            return
        self._connection.call_with_unix_fd_list(
            BUS,
            target.path,
            _INTERFACES[type(target)],
            method,
            arguments,
            None,
            Gio.DBusCallFlags.ALLOW_INTERACTIVE_AUTHORIZATION,
            CALL_TIMEOUT,
            None,
            None,
            answered,
        )

    def read_anew(
        self, session: Session, done: Callable[[Session], None], failed: Callable[[Failure], None]
    ) -> None:
        """Ask for all properties of a session, also for those that are not announced."""

        def answered(properties: dict[str, Any]) -> None:
            done(Session.of(session.path, properties))

        interface = "org.freedesktop.DBus.Properties"
        arguments = GLib.Variant("(s)", (_INTERFACES[Session],))
        self._call(session.path, interface, "GetAll", arguments, answered, failed)

    def on_signal(self, interface: str, member: str, heard: Callable[..., None]) -> None:
        """Have `heard` called with the object path and values of a signal, from now on.

        The daemon has to have been known before.
        """
        assert self._connection is not None

        def received(*signal: Any) -> None:
            _connection, _sender, path, _interface, _member, values = signal
            heard(path, *values.unpack())

        self._connection.signal_subscribe(
            BUS, interface, member, None, None, Gio.DBusSignalFlags.NONE, received
        )

    def _call(
        self,
        path: str,
        interface: str,
        method: str,
        arguments: GLib.Variant,
        done: Callable[..., None],
        failed: Callable[[Failure], None],
    ) -> None:
        def answered(connection: Gio.DBusConnection, result: Gio.AsyncResult) -> None:
            try:
                answer = connection.call_finish(result)
            except GLib.Error as error:
                failed(Failure.of(error))
            else:
                done(*answer.unpack())

        if self._connection is None:
            failed(self.failure or Failure("", ""))
            return
        self._connection.call(
            BUS,
            path,
            interface,
            method,
            arguments,
            None,
            Gio.DBusCallFlags.ALLOW_INTERACTIVE_AUTHORIZATION,
            CALL_TIMEOUT,
            None,
            answered,
        )

    def _connected(self, _source: object, result: Gio.AsyncResult) -> None:
        try:
            connection = Gio.bus_get_finish(result)
        except GLib.Error as error:
            self._fail(Failure.of(error))
            return
        if connection is not self._connection:
            # A window that just vanishes when the bus does would tell nobody why.
            connection.set_exit_on_close(False)
            connection.connect("closed", self._disconnected)
            self._connection = connection
        Gio.DBusObjectManagerClient.new(
            connection,
            Gio.DBusObjectManagerClientFlags.NONE,
            BUS,
            ROOT_PATH,
            callback=self._listed,
        )

    def _listed(self, _source: object, result: Gio.AsyncResult) -> None:
        try:
            objects = Gio.DBusObjectManagerClient.new_finish(result)
        except GLib.Error as error:
            self._fail(Failure.of(error))
            return
        for signal in (
            "object-added",
            "object-removed",
            "interface-proxy-properties-changed",
            "notify::name-owner",
        ):
            objects.connect(signal, self._changed)
        self._objects = objects
        self._changed()

    def _disconnected(self, *_signal: object) -> None:
        self._connection = None
        self._fail(Failure("org.freedesktop.DBus.Error.Disconnected", ""))

    def _fail(self, failure: Failure) -> None:
        self.failure = failure
        self._objects = None
        self._changed()

    def _changed(self, *_signal: object) -> None:
        if not self._telling:
            self._telling = True
            GLib.idle_add(self._tell)

    def _tell(self) -> bool:
        self._telling = False
        self.emit("changed")
        return bool(GLib.SOURCE_REMOVE)

    def _read(self, kind: type[_P], path: str) -> _P | None:
        if self._objects is None:
            return None
        proxy = self._objects.get_interface(path, _INTERFACES[kind])
        if proxy is None:
            return None
        properties = {
            name: value.unpack()
            for name in proxy.get_cached_property_names() or ()
            if (value := proxy.get_cached_property(name)) is not None
        }
        return kind.of(path, properties)
