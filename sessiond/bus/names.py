"""The names of the D-Bus contract: the bus name, interfaces, object paths and errors."""

from __future__ import annotations

import string

from sessiond import errors
from sessiond.errors import SessiondError
from sessiond.session.model import SessionId, SnapshotName

BUS = "org.sessiond.Overlay1"

MANAGER = f"{BUS}.Manager"
SESSION = f"{BUS}.Session"
SNAPSHOT = f"{BUS}.Snapshot"
JOB = f"{BUS}.Job"

ROOT_PATH = "/org/sessiond/Overlay1"

DBUS = "org.freedesktop.DBus"
DBUS_PATH = "/org/freedesktop/DBus"
INTROSPECTABLE = f"{DBUS}.Introspectable"
OBJECT_MANAGER = f"{DBUS}.ObjectManager"
PEER = f"{DBUS}.Peer"
PROPERTIES = f"{DBUS}.Properties"
EMITS_CHANGED_SIGNAL = f"{DBUS}.Property.EmitsChangedSignal"

ERRORS: dict[type[SessiondError], str] = {
    errors.NoSuchSession: f"{BUS}.Error.NoSuchSession",
    errors.NoSuchSnapshot: f"{BUS}.Error.NoSuchSnapshot",
    errors.NoSuchProfile: f"{BUS}.Error.NoSuchProfile",
    errors.SessionExists: f"{BUS}.Error.SessionExists",
    errors.SnapshotExists: f"{BUS}.Error.SnapshotExists",
    errors.Busy: f"{BUS}.Error.Busy",
    errors.NotAuthorized: f"{BUS}.Error.NotAuthorized",
    errors.AuthorizationRequired: f"{DBUS}.Error.InteractiveAuthorizationRequired",
    errors.NoSpace: f"{BUS}.Error.NoSpace",
    errors.InvalidName: f"{BUS}.Error.InvalidName",
    errors.InvalidOption: f"{BUS}.Error.InvalidOption",
    errors.ImageUnavailable: f"{BUS}.Error.ImageUnavailable",
    errors.NotSupported: f"{BUS}.Error.NotSupported",
    errors.Cancelled: f"{BUS}.Error.Cancelled",
    errors.Interrupted: f"{BUS}.Error.Interrupted",
    errors.Unreachable: f"{BUS}.Error.Unreachable",
    errors.Failed: f"{BUS}.Error.Failed",
    errors.ConfigError: f"{BUS}.Error.ConfigError",
}
"""The D-Bus error name of each failure; complete by test."""

UNKNOWN_OBJECT = f"{DBUS}.Error.UnknownObject"
UNKNOWN_INTERFACE = f"{DBUS}.Error.UnknownInterface"
UNKNOWN_METHOD = f"{DBUS}.Error.UnknownMethod"
UNKNOWN_PROPERTY = f"{DBUS}.Error.UnknownProperty"
PROPERTY_READ_ONLY = f"{DBUS}.Error.PropertyReadOnly"
INVALID_ARGUMENTS = f"{DBUS}.Error.InvalidArgs"
INCONSISTENT_MESSAGE = f"{DBUS}.Error.InconsistentMessage"
LIMITS_EXCEEDED = f"{DBUS}.Error.LimitsExceeded"
ACCESS_DENIED = f"{DBUS}.Error.AccessDenied"
DBUS_FAILED = f"{DBUS}.Error.Failed"

_PLAIN = frozenset(string.ascii_letters + string.digits)


def error_name(error: SessiondError) -> str:
    """Return the D-Bus error name of `error`, or of the nearest of its classes that has one."""
    for kind in type(error).__mro__:
        if kind in ERRORS:
            return ERRORS[kind]
    return ERRORS[errors.Failed]


def session_path(session: SessionId) -> str:
    """Return the object path of a session."""
    return f"{ROOT_PATH}/session/{escape(session)}"


def snapshot_path(session: SessionId, snapshot: SnapshotName) -> str:
    """Return the object path of a session's snapshot."""
    return f"{session_path(session)}/snapshot/{escape(snapshot)}"


def job_path(number: int) -> str:
    """Return the object path of a job."""
    return f"{ROOT_PATH}/job/{number}"


def job_of(path: str) -> int | None:
    """Return the number of the job whose object path that is, or None if it is no job's."""
    _, prefix, number = path.partition(f"{ROOT_PATH}/job/")
    return int(number) if prefix and number.isdecimal() else None


def escape(label: str) -> str:
    """Return `label` as one element of an object path, as sd_bus_path_encode(3) writes it."""
    if not label:
        return "_"
    head = label[0] if label[0] in string.ascii_letters else _hex(label[0])
    return head + "".join(c if c in _PLAIN else _hex(c) for c in label[1:])


def session_of(path: str) -> str:
    """Return the id of the session that an object path belongs to, or an empty string."""
    _, prefix, rest = path.partition(f"{ROOT_PATH}/session/")
    return unescape(rest.partition("/")[0]) if prefix else ""


def unescape(element: str) -> str:
    """Return the label that `escape` made `element` of."""
    if element == "_":
        return ""
    plain, *escaped = element.split("_")
    octets = plain.encode() + b"".join(
        bytes.fromhex(part[:2]) + part[2:].encode() for part in escaped
    )
    return octets.decode(errors="surrogateescape")


def _hex(character: str) -> str:
    octets = character.encode(errors="surrogateescape")
    return "".join(f"_{octet:02x}" for octet in octets)
