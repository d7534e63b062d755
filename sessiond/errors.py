"""What can go wrong, in words for people.

Each message says what happened, to which thing, and what to do now. `bus` maps each class to one
D-Bus error name and `cli` to one exit code; both tables are complete by test.
"""


class SessiondError(Exception):
    """Base of all failures that are reported to a caller rather than logged as a fault."""


class NoSuchSession(SessiondError):
    """The session does not exist, or has just been closed."""


class NoSuchSnapshot(SessiondError):
    """The session has no snapshot of that name."""


class NoSuchProfile(SessiondError):
    """The configuration has no profile of that name."""


class SessionExists(SessiondError):
    """There is a session of that id, or at that mount point."""


class SnapshotExists(SessiondError):
    """The session already has a snapshot of that name."""


class Busy(SessiondError):
    """Another operation runs on the session; the message names it."""


class NotAuthorized(SessiondError):
    """The caller may not do this."""


class AuthorizationRequired(SessiondError):
    """The caller may do this after giving a password, for which it could not be asked."""


class NoSpace(SessiondError):
    """Storage of the session, or of the machine, is full."""


class InvalidName(SessiondError):
    """A session id, snapshot name or user name is malformed."""


class InvalidOption(SessiondError):
    """An option is unknown, or its value has the wrong type."""


class ImageUnavailable(SessiondError):
    """The image of the profile is missing, corrupt or of a kind that this machine cannot mount."""


class NotSupported(SessiondError):
    """The operation makes no sense for this session, or this machine cannot do it."""


class Cancelled(SessiondError):
    """The job was cancelled at someone's request."""


class Interrupted(SessiondError):
    """The job was undone because sessiond ended, or died, while it ran."""


class Unreachable(SessiondError):
    """The message bus, or the daemon on it, cannot be reached or does not answer."""


class Failed(SessiondError):
    """Anything else; the message carries the cause."""


class ConfigError(SessiondError):
    """The configuration cannot be used; the message names file, key and what is allowed."""
