"""Records as files, read with distrust; `durable` is what writes them.

What is read may be anything: a disk can fail, and a person can make mistakes.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from sessiond.session.model import RECORD_FORMAT, JobRecord, SessionRecord

_R = TypeVar("_R", bound=BaseModel)

_LIMIT = 16 << 20
"""Bytes; some ten thousand snapshots fit."""


class BadRecordError(Exception):
    """The file is no record; the message says why, and is a part of a sentence."""


class NewerFormatError(Exception):
    """The record was written by a later version of sessiond."""


class _Format(BaseModel):
    """What a record of any format has."""

    format: int


def read_session(file: Path) -> SessionRecord:
    """Return the record in `file`. Raises `BadRecordError`, `NewerFormatError`, `OSError`."""
    text = _read(file)
    try:
        version = _Format.model_validate_json(text).format
        if version > RECORD_FORMAT:
            raise NewerFormatError(
                f"{file} has format {version}, and this sessiond knows formats up to "
                f"{RECORD_FORMAT}; use the sessiond that wrote it."
            )
        return SessionRecord.model_validate_json(text)
    except ValidationError as error:
        raise BadRecordError(_first_mistake(error)) from None


def read_job(file: Path) -> JobRecord:
    """Return the job in `file`. Raises `BadRecordError`, `OSError`."""
    return read(file, JobRecord)


def read(file: Path, kind: type[_R]) -> _R:
    """Return the record in `file`. Raises `BadRecordError`, `OSError`."""
    try:
        return kind.model_validate_json(_read(file))
    except ValidationError as error:
        raise BadRecordError(_first_mistake(error)) from None


def fsync_directory(directory: Path) -> None:
    """Return when the names in `directory` are on disk. Raises `OSError`."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(file: Path) -> bytes:
    """Return the contents of a file that only root can have written."""
    try:
        # What waits for others, such as a FIFO, is not waited for.
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO, errno.ENODEV}:
            raise BadRecordError("it is no regular file") from None
        raise
    with open(fd, "rb") as stream:
        inode = os.fstat(fd)
        if not stat.S_ISREG(inode.st_mode):
            raise BadRecordError("it is no regular file")
        if inode.st_uid not in {0, os.geteuid()}:
            raise BadRecordError(f"it belongs to uid {inode.st_uid}, and not to root")
        text = stream.read(_LIMIT + 1)
    if len(text) > _LIMIT:
        raise BadRecordError(f"it has more than {_LIMIT} bytes")
    return text


def _first_mistake(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
