"""Storage as the kernel gives it: limits, mount points, levels of space."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sessiond.config import Config
from sessiond.errors import Failed, NoSpace
from sessiond.session import mount_point
from sessiond.session.manager import Session, open_manager
from sessiond.session.memory import MemoryMounter, MemoryMounts
from sessiond.session.model import SessionId, SpaceThresholds, Uid
from sessiond.session.mounts import SystemMounts, run, sync_file_system
from sessiond.session.space import Space, SpaceLevel, SpaceWatch, next_level
from tests.support.disks import make_image
from tests.support.kernel_overlay import KernelOverlay
from tests.support.mounts import Layers
from tests.support.recording_disk import mounted_image
from tests.support.sessions import UID


def volatile(directory: Path, **limits: object) -> Config:
    (directory / "image").mkdir(exist_ok=True)
    return Config.model_validate(
        {
            "daemon": {
                "runtime_directory": str(directory / "run"),
                "state_directory": str(directory / "state"),
            },
            "profile": {"p": {"image": str(directory / "image"), **limits}},
        }
    )


@pytest.mark.root
async def test_a_volatile_session_has_a_tmpfs_with_its_limits(real: Path) -> None:
    mounter = MemoryMounter()
    async with open_manager(volatile(real, size="8M", inodes=500), mounter) as manager:
        await manager.start()
        session = await manager.create("root", "p", session_id="s")
        assert session.usage.bytes_limit == 8 << 20
        assert session.usage.inodes_limit == 500
        storage = real / "run" / "sessions" / "s" / "storage"
        assert SystemMounts().file_system(storage) == "tmpfs"
        assert storage.stat().st_mode & 0o777 == 0o700
        await session.persist(started_by=Uid(UID)).wait()
        assert SystemMounts().file_system(storage) is None
        assert session.usage.bytes_limit == 0
        await manager.shut_down()
    assert SystemMounts().mounted_below(real) == []


def fill_with_files(directory: Path) -> None:
    for number in range(1000):
        (directory / str(number)).touch()


@pytest.mark.root
async def test_a_full_storage_is_an_error_for_a_snapshot_and_nothing_else(real: Path) -> None:
    mounter = MemoryMounter()
    async with open_manager(volatile(real, inodes=64), mounter) as manager:
        await manager.start()
        session = await manager.create("root", "p", session_id="s")
        upper = mounter.mounts[SessionId("s")].stack.upper.fs
        with pytest.raises(OSError, match="No space left"):
            fill_with_files(upper)
        with pytest.raises(NoSpace, match="delete files"):
            await make_snapshots(session)
        assert session.state == "active"
        assert set(session.snapshots) == {str(n) for n in range(len(session.snapshots))}


async def make_snapshots(session: Session) -> None:
    for number in range(100):
        await session.snapshots.make(str(number))


async def test_mount_points(tmp_path: Path) -> None:
    mounts = MemoryMounts()
    target = mount_point.resolve(tmp_path / "target")
    mount_point.prepare(target, Uid(UID), mounts)
    assert target.stat().st_mode & 0o777 == 0o700
    target.chmod(0o755)
    mount_point.prepare(target, Uid(UID), mounts)
    assert target.stat().st_mode & 0o777 == 0o755  # one that exists stays as it is
    (tmp_path / "link").symlink_to(target)
    assert mount_point.resolve(tmp_path / "link") == target
    (tmp_path / "file").touch()
    with pytest.raises(Failed, match="File exists"):
        mount_point.prepare(tmp_path / "file", Uid(UID), mounts)
    with pytest.raises(Failed, match="No such file"):
        mount_point.resolve(tmp_path / "missing" / "target")
    mounts.mounted[target] = "nfs"
    with pytest.raises(Failed, match="in use: a nfs is mounted"):
        mount_point.prepare(target, Uid(UID), mounts)


def test_a_mount_point_that_others_could_move_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open" / "safe").mkdir()
    for path in ("open/target", "open/safe/target"):
        with pytest.raises(Failed, match="others than root may write to"):
            mount_point.resolve(tmp_path / path)
    (tmp_path / "link").symlink_to(tmp_path / "open" / "safe")
    with pytest.raises(Failed, match="others than root may write to"):
        mount_point.resolve(tmp_path / "link" / "target")
    (tmp_path / "open").chmod(0o1777)
    mount_point.resolve(tmp_path / "open" / "safe" / "target")
    (tmp_path / "open" / "first").symlink_to("/etc")
    for name in ("first", "second"):
        with pytest.raises(Failed, match="others than root may write to"):
            mount_point.resolve(tmp_path / "open" / name)


@pytest.mark.root
def test_a_mount_point_in_a_users_directory_is_refused(real: Path) -> None:
    (real / "home").mkdir()
    os.chown(real / "home", 1000, 1000)
    with pytest.raises(Failed, match="others than root"):
        mount_point.resolve(real / "home" / "session")
    mount_point.resolve(real / "home")


def test_levels_of_space_have_hysteresis() -> None:
    level = SpaceLevel.NORMAL
    seen = []
    for percent in (50, 79, 80, 78, 76, 81, 94, 95, 93, 91, 89, 95, 74, 50):
        level = next_level(level, percent / 100, SpaceThresholds())
        seen.append(level.value[0])
    assert "".join(seen) == "nnwwwwwcccwcnn"


def test_levels_of_space_begin_where_the_profile_says() -> None:
    thresholds = SpaceThresholds(warning=50, critical=60)
    level = SpaceLevel.NORMAL
    seen = []
    for percent in (49, 50, 60, 54, 46, 44):
        level = next_level(level, percent / 100, thresholds)
        seen.append(level.value[0])
    assert "".join(seen) == "nwcwwn"


def test_space_counts_what_is_nearest_to_its_end() -> None:
    assert Space(10, 100, 90, 100).used_part == 0.9
    assert Space(10, 100, 0, 0).used_part == 0.1
    assert Space(0, 0, 0, 0).used_part == 0.0
    watch = SpaceWatch(SpaceThresholds())
    assert watch.new_level(Space(10, 100, 0, 0)) is None
    assert watch.new_level(Space(96, 100, 0, 0)) is SpaceLevel.CRITICAL
    assert watch.new_level(Space(96, 100, 0, 0)) is None


@pytest.mark.root
def test_mounts_are_known_by_strange_names(real: Path) -> None:
    mounts = SystemMounts()
    target = real / os.fsdecode(b"a b\\c\nd\xff")
    target.mkdir()
    mounts.mount_tmpfs(target, size="1M", inodes=100)
    mounts.mount_tmpfs(target, size="1M", inodes=None)
    assert mounts.file_system(target) == "tmpfs"
    assert mounts.file_system(real) is None
    assert mounts.mounted_below(real) == [target]
    with open(target / "in use", "w"):
        mounts.detach(target)
    assert mounts.file_system(target) is None
    mounts.detach(target)
    sync_file_system(real)
    assert mounts.supports("tmpfs")
    assert not mounts.supports("nosuchfs")


@pytest.mark.root
def test_mount_errors_name_what_failed(real: Path) -> None:
    mounts = SystemMounts()
    with pytest.raises(OSError, match="No such file") as caught:
        mounts.mount_tmpfs(real / "missing", size="1M", inodes=None)
    assert caught.value.filename == str(real / "missing")
    with pytest.raises(OSError, match="No such file"):
        mounts.mount_clone(real / "missing", real)
    with pytest.raises(OSError, match="Invalid argument"):
        mounts.mount_tmpfs(real, size="lots", inodes=None)


def test_what_a_tool_says_becomes_the_error() -> None:
    run(["true"])
    with pytest.raises(OSError) as caught:
        run(["sh", "-c", "echo first; echo last. >&2; exit 3"])
    assert caught.value.strerror == "first last"
    with pytest.raises(OSError, match="false ended with status 1"):
        run(["false"])
    with pytest.raises(OSError, match=r"no-such-tool (is not installed|cannot be run)"):
        run(["no-such-tool"])


@pytest.mark.root
def test_what_is_in_ram(real: Path) -> None:
    mounts = SystemMounts()
    disk = make_image("ext4", str(real))
    for name in ("ram", "disk"):
        (real / name).mkdir()
    mounts.mount_tmpfs(real / "ram", size="1M", inodes=None)
    with mounted_image(disk, str(real / "disk")):
        (real / "ram/below").mkdir()
        (real / "link").symlink_to("ram/below")
        assert mounts.is_in_ram(real / "ram/below")
        assert mounts.is_in_ram(real / "link")
        assert not mounts.is_in_ram(real / "disk")
        assert not mounts.is_in_ram(real / "disk/lost+found")
        for where in (real / "ram", real / "disk"):  # as the root of a live system has them
            lower, upper, work = (where / name for name in ("lower", "upper", "work"))
            for directory in (lower, upper, work, real / "root"):
                directory.mkdir(exist_ok=True)
            overlay = Layers([str(lower)], str(upper), str(work))
            with KernelOverlay().mounted(overlay, str(real / "root")):
                assert mounts.is_in_ram(real / "root") == (where.name == "ram")
