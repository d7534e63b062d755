"""The exit codes of sessionctl: one table, complete by test, documented in docs/sessionctl.md.

Codes of failures come from `EXIT_CODES`; DAMAGED and REPAIRED are what a check comes to.
"""

from __future__ import annotations

from enum import IntEnum

from sessiond import errors
from sessiond.errors import SessiondError


class ExitCode(IntEnum):
    """How a run of sessionctl ended."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    NOT_AUTHORIZED = 4
    BUSY = 5
    NO_SPACE = 6
    UNREACHABLE = 7
    EXISTS = 8
    IMAGE_UNAVAILABLE = 9
    NOT_SUPPORTED = 10
    CANCELLED = 11
    INTERRUPTED = 12
    DAMAGED = 13
    REPAIRED = 14


EXIT_CODES: dict[type[SessiondError], ExitCode] = {
    errors.NoSuchSession: ExitCode.NOT_FOUND,
    errors.NoSuchSnapshot: ExitCode.NOT_FOUND,
    errors.NoSuchProfile: ExitCode.NOT_FOUND,
    errors.SessionExists: ExitCode.EXISTS,
    errors.SnapshotExists: ExitCode.EXISTS,
    errors.Busy: ExitCode.BUSY,
    errors.NotAuthorized: ExitCode.NOT_AUTHORIZED,
    errors.AuthorizationRequired: ExitCode.NOT_AUTHORIZED,
    errors.NoSpace: ExitCode.NO_SPACE,
    errors.InvalidName: ExitCode.USAGE,
    errors.InvalidOption: ExitCode.USAGE,
    errors.ImageUnavailable: ExitCode.IMAGE_UNAVAILABLE,
    errors.NotSupported: ExitCode.NOT_SUPPORTED,
    errors.Cancelled: ExitCode.CANCELLED,
    errors.Interrupted: ExitCode.INTERRUPTED,
    errors.Unreachable: ExitCode.UNREACHABLE,
    errors.ConfigError: ExitCode.FAILED,
    errors.Failed: ExitCode.FAILED,
}


def exit_code(error: SessiondError) -> ExitCode:
    """Return the exit code that reports `error`."""
    return EXIT_CODES.get(type(error), ExitCode.FAILED)
