"""What a program in a session sees of a full upper: an error where it writes, and never less."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys

import pytest
import trio

from sessiond.session.model import DataPath
from tests.space.conftest import Machine, fill
from tests.support.waiting import until

SIZE = 4 << 20

MAP_AND_WRITE = """
import mmap, os, sys
file = os.open(sys.argv[1], os.O_RDWR)
pages = mmap.mmap(file, 0)
for position in range(0, len(pages), 4096):
    pages[position] = 1
pages.flush()
"""


@pytest.fixture(params=DataPath)
def data_path(request: pytest.FixtureRequest, machine: Machine) -> DataPath:
    path: DataPath = request.param
    if f"datapath-{path}" not in machine.mounter.features:
        pytest.skip(f"this machine has no data path {path}")
    machine.profiles["volatile"] |= {"data_path": path.value, "size": f"{SIZE}"}
    return path


async def test_writing_says_that_there_is_no_space(machine: Machine, data_path: DataPath) -> None:
    async with machine.manager() as manager:
        view = (await manager.create("root", "volatile", session_id="s")).mount_point
        file = os.open(view / "file", os.O_RDWR | os.O_CREAT)
        written = 0
        error = 0
        while not error:
            try:
                written += os.write(file, bytes(100_000))
            except OSError as refused:
                error = refused.errno or 0
        assert error == errno.ENOSPC
        os.close(file)  # nothing is left to be told here
        assert SIZE - (1 << 17) <= written <= SIZE
        assert (view / "file").stat().st_size == written
        assert (view / "file").read_bytes() == bytes(written)
        with pytest.raises(OSError, match="No space left"):
            (view / "file2").write_bytes(bytes(SIZE))
        (view / "file").unlink()
        # With `cached`, when the kernel says that it has forgotten the file.
        await until(lambda: shutil.disk_usage(view).free >= SIZE // 2)
        (view / "file").write_bytes(bytes(SIZE // 2))


async def test_df_shows_the_limit(machine: Machine, data_path: DataPath) -> None:
    async with machine.manager() as manager:
        session = await manager.create("root", "volatile", session_id="s")
        (session.mount_point / "file").write_bytes(bytes(SIZE // 2))
        inside = os.statvfs(session.mount_point)
        usage = session.usage
        assert inside.f_blocks * inside.f_frsize == usage.bytes_limit == SIZE
        assert (inside.f_blocks - inside.f_bavail) * inside.f_frsize == usage.bytes_used
        assert SIZE // 2 <= usage.bytes_used < SIZE
        assert inside.f_files == usage.inodes_limit == 200
        assert inside.f_files - inside.f_favail == usage.inodes_used
        listed = await trio.run_process(
            ["df", "--output=avail", "-B1", session.mount_point], capture_stdout=True
        )
        assert int(listed.stdout.split()[-1]) == usage.bytes_limit - usage.bytes_used


async def test_preallocation(machine: Machine, data_path: DataPath) -> None:
    async with machine.manager() as manager:
        view = (await manager.create("root", "volatile", session_id="s")).mount_point
        with open(view / "file", "w+b") as file:
            if data_path is DataPath.PLAIN:  # glibc writes to each block, then
                os.posix_fallocate(file.fileno(), 0, SIZE // 2)
            with pytest.raises(OSError, match="No space left"):
                os.posix_fallocate(file.fileno(), 0, 2 * SIZE)


async def test_a_mapping(machine: Machine, data_path: DataPath) -> None:
    """The kernel has the layer's own pages only by passthrough, and can refuse one of them."""
    async with machine.manager() as manager:
        view = (await manager.create("root", "volatile", session_id="s")).mount_point
        with open(view / "sparse", "wb") as file:
            file.truncate(SIZE // 2)
        fill(view, "bytes")
        ended = await trio.run_process(
            [sys.executable, "-c", MAP_AND_WRITE, view / "sparse"],
            check=False,
            capture_stderr=True,
        )
        if data_path is DataPath.PASSTHROUGH:
            assert ended.returncode == -signal.SIGBUS
        else:
            assert b"No space left on device" in ended.stderr  # msync(2)
        assert (view / "sparse").stat().st_size == SIZE // 2


async def test_sessions_do_not_feel_each_other(machine: Machine, data_path: DataPath) -> None:
    machine.mount_run(size="1M")
    async with machine.manager() as manager:
        full = await manager.create("root", "volatile", session_id="full")
        other = await manager.create("root", "volatile", session_id="other")
        run = os.statvfs(machine.runtime)
        for what in ("bytes", "inodes"):
            fill(full.mount_point, what)
        assert os.statvfs(machine.runtime).f_bfree == run.f_bfree
        assert os.statvfs(machine.runtime).f_ffree == run.f_ffree
        (other.mount_point / "file").write_bytes(bytes(SIZE // 2))
