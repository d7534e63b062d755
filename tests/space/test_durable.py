"""A small file is replaced on a full disk, and nothing is lost where it cannot be."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from sessiond.overlay import syscalls
from sessiond.session import durable
from tests.space.conftest import Machine, fill


@pytest.fixture(params=["tmpfs", "ext4"])
def small(request: pytest.FixtureRequest, machine: Machine) -> Machine:
    if request.param == "tmpfs":
        machine.mount_run(size="1M")
        machine.state = machine.runtime
    else:
        machine.mount_disk("ext4", "-m", "0", size="8M")
    return machine


def test_replacing_takes_no_space(small: Machine) -> None:
    file = small.state / "file"
    durable.replace(file, b"x" * 3000)
    assert file.read_bytes().rstrip(b"\n") == b"x" * 3000
    fill(small.state, "bytes")
    fill(small.state, "inodes")
    # More than twice as long as at first, and less than what is there for it.
    for text in (b"y" * 3000, b"z" * 6000, b"", b"u" * 7000, b"w" * 8192):
        durable.replace(file, text)
        assert file.read_bytes().rstrip(b"\n") == text
        assert durable.spare_of(file).stat().st_blocks == file.stat().st_blocks == 16


def test_what_does_not_fit_changes_nothing(small: Machine) -> None:
    file = small.state / "file"
    durable.replace(file, b"x" * 3000)
    fill(small.state, "bytes")
    with pytest.raises(OSError, match="No space left") as refused:
        durable.replace(file, b"y" * 9000)
    assert refused.value.errno == errno.ENOSPC
    assert file.read_bytes().rstrip(b"\n") == b"x" * 3000
    durable.replace(file, b"z")
    assert file.read_bytes().rstrip(b"\n") == b"z"


def test_both_have_the_same_room(small: Machine) -> None:
    file = small.state / "file"
    for length in (10, 9000, 10, 50_000, 10):
        durable.replace(file, b"x" * length)
        assert durable.spare_of(file).stat().st_size == file.stat().st_size >= 2 * length
    fill(small.state, "bytes")
    for length in (100_000, 50_000, 100_000):
        durable.replace(file, b"x" * length)


@pytest.mark.parametrize("blocks", range(9))
def test_a_disk_that_gets_full_meanwhile_changes_nothing(small: Machine, blocks: int) -> None:
    file, room = small.state / "file", small.state / "room"
    durable.replace(file, b"x")
    room.write_bytes(bytes(4096 * blocks))
    fill(small.state, "bytes")
    room.unlink()
    try:
        durable.replace(file, b"y" * 9000)
    except OSError:
        assert file.read_bytes().rstrip(b"\n") == b"x"
        durable.replace(file, b"z" * 100)
        durable.replace(file, b"z" * 200)
        assert blocks < 8


def test_the_first_one_needs_space_for_the_next(small: Machine) -> None:
    fill(small.state, "bytes")
    with pytest.raises(OSError, match="No space left"):
        durable.replace(small.state / "file", b"x")
    assert not (small.state / "file").exists()


@pytest.mark.parametrize("call", ["rename", "write", "fsync", "fsync_directory"])
@pytest.mark.parametrize("at", range(4))
def test_what_fails_has_changed_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: int
) -> None:
    file = tmp_path / "file"
    durable.replace(file, b"before")
    original, calls = getattr(syscalls, call), 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(syscalls, call, failing)
        try:
            durable.replace(file, b"after")
        except OSError:
            assert file.read_bytes().rstrip() == b"before"
        else:
            assert calls <= at
            assert file.read_bytes().rstrip() == b"after"
