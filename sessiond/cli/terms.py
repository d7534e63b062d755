"""The values that sessiond publishes (docs/dbus.md), in words for people.

Tables of messages, for those whom the present locale stands for. In JSON and in what is typed,
values are the same for everybody.
"""

from __future__ import annotations

from rich.cells import cell_len

from sessiond.cli.exit_codes import ExitCode
from sessiond.words import _, pgettext


class Terms(dict[str, str]):
    """Words by values. A value that is not known here, of another release's daemon, is a word."""

    def __missing__(self, value: str) -> str:
        return value

    @property
    def width(self) -> int:
        """The columns of a terminal that the longest takes."""
        return max(map(cell_len, self.values()))


STORAGES = Terms(
    tmpfs=pgettext("storage", "tmpfs"),
    persistent=pgettext("storage", "persistent"),
)
SESSION_STATES = Terms(
    starting=pgettext("session", "starting"),
    active=pgettext("session", "active"),
    busy=pgettext("session", "busy"),
    inactive=pgettext("session", "inactive"),
    failed=pgettext("session", "failed"),
    closing=pgettext("session", "closing"),
)
SPACE_LEVELS = Terms(
    normal=pgettext("space", "normal"),
    warning=pgettext("space", "warning"),
    critical=pgettext("space", "critical"),
)
RESET_REASONS = Terms(
    scheduled=pgettext("reset", "scheduled"),
    after=pgettext("reset", "after"),
    daily=pgettext("reset", "daily"),
    idle=pgettext("reset", "idle"),
)
OPERATIONS = Terms(
    {
        "reset": pgettext("operation", "reset"),
        "restore": pgettext("operation", "restore"),
        "persist": pgettext("operation", "persist"),
        "rebase": pgettext("operation", "rebase"),
        "maintenance": pgettext("operation", "maintenance"),
        "export": pgettext("operation", "export"),
        "import": pgettext("operation", "import"),
        "commit": pgettext("operation", "commit"),
    }
)
JOB_STATES = Terms(
    running=pgettext("job", "running"),
    succeeded=pgettext("job", "succeeded"),
    failed=pgettext("job", "failed"),
)
CHANGE_KINDS = Terms(
    added=pgettext("change", "added"),
    contents=pgettext("change", "contents"),
    metadata=pgettext("change", "metadata"),
    deleted=pgettext("change", "deleted"),
    type=pgettext("change", "type"),
    renamed=pgettext("change", "renamed"),
)
FILE_TYPES = Terms(
    file=pgettext("type", "file"),
    directory=pgettext("type", "directory"),
    symlink=pgettext("type", "symlink"),
    other=pgettext("type", "other"),
    none=pgettext("type", "removed"),
)
"""Of what a session has; `none` if it has removed what its image has."""
OUTCOMES = Terms(
    kept=pgettext("outcome", "kept"),
    dropped=pgettext("outcome", "dropped"),
    saved=pgettext("outcome", "saved"),
)
"""Of a rebase, for what both a session and its image have changed."""
SEVERITIES = Terms(
    error=_("error"),
    warning=_("warning"),
    note=_("note"),
)

_EXIT_CODES = {
    ExitCode.OK: pgettext("exit code", "ok"),
    ExitCode.FAILED: pgettext("exit code", "failed"),
    ExitCode.USAGE: pgettext("exit code", "usage"),
    ExitCode.NOT_FOUND: pgettext("exit code", "not found"),
    ExitCode.NOT_AUTHORIZED: pgettext("exit code", "not authorized"),
    ExitCode.BUSY: pgettext("exit code", "busy"),
    ExitCode.NO_SPACE: pgettext("exit code", "no space"),
    ExitCode.UNREACHABLE: pgettext("exit code", "unreachable"),
    ExitCode.EXISTS: pgettext("exit code", "exists"),
    ExitCode.IMAGE_UNAVAILABLE: pgettext("exit code", "image unavailable"),
    ExitCode.NOT_SUPPORTED: pgettext("exit code", "not supported"),
    ExitCode.CANCELLED: pgettext("exit code", "cancelled"),
    ExitCode.INTERRUPTED: pgettext("exit code", "interrupted"),
    ExitCode.DAMAGED: pgettext("exit code", "damaged"),
    ExitCode.REPAIRED: pgettext("exit code", "repaired"),
}


def exit_code_meaning(code: ExitCode) -> str:
    """Return what a code says of a run of sessionctl."""
    return _EXIT_CODES[code]
