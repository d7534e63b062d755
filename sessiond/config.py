"""The configuration: one TOML file, and a directory of more that add to it or override it.

Everything a person may write is checked here, before anything is started. A mistake is a
`ConfigError` that names the file it is in, the key, and what is allowed there.
"""

from __future__ import annotations

import re
import string
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from sessiond.errors import ConfigError
from sessiond.keep_rules import RULES_LIMIT, checked_rule

DEFAULT_FILE = Path("/etc/sessiond/sessiond.toml")

NAME_LIMIT = 64
"""Longest name of a session, snapshot or profile, in characters."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""What such a name looks like: it becomes a file name, a D-Bus object path and a unit name."""

PATTERN_FIELDS = ("id", "user", "uid")
"""What may stand in braces in the pattern of a mount point, image or cgroup."""

# As many digits as are sure to make less than 2**63 bytes, which is what the kernel counts up to.
_BYTES = "[1-9][0-9]{0,17}|[1-9][0-9]{0,14}[Kk]|[1-9][0-9]{0,11}[Mm]|[1-9][0-9]{0,8}[Gg]"
_TERABYTES = "[1-9][0-9]{0,5}[Tt]"

_Key = tuple[str, ...]


def _absolute(path: Path) -> Path:
    if not path.is_absolute() or ".." in path.parts:
        raise ValueError("an absolute path without '..' is needed")
    if "\0" in str(path):
        raise ValueError("a path without NUL is needed")
    return path


def cgroup_path(path: str) -> str:
    """Return the path of a cgroup below the root of the hierarchy. Raises ValueError."""
    if "\0" in path or any(part in {"", ".", ".."} for part in path.split("/")):
        raise ValueError(
            "the path of a cgroup below the root of their hierarchy, without '..', is needed, like "
            "'user.slice/user-{uid}.slice'"
        )
    return path


def _name(text: str) -> str:
    if len(text) > NAME_LIMIT or not NAME.fullmatch(text):
        raise ValueError(
            f"a name is 1 to {NAME_LIMIT} letters, digits, '_', '.' and '-', "
            "beginning with a letter or digit"
        )
    return text


AbsolutePath = Annotated[Path, Field(strict=False), AfterValidator(_absolute)]
Name = Annotated[str, AfterValidator(_name)]
TIME_OF_DAY = "([01][0-9]|2[0-3]):[0-5][0-9]"
"""What a time of day looks like."""

DURATION = "[0-9]{1,4}(s|min|h|d)"
"""What a duration looks like; see `seconds`."""

Duration = Annotated[str, Field(pattern=f"^{DURATION}$")]
_Inodes = Annotated[int, Field(ge=64, lt=2**63)]


def _path_pattern(path: Path) -> Path:
    _check_fields(str(path))
    return path


def _names(value: object) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError("a name is needed, or a list of names")
    if not names:
        raise ValueError("at least one name is needed")
    return tuple(names)


_Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class DaemonTable(_Table):
    """`[daemon]`: where the daemon keeps what it must remember, and what all sessions may take."""

    state_directory: AbsolutePath = Path("/var/lib/sessiond")
    """Persistent sessions."""
    runtime_directory: AbsolutePath = Path("/run/sessiond")
    """Mounts, volatile sessions; emptied by a reboot."""
    volatile_limit: Annotated[
        str, Field(pattern=rf"^({_BYTES}|{_TERABYTES}|[1-9][0-9]{{0,5}}%|none)$")
    ] = "85%"
    """RAM that the limits of all volatile sessions may come to: bytes, or a part of the machine's;
    above 100% they may take more than there is.
    """
    metrics: AbsolutePath | None = None
    """File for Prometheus; none if not given."""


class SnapshotsTable(_Table):
    """`[profile.NAME.snapshots]`: which are made by themselves, and which are kept."""

    count: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """The newest so many."""
    daily: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """The last of each of so many days."""
    max_bytes: Annotated[str, Field(pattern=rf"^({_BYTES}|{_TERABYTES})$")] | None = None
    """What they may take beside what the merged view is built on: bytes with a suffix."""
    every: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,4}(min|h|d)$")] | None = None
    """Time from one automatic one to the next."""
    flatten_above: Annotated[int, Field(ge=0, le=200)] = 16
    """Layers of the merged view from which on they are merged; see `flattening`."""


class ResetTable(_Table):
    """`[profile.NAME.reset]`: when sessions are reset by themselves."""

    idle: Duration | None = None
    """Since their user was there last."""
    after: Duration | None = None
    """Since they were made or last reset."""
    daily: Annotated[str, Field(pattern=f"^{TIME_OF_DAY}$")] | None = None
    """By the machine's time zone."""
    warning: Duration = "60s"
    """For how long it is announced."""
    inhibit: Duration = "1h"
    """For how long it can be held back, by others than root."""
    terminate: bool = False
    """End the programs that use the session first."""
    grace: Annotated[str, Field(pattern="^([0-9]{1,2}|[1-5][0-9]{2}|600)s$")] = "10s"
    """How long they have for that."""


class Profile(_Table):
    """`[profile.NAME]`: a kind of session."""

    image: Annotated[AbsolutePath, AfterValidator(_path_pattern)]
    """A directory, or a squashfs, erofs or ext4 file; pattern."""
    verity_root_hash: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){16,64}$")] | None = None
    verity_hash_device: AbsolutePath | None = None
    """Where the hash tree is; the image file itself if not given."""
    image_changed: Literal["refuse", "discard", "rebase"] = "refuse"
    """See `sessiond.session.model.ImageChange`."""
    rebase_conflicts: Literal["keep", "drop", "save"] = "keep"
    """See `sessiond.overlay.rebase.Conflicts`."""
    storage: Literal["tmpfs", "persistent"] = "tmpfs"
    size: Annotated[str, Field(pattern=rf"^({_BYTES}|([1-9][0-9]?|100)%)$")] = "25%"
    """Limit of a tmpfs: bytes with a suffix, or a part of RAM."""
    inodes: _Inodes | None = None
    """Most files, directories and whiteouts of a tmpfs; one for 16 KiB of its size if not given."""
    quota: Annotated[str, Field(pattern=rf"^({_BYTES}|{_TERABYTES})$")] | None = None
    """Limit of a session on disk, also of one that is moved there: bytes with a suffix."""
    quota_inodes: _Inodes | None = None
    """Most files on disk, whiteouts included; with a quota, one for 16 KiB of it if not given."""
    keep: tuple[Annotated[str, AfterValidator(checked_rule)], ...] | None = None
    """What outlives resets; if not given, nothing, and nothing can be committed."""
    keep_quota: Annotated[str, Field(pattern=rf"^({_BYTES}|{_TERABYTES})$")] | None = None
    """Limit of what is kept for one user."""
    keep_quota_inodes: _Inodes | None = None
    """Most files kept, whiteouts included; with a keep_quota, one for 16 KiB of it if not given."""
    space_warning: Annotated[int, Field(ge=1, le=100)] = 80
    """Percent of bytes or inodes from which on the storage is reported to be filling up."""
    space_critical: Annotated[int, Field(ge=1, le=100)] = 95
    """Percent from which on it is reported to be nearly full."""
    mount_point: str | None = None
    """Pattern; `RUNTIME_DIRECTORY/sessions/{id}/root` if not given."""
    cgroup: str | None = None
    """Pattern; the programs there stand still while a snapshot is made."""
    nosuid: bool | None = None
    """Ignore setuid bits; if not given, for every user but root."""
    nodev: bool | None = None
    """Ignore device nodes; if not given, for every user but root."""

    data_path: Literal["passthrough", "cached", "plain"] = "passthrough"
    """See `sessiond.session.model.DataPath`."""
    reset: ResetTable = ResetTable()

    snapshots: SnapshotsTable = SnapshotsTable()

    @field_validator("mount_point")
    @classmethod
    def _pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            _check_fields(pattern)
            _absolute(Path(pattern))
            if len(Path(pattern).parts) < 2:  # pathlib keeps "//" apart from "/"
                raise ValueError("a directory below / is needed")
        return pattern

    @field_validator("cgroup")
    @classmethod
    def _cgroup(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            _check_fields(pattern)
            cgroup_path(pattern)
        return pattern

    @field_validator("size", "inodes")
    @classmethod
    def _limit(cls, limit: str | int | None, known: ValidationInfo) -> str | int | None:
        if known.data.get("storage") == "persistent":
            raise ValueError('that is for storage = "tmpfs"; on disk, quota and quota_inodes limit')
        return limit

    @field_validator("quota_inodes")
    @classmethod
    def _quota_inodes(cls, inodes: int | None, known: ValidationInfo) -> int | None:
        if inodes is not None and known.data.get("quota", "malformed") is None:
            raise ValueError("quota is needed with it")
        return inodes

    @field_validator("keep", mode="before")
    @classmethod
    def _keep(cls, rules: object) -> object:
        if isinstance(rules, list) and len(rules) > RULES_LIMIT:
            raise ValueError(f"at most {RULES_LIMIT} rules are allowed")
        return tuple(rules) if isinstance(rules, list) else rules

    @field_validator("keep_quota", "keep_quota_inodes")
    @classmethod
    def _keep_quota(cls, limit: str | int | None, known: ValidationInfo) -> str | int | None:
        if limit is not None and known.data.get("keep", ()) is None:
            raise ValueError("keep is needed with it")
        if isinstance(limit, int) and known.data.get("keep_quota", "malformed") is None:
            raise ValueError("keep_quota is needed with it")
        return limit

    @field_validator("space_critical")
    @classmethod
    def _critical(cls, percent: int, known: ValidationInfo) -> int:
        if percent < known.data.get("space_warning", 0):
            raise ValueError("it cannot be less than space_warning")
        return percent

    @field_validator("verity_hash_device")
    @classmethod
    def _hash_device(cls, device: Path | None, known: ValidationInfo) -> Path | None:
        if known.data.get("verity_root_hash", "malformed") is None:
            raise ValueError("verity_root_hash is needed with it")
        return device


class SessionTable(_Table):
    """`[session.ID]`: a session to be created at start."""

    user: Annotated[str, Field(min_length=1)]
    profile: str


class LoginTable(_Table):
    """`[login.NAME]`: the session of who logs in; of several that fit, the first counts.

    Who fits is in all that is given of `user`, `group` and `class`. Never root.
    """

    user: _Names | None = None
    """Names; if not given, all whose uid is that of a person or guest."""
    group: _Names | None = None
    """Names of groups, of which they are in one."""
    class_: Annotated[Literal["guest"] | None, Field(alias="class")] = None
    """Only those whose account was made on demand."""
    profile: str | None = None
    """None: no session."""
    otherwise: Literal["refuse", "unprotected"] = "refuse"
    """What becomes of the login if the session cannot be made."""


class GuestsTable(_Table):
    """`[guests]`: users that are made on demand, and removed with all that they own."""

    home: AbsolutePath = Path("/home")
    """Where their homes are made; only root may be able to write there."""
    skeleton: AbsolutePath = Path("/etc/skel")
    """What a home is a copy of."""
    shell: AbsolutePath = Path("/bin/bash")
    limit: Annotated[int, Field(ge=1, le=10_000)] = 16
    """Most of them at a time."""


class Config(_Table):
    """The whole configuration."""

    daemon: DaemonTable = DaemonTable()
    profile: dict[Name, Profile] = {}
    session: dict[Name, SessionTable] = {}
    login: dict[Name, LoginTable] = {}
    guests: GuestsTable = GuestsTable()


def _check_fields(pattern: str) -> None:
    allowed = ", ".join(f"{{{field}}}" for field in PATTERN_FIELDS)
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise ValueError(f"{error}; in braces may stand {allowed}") from None
    for _, field, specification, conversion in parts:
        if field is not None and (
            field not in PATTERN_FIELDS or specification or conversion is not None
        ):
            raise ValueError(f"{{{field}}} is unknown here; in braces may stand {allowed}")


def load(file: Path = DEFAULT_FILE, directory: Path | None = None) -> Config:
    """Read `file`, then each ``*.toml`` of `directory` in the order of their names.

    `directory` is ``NAME.conf.d`` beside ``NAME.toml`` if not given, and may be missing. Later
    files add tables, and override single keys. Raises `ConfigError`.
    """
    directory = file.with_suffix(".conf.d") if directory is None else directory
    merged = _Merged({}, {})
    for source in (file, *_drop_ins(directory)):
        merged.add(_read(source), source)
    try:
        config = Config.model_validate(merged.values)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentences(error, merged, file))) from None
    tables: dict[_Key, SessionTable | LoginTable] = {
        **{("session", name): table for name, table in config.session.items()},
        **{("login", name): table for name, table in config.login.items()},
    }
    for (kind, name), table in tables.items():
        profile = table.profile
        if profile is not None and profile not in config.profile:
            known = ", ".join(sorted(config.profile)) or "none"
            where = merged.file_of((kind, name, "profile"), file)
            raise ConfigError(
                f"{where}: {kind}.{name}.profile: there is no profile {profile!r}; "
                f"the profiles are: {known}."
            )
    return config


def _drop_ins(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == ".toml")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be read: {error.strerror}.") from None


def _read(file: Path) -> dict[str, object]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read: {error.strerror}. Write it, or name another with --config."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 at byte {error.start}.") from None
    except RecursionError:
        raise ConfigError(f"{file}: is nested too deeply.") from None
    except ValueError as error:  # also of numbers that are too long for Python
        raise ConfigError(f"{file}: is not valid TOML: {error}.") from None


@dataclass
class _Merged:
    """Values of all files, and which file each key, and each table first, came from."""

    values: dict[str, object]
    files: dict[_Key, Path]

    def add(self, values: Mapping[str, object], file: Path) -> None:
        self._merge(self.values, values, file, ())

    def _merge(
        self, target: dict[str, object], values: Mapping[str, object], file: Path, at: _Key
    ) -> None:
        for name, value in values.items():
            key = (*at, name)
            if isinstance(value, dict):
                self.files.setdefault(key, file)
                table = target.get(name)
                if not isinstance(table, dict):
                    table = target[name] = {}
                self._merge(table, value, file, key)
            else:
                self.files[key] = file
                target[name] = value

    def file_of(self, key: _Key, otherwise: Path) -> Path:
        while key:
            if key in self.files:
                return self.files[key]
            key = key[:-1]
        return otherwise


_TABLES: Mapping[str, type[_Table]] = {
    "daemon": DaemonTable,
    "profile": Profile,
    "session": SessionTable,
    "login": LoginTable,
    "guests": GuestsTable,
}


_DURATION = "a duration is like '90s', '10min', '2h' or '1d'"


def _sentences(error: ValidationError, merged: _Merged, file: Path) -> Iterable[str]:
    for details in error.errors(include_url=False):
        key = tuple(str(part) for part in details["loc"] if part != "[key]")
        yield f"{merged.file_of(key, file)}: {'.'.join(key)}: {_what_is_allowed(details, key)}."


_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def seconds(duration: str) -> int:
    """Return how long `duration`, as it stands in the configuration, is."""
    number = duration.rstrip("mindhs")
    return int(number) * _SECONDS[duration.removeprefix(number)]


_SUBTABLES: Mapping[str, type[_Table]] = {"reset": ResetTable, "snapshots": SnapshotsTable}
"""Of a profile."""


def _keys(table: type[_Table]) -> list[str]:
    return [field.alias or name for name, field in table.model_fields.items()]


def _table_of(key: _Key) -> type[_Table]:
    """Return the table that `key` is written in."""
    if key[0] == "profile" and len(key) > 3:
        return _SUBTABLES.get(key[2], Profile)
    return _TABLES[key[0]] if len(key) > 1 else Config


_PATTERNS: Mapping[str, str] = {
    "size": "a size is like '512M', '2G', or a part of RAM like '50%'",
    "quota": "a quota is like '512M' or '20G'",
    "keep_quota": "a quota is like '512M' or '20G'",
    "max_bytes": "a size is like '512M' or '20G'",
    "every": "a time is like '30min', '1h' or '7d'",
    "volatile_limit": "a limit is like '4G', a part of RAM like '85%', or 'none'",
    "verity_root_hash": "a root hash is 32 to 128 lower-case hexadecimal digits",
    "idle": _DURATION,
    "after": _DURATION,
    "warning": _DURATION,
    "inhibit": _DURATION,
    "daily": "a time of day is like '04:00'",
    "grace": "it is from '0s' to '600s'",
}
"""What is allowed in keys that have a form."""


def _what_is_allowed(details: ErrorDetails, key: _Key) -> str:
    match details["type"]:
        case "extra_forbidden":
            return f"is unknown; allowed are: {', '.join(_keys(_table_of(key)))}"
        case "missing":
            return "is missing"
        case "value_error":
            return str(details["ctx"]["error"])
        case "path_type":
            return "an absolute path without '..' is needed"
        case "string_pattern_mismatch":
            return _PATTERNS[key[-1]]
        case _:
            return details["msg"][0].lower() + details["msg"][1:]
