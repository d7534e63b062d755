"""Sessions on disk with a quota: the file system's own, which nothing gets round."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from sessiond.errors import NoSpace, NotSupported
from sessiond.session import quota
from sessiond.session.model import Quota, SessionState, StorageKind
from tests.space.conftest import ROOT, Machine, fill, reset, settled
from tests.support.mounts import detach
from tests.support.waiting import until

PROJECT_QUOTA = ("-O", "quota,project", "-E", "quotatype=prjquota", "-I", "256")
LIMIT = Quota(bytes=4 << 20, inodes=100)


@pytest.fixture
def limited(machine: Machine) -> Machine:
    """A machine with an ext4 that counts projects, and profiles with quotas."""
    limits = {"quota": "4M", "quota_inodes": 100}
    machine.profiles["lasting"] |= limits
    machine.profiles["volatile"] |= limits
    try:
        machine.mount_disk("ext4", *PROJECT_QUOTA, size="32M", options="loop,prjquota")
    except subprocess.CalledProcessError:
        pytest.skip("this kernel lacks CONFIG_QFMT_V2")
    return machine


def df(path: Path) -> tuple[int, int]:
    """Return the bytes and inodes that there are, in use or not."""
    found = os.statvfs(path)
    return found.f_blocks * found.f_frsize, found.f_files


@pytest.mark.parametrize("what", ["bytes", "inodes"])
@pytest.mark.parametrize("data_path", ["passthrough", "cached", "plain"])
async def test_a_session_cannot_take_more(limited: Machine, what: str, data_path: str) -> None:
    limited.profiles["lasting"]["data_path"] = data_path
    async with limited.manager() as manager:
        session = await manager.create("root", "lasting", session_id="s")
        other = await manager.create("root", "lasting", session_id="other")
        assert df(session.mount_point) == (LIMIT.bytes, LIMIT.inodes)
        (session.mount_point / "kept").write_bytes(bytes(1 << 20))
        await session.snapshots.make("first")  # counts as well
        fill(session.mount_point, what)
        usage = session.usage
        assert (usage.bytes_limit, usage.inodes_limit) == (LIMIT.bytes, LIMIT.inodes)
        assert 1 << 20 < usage.bytes_used <= LIMIT.bytes
        assert usage.inodes_used <= LIMIT.inodes
        session.check_space()
        assert session.space_level == "critical"
        (other.mount_point / "file").write_bytes(bytes(1 << 20))
        await reset(session)
        await settled(session)

        def is_normal() -> bool:
            session.check_space()
            return session.space_level == "normal"

        await until(is_normal)  # the kernel may hold removed files for a moment
        (session.mount_point / "file").write_bytes(bytes(1 << 20))


async def test_ids_are_free_again_when_sessions_are_closed(limited: Machine) -> None:
    def projects() -> list[int]:
        listed = subprocess.run(
            ["lsattr", "-dp", *(limited.state / "sessions").iterdir()],
            capture_output=True,
            text=True,
            check=True,
        )
        return [int(line.split()[0]) for line in listed.stdout.splitlines()]

    async with limited.manager() as manager:
        for name in ("one", "two"):
            await manager.create("root", "lasting", session_id=name)
        first = projects()
        assert len(set(first)) == 2
        assert 0 not in first
        await manager.close("one")
        trash = limited.state / "trash"
        await until(lambda: not list(trash.iterdir()))
        await manager.create("root", "lasting", session_id="three")
        assert sorted(projects()) == sorted(first)


def test_ids_that_others_use_are_left_alone(limited: Machine) -> None:
    directories = [limited.state / name for name in "abc"]
    for directory in directories:
        directory.mkdir()
    quota.assign(directories[0], LIMIT)
    (directories[0] / "file").write_bytes(bytes(8192))
    quota.release(directories[0])  # has files still, so its id is in use
    quota.assign(directories[1], LIMIT)
    assert quota.counted(directories[0]).bytes_used >= 8192
    assert quota.counted(directories[0]).bytes_limit == 0
    used = quota.counted(directories[1])
    assert (used.bytes_limit, used.inodes_limit) == (LIMIT.bytes, LIMIT.inodes)
    assert used.inodes_used == 1
    inside = directories[1] / "inherits"
    inside.mkdir()
    quota.release(inside)  # the limit is not its own
    assert quota.counted(directories[1]).bytes_limit == LIMIT.bytes


async def test_persist_takes_the_quota_along(limited: Machine) -> None:
    async with limited.manager() as manager:
        session = await manager.create("root", "volatile", session_id="s")
        (session.mount_point / "file").write_bytes(bytes(1 << 20))
        await session.persist(started_by=ROOT).wait()
        assert session.usage.bytes_limit == LIMIT.bytes
        assert session.usage.bytes_used > 1 << 20
        assert df(session.mount_point) == (LIMIT.bytes, LIMIT.inodes)


async def test_what_is_more_than_the_quota_stays_volatile(limited: Machine) -> None:
    limited.profiles["volatile"]["quota"] = "1M"
    async with limited.manager() as manager:
        session = await manager.create("root", "volatile", session_id="s")
        (session.mount_point / "file").write_bytes(bytes(2 << 20))
        with pytest.raises(NoSpace, match="its quota on disk is 1048576"):
            await session.persist(started_by=ROOT).wait()
        assert session.storage is StorageKind.TMPFS
        assert not (limited.state / "sessions/s").exists()


async def test_what_is_kept_takes_no_more_than_its_quota(limited: Machine) -> None:
    """Also by a commit, of which nothing is left then; and a reset goes."""
    limited.profiles["volatile"] |= {
        "keep": ["/kept"],
        "keep_quota": "2M",
        "size": "16M",
        "quota": None,
        "quota_inodes": None,
    }
    async with limited.manager() as manager:
        session = await manager.create("root", "volatile", session_id="s")
        root = session.mount_point
        kept = limited.state / "kept/0/volatile"
        assert quota.counted(kept).bytes_limit == 2 << 20
        (root / "kept").mkdir()
        (root / "kept/file").write_bytes(b"x" * 4096)
        (root / "large").write_bytes(os.urandom(4 << 20))
        with pytest.raises(NoSpace):
            await session.commit(["/large"], started_by=ROOT).wait()
        await until(lambda: not os.listdir(kept / "work/work"))
        assert session.keep == ("/kept",)
        fill(root / "kept", "bytes")
        assert quota.counted(kept).bytes_used <= 2 << 20
        with pytest.raises(NoSpace):
            await session.commit(["/file1"], started_by=ROOT).wait()
        await reset(session)
        assert (root / "kept/file").read_bytes() == b"x" * 4096
        for name in set(os.listdir(root / "kept")) - {"file"}:
            (root / "kept" / name).unlink()
        # The kernel may hold removed files for a moment.
        await until(lambda: quota.counted(kept).bytes_used < 1 << 20)
        (root / "small").write_bytes(b"small")
        await session.commit(["/small"], started_by=ROOT).wait()
        await session.uncommit(["/small"], delete=True)
        await reset(session)
        assert sorted(os.listdir(root / "kept")) == ["file"]
        assert not (root / "small").exists()


async def test_without_the_file_systems_help_there_is_no_session(machine: Machine) -> None:
    machine.mount_disk("ext4", size="16M")
    machine.profiles["lasting"]["quota"] = "4M"
    machine.profiles["volatile"]["quota"] = "4M"
    async with machine.manager() as manager:
        with pytest.raises(NotSupported, match="tune2fs -O project,quota"):
            await manager.create("root", "lasting", session_id="lasting")
        assert list((machine.state / "sessions").iterdir()) == []
        volatile = await manager.create("root", "volatile", session_id="volatile")
        with pytest.raises(NotSupported, match="mount it with the option prjquota"):
            await volatile.persist(started_by=ROOT).wait()
        assert volatile.storage is StorageKind.TMPFS
        assert list((machine.state / "sessions").iterdir()) == []


async def test_a_quota_that_does_not_hold_any_more(limited: Machine) -> None:
    """Someone has forgotten the mount option: no session is unlimited because of that."""
    async with limited.manager() as manager:
        await manager.create("root", "lasting", session_id="s")

    def mount_again(options: str) -> None:
        detach(str(limited.state))
        disk = limited.directory / "disk"
        subprocess.run(["mount", "-o", options, disk, limited.state], check=True)

    mount_again("loop,noquota")
    async with limited.manager() as manager:
        session = manager.get("s")
        assert session.state is SessionState.FAILED
        assert "mount it with the option prjquota" in session.failure
        mount_again("loop,prjquota")
        await manager.reload(limited.config())
        assert session.state is SessionState.ACTIVE
        assert session.usage.bytes_limit == LIMIT.bytes


async def test_xfs(machine: Machine) -> None:
    machine.profiles["lasting"] |= {"quota": "8M", "quota_inodes": 200}
    try:
        machine.mount_disk("xfs", size="320M", options="loop,prjquota")
    except subprocess.CalledProcessError:
        pytest.skip("this kernel's xfs has no quotas")
    async with machine.manager() as manager:
        session = await manager.create("root", "lasting", session_id="s")
        assert df(session.mount_point)[0] == 8 << 20
        fill(session.mount_point, "bytes")
        assert session.usage.bytes_used <= 8 << 20
        await reset(session)
        await settled(session)
        await manager.close("s")


@pytest.mark.parametrize("profile", ["volatile", "lasting"])
async def test_what_is_kept_has_a_quota_of_its_own(limited: Machine, profile: str) -> None:
    limited.profiles[profile] |= {
        "keep": ["/kept"],
        "keep_quota": "1M",
        "keep_quota_inodes": 64,
    }
    async with limited.manager() as manager:
        session = await manager.create("root", profile, session_id="s")
        kept = session.mount_point / "kept"
        kept.mkdir()
        (kept / "first").write_bytes(b"first")
        fill(kept, "bytes")
        directory = limited.state / "kept/0" / profile
        used = quota.counted(directory)
        assert (used.bytes_limit, used.inodes_limit) == (1 << 20, 64)
        assert 1 << 19 < used.bytes_used <= 1 << 20
        # The session has its own.
        (session.mount_point / "file").write_bytes(bytes(2 << 20))
        await reset(session)
        assert (kept / "first").read_bytes() == b"first"
        for file in kept.glob("big*"):
            file.unlink()
        await until(lambda: quota.counted(directory).bytes_used < 1 << 18)
        (kept / "second").write_bytes(bytes(1 << 19))
        await manager.close("s")
    # The next one obeys it as well, and without it there is none.
    async with limited.manager() as manager:
        session = await manager.create("root", profile, session_id="s")
        fill(session.mount_point / "kept", "inodes")
        assert quota.counted(directory).inodes_used <= 64
