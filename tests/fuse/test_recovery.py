"""Workers that are killed: who uses the mount notices a pause, and nothing else."""

from __future__ import annotations

import errno
import fcntl
import functools
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from sessiond.control import LayerStack
from sessiond.errors import Failed, SessiondError
from sessiond.fuse import sandbox, worker
from sessiond.fuse import spawner as fork_server
from sessiond.fuse.controlled import Controlled
from sessiond.fuse.mounter import FuseMount, FuseMounter
from sessiond.fuse.spawner import Spawner
from sessiond.overlay import syscalls
from sessiond.session.model import DataPath
from tests.fuse.conftest import Playground
from tests.support import libc
from tests.support.mounts import detach
from tests.support.soak import factor
from tests.support.waiting import until

T = TypeVar("T")

RECOVERING = [DataPath.PASSTHROUGH, DataPath.CACHED]


@pytest.fixture(params=RECOVERING)
def playground(request: pytest.FixtureRequest, mounter: FuseMounter) -> Iterator[Playground]:
    with tempfile.TemporaryDirectory() as directory:
        yield Playground(Path(directory), mounter, request.param)


async def succeed(mount: FuseMount) -> None:
    """Kill the worker, and have another go on."""
    before = mount.worker
    os.kill(before, signal.SIGKILL)
    await mount.wait_died()
    await mount.recover()
    assert mount.worker != before


async def program(call: Callable[[], T]) -> T:
    """Do what a program would do, in a thread: the worker may be dead meanwhile."""
    return await trio.to_thread.run_sync(call, abandon_on_cancel=True)


# What is open goes on


@pytest.mark.parametrize("where", ["image", "upper", "copied"])
async def test_an_open_file(playground: Playground, where: str) -> None:
    root = playground.root
    (playground.image / "file").write_bytes(b"0123456789")
    async with playground.mounted(playground.stack()) as mount:
        if where == "upper":
            (root / "file").unlink()
        with open(root / "file", "w+b" if where == "upper" else "r+b", buffering=0) as file:
            if where != "image":
                file.write(b"0123456789")
            await succeed(mount)
            assert os.pread(file.fileno(), 10, 0) == b"0123456789"
            assert os.pwrite(file.fileno(), b"ab", 4) == 2
            await succeed(mount)
            assert (root / "file").read_bytes() == b"0123ab6789"
            assert os.fstat(file.fileno()) == (root / "file").stat()
        (root / "file").write_bytes(b"new")
        assert (root / "file").read_bytes() == b"new"


@pytest.mark.parametrize("where", ["image", "upper", "anonymous"])
async def test_a_removed_file_that_is_open(playground: Playground, where: str) -> None:
    root = playground.root
    if where == "image":
        (playground.image / "file").write_bytes(b"contents")
    async with playground.mounted(playground.stack()) as mount:
        if where == "anonymous":
            fd = os.open(root, os.O_TMPFILE | os.O_RDWR)
        else:
            fd = os.open(root / "file", os.O_RDWR | os.O_CREAT)
        if where != "image":
            os.write(fd, b"contents")
        if where != "anonymous":
            (root / "file").unlink()
        for times in range(3):
            await succeed(mount)
            assert os.listdir(root) == []
            assert os.fstat(fd).st_nlink == 0
            assert os.pread(fd, 100, 0) == b"contents" + b"!" * times
            os.pwrite(fd, b"!", 8 + times)
        os.close(fd)
        await until(lambda: not list((playground.root.parent / "orphans").iterdir()))


async def test_an_anonymous_file_gets_a_name_from_the_next_worker(playground: Playground) -> None:
    root = playground.root
    async with playground.mounted(playground.stack()) as mount:
        with os.fdopen(os.open(root, os.O_TMPFILE | os.O_RDWR), "wb", buffering=0) as file:
            file.write(b"named at last")
            await succeed(mount)
            source, directory = f"/proc/self/fd/{file.fileno()}", os.open(root, os.O_PATH)
            os.link(source, "name", dst_dir_fd=directory, follow_symlinks=True)
            os.close(directory)
        assert (root / "name").read_bytes() == b"named at last"
        assert (root / "name").stat().st_nlink == 1


async def test_descriptors_from_before_and_after_a_copy_up(playground: Playground) -> None:
    root = playground.root
    (playground.image / "file").write_bytes(b"before")
    async with playground.mounted(playground.stack()) as mount:
        with (
            open(root / "file", "rb", buffering=0) as old,
            open(root / "file", "r+b", buffering=0) as new,
        ):
            new.write(b"after!")
            before = old.read()
            for _ in range(2):
                await succeed(mount)
                assert os.pread(old.fileno(), 10, 0) == before
                assert os.pread(new.fileno(), 10, 0) == b"after!"
                assert os.fstat(old.fileno()).st_ino == os.fstat(new.fileno()).st_ino
            (root / "file").unlink()
            await succeed(mount)
            assert os.pread(old.fileno(), 10, 0) == before
            assert os.pread(new.fileno(), 10, 0) == b"after!"
            assert os.fstat(old.fileno()).st_nlink == os.fstat(new.fileno()).st_nlink == 0


@pytest.mark.parametrize("where", ["image", "upper", "merged"])
async def test_a_directory_that_is_half_listed(playground: Playground, where: str) -> None:
    """It goes on where it was, with what is removed gone, and nothing twice."""
    names = [f"a-name-that-fills-a-buffer-{number:04d}" for number in range(400)]
    directory = (playground.root if where == "upper" else playground.image) / "directory"
    async with playground.mounted(playground.stack()) as mount:
        directory.mkdir()
        for name in names:
            (directory / name).touch()
        if where == "merged":
            (playground.root / "directory" / names[0]).unlink()
            (playground.root / "directory" / names[0]).touch()
        with os.scandir(playground.root / "directory") as entries:
            listed = [next(entries).name for _ in range(10)]
            await succeed(mount)
            listed += [next(entries).name for _ in range(200)]
            await succeed(mount)
            listed += [entry.name for entry in entries]
        assert sorted(listed) == names
        assert sorted(os.listdir(playground.root / "directory")) == names


async def test_a_removed_working_directory(playground: Playground) -> None:
    async with playground.mounted(playground.stack()) as mount:
        (playground.root / "directory").mkdir()
        fd = os.open(playground.root / "directory", os.O_RDONLY)
        (playground.root / "directory").rmdir()
        await succeed(mount)
        assert os.listdir(fd) == []
        assert os.fstat(fd).st_nlink == 0
        with pytest.raises(FileNotFoundError):
            os.mkdir("new", dir_fd=fd)
        os.close(fd)


async def test_locks(playground: Playground) -> None:
    async with playground.mounted(playground.stack()) as mount:
        with open(playground.root / "file", "w") as mine, open(playground.root / "file") as other:
            fcntl.flock(mine, fcntl.LOCK_EX)
            fcntl.lockf(mine, fcntl.LOCK_EX)
            await succeed(mount)
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
            try_lock = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), 6)"  # exclusive, now
            command = [sys.executable, "-c", try_lock, str(playground.root / "file")]
            tried = await trio.run_process(command, check=False, capture_stderr=True)
            assert b"BlockingIOError" in tried.stderr
            fcntl.flock(mine, fcntl.LOCK_UN)
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)


async def test_a_shared_mapping(playground: Playground) -> None:
    async with playground.mounted(playground.stack()) as mount:
        (playground.root / "file").write_bytes(bytes(8192))
        with open(playground.root / "file", "r+b") as file:
            mapping = mmap.mmap(file.fileno(), 8192)
        mapping[0:5] = b"first"
        await succeed(mount)
        assert mapping[0:5] == b"first"
        mapping[4096:4102] = b"second"
        await program(mapping.flush)
        assert (playground.root / "file").read_bytes()[4096:4102] == b"second"
        mapping.close()


# Names lead to the same


async def test_inode_numbers_stay(playground: Playground) -> None:
    root = playground.root
    (playground.image / "directory").mkdir()
    (playground.image / "directory/lower").touch()
    (playground.image / "changed").touch()
    async with playground.mounted(playground.stack()) as mount:
        (root / "changed").write_text("x")
        (root / "directory").rename(root / "moved")
        (root / "moved/new").touch()
        os.link(root / "moved/new", root / "other")
        paths = ["changed", "moved", "moved/lower", "moved/new", "other"]
        before = [os.stat(root / path) for path in paths]
        held = [os.open(root / path, os.O_PATH) for path in paths]
        await succeed(mount)
        assert [os.fstat(fd) for fd in held] == before
        assert [os.stat(root / path) for path in paths] == before
        await succeed(mount)
        assert [os.stat(root / path) for path in paths] == before
        for fd in held:
            os.close(fd)


async def test_a_working_directory_and_what_is_below(playground: Playground) -> None:
    (playground.image / "a/b/c").mkdir(parents=True)
    (playground.image / "a/b/c/file").write_text("deep")
    async with playground.mounted(playground.stack()) as mount:
        fd = os.open(playground.root / "a/b/c", os.O_RDONLY)
        (playground.root / "a").rename(playground.root / "A")
        await succeed(mount)
        with open("file", opener=lambda name, flags: os.open(name, flags, dir_fd=fd)) as file:
            assert file.read() == "deep"
        assert os.readlink(f"/proc/self/fd/{fd}") == str(playground.root / "A/b/c")
        os.mkdir("new", dir_fd=fd)
        assert os.listdir(playground.root / "A/b/c") == os.listdir(fd)
        os.close(fd)


async def test_after_the_layers_were_exchanged(playground: Playground) -> None:
    root = playground.root
    (playground.image / "file").write_text("image")
    async with playground.mounted(first := playground.stack()) as mount:
        (root / "file").write_text("upper")
        (root / "new").write_text("new")
        with open(root / "file") as changed, open(root / "new", "r+") as new:
            await mount.swap(playground.stack())
            await succeed(mount)
            assert changed.read() == "upper"
            assert new.read() == "new"
            assert os.fstat(new.fileno()).st_nlink == 0
            assert (root / "file").read_text() == "image"
            assert os.listdir(root) == ["file"]
            await mount.swap(playground.stack(first.upper.fs))
            await succeed(mount)
            assert (root / "file").read_text() == "upper"
            assert os.pread(new.fileno(), 3, 0) == b"new"


async def test_names_that_a_predecessor_said_to_be_missing(playground: Playground) -> None:
    root = playground.root
    (playground.image / "file").write_bytes(b"image")
    async with playground.mounted(playground.stack()) as mount:
        (root / "file").unlink()
        assert not (root / "file").exists()
        await succeed(mount)
        await mount.swap(playground.stack())
        assert (root / "file").read_bytes() == b"image"


async def test_more_names_than_the_journal_is_tidied_for(playground: Playground) -> None:
    async with playground.mounted(playground.stack()) as mount:
        for number in range(3000):
            (playground.root / f"{number:0100d}").touch()
            if number % 1000 == 0:
                await succeed(mount)
        with open(playground.root / f"{5:0100d}", "w") as file:
            for path in playground.root.iterdir():
                path.unlink()
            await succeed(mount)
            assert file.write("still here") == 10
        assert os.listdir(playground.root) == []


# Requests under way


def exchange(first: Path, second: Path) -> None:
    libc.renameat2(str(first), str(second), libc.RENAME_EXCHANGE)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "create": lambda root: (root / "new").touch(exist_ok=False),
    "mkdir": lambda root: (root / "new").mkdir(),
    "symlink": lambda root: (root / "new").symlink_to("target"),
    "mknod": lambda root: os.mkfifo(root / "new"),
    "link": lambda root: os.link(root / "file", root / "new"),
    "unlink": lambda root: (root / "file").unlink(),
    "unlink-lower": lambda root: (root / "lower").unlink(),
    "rmdir": lambda root: (root / "directory").rmdir(),
    "rename": lambda root: (root / "file").rename(root / "new"),
    "rename-over": lambda root: (root / "file").rename(root / "other"),
    "rename-lower": lambda root: (root / "lower").rename(root / "new"),
    "rename-directory": lambda root: (root / "tree").rename(root / "new"),
    "exchange": lambda root: exchange(root / "file", root / "other"),
    "exchange-directories": lambda root: exchange(root / "tree", root / "directory"),
    "setxattr": lambda root: os.setxattr(root / "file", "user.new", b"x", os.XATTR_CREATE),
    "removexattr": lambda root: os.removexattr(root / "file", "user.old"),
    "truncate": lambda root: os.truncate(root / "file", 2),
    "copy-up": lambda root: os.truncate(root / "lower", 2),
    "chmod": lambda root: (root / "lower").chmod(0o600),
}

PUBLISHING = ("rename", "unlink", "rmdir", "link", "mkdir", "symlink", "mknod", "create_file")
PUBLISHING += ("chmod", "truncate", "setxattr", "removexattr", "link_descriptor")


def populate(playground: Playground) -> None:
    (playground.image / "lower").write_text("lower")
    (playground.image / "tree/below").mkdir(parents=True)


def prepare(root: Path) -> None:
    (root / "file").write_text("file")
    os.setxattr(root / "file", "user.old", b"x")
    (root / "other").write_text("other")
    (root / "directory").mkdir()


def picture(root: Path) -> dict[str, object]:
    """All that a change of these could have changed."""
    return {
        str(path.relative_to(root)): (
            (stat := path.lstat()).st_mode,
            stat.st_nlink,
            path.read_text() if path.is_file() else os.listdir(path) if path.is_dir() else "",
            os.listxattr(path, follow_symlinks=False),
        )
        for path in root.rglob("*")
    }


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_that_waits(playground: Playground, change: str) -> None:
    """It was handed to the worker, which was killed before it began."""
    populate(playground)
    async with playground.mounted(playground.stack()) as mount:
        prepare(playground.root)
        async with trio.open_nursery() as nursery, mount.frozen():
            nursery.start_soon(program, lambda: CHANGES[change](playground.root))
            with trio.move_on_after(0.02):
                await trio.sleep_forever()
            await succeed(mount)
        after = picture(playground.root)
    assert after == await expected(playground, change)


async def expected(playground: Playground, change: str) -> dict[str, object]:
    async with playground.mounted(playground.stack()):
        prepare(playground.root)
        CHANGES[change](playground.root)
        return picture(playground.root)


class Order:
    """In memory that workers share: one is to kill itself right before or after the n-th of the
    system calls that publish a change.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def give(self, when: str, step: int) -> None:
        self._memory[:2] = bytes([step, when == "after"])

    def withdraw(self) -> bool:
        """Return whether it was obeyed."""
        obeyed = not self._memory[0]
        self._memory[0] = 0
        return obeyed

    def watched(self, call: Callable[..., T]) -> Callable[..., T]:
        """Return `call` with that behaviour."""

        def watch(*arguments: Any, **named: Any) -> T:
            memory = self._memory
            if not memory[0]:
                return call(*arguments, **named)
            memory[0] -= 1
            if memory[0]:
                return call(*arguments, **named)
            if memory[1]:
                call(*arguments, **named)
            signal.raise_signal(signal.SIGKILL)
            raise AssertionError

        return watch


@pytest.fixture(scope="module")
def dying() -> Iterator[tuple[FuseMounter, Order]]:
    """A mounter whose workers obey an order."""
    order = Order()
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        for name in PUBLISHING:
            patch.setattr(syscalls, name, order.watched(getattr(syscalls, name)))
        spawner = Spawner.start()
        yield FuseMounter(spawner, Path(directory)), order
        spawner.close()


@asynccontextmanager
async def attended(mount: FuseMount) -> AsyncIterator[None]:
    """Have another worker go on whenever one dies."""

    async def attend() -> None:
        while True:
            await mount.wait_died()
            await mount.recover()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attend)
        yield
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
async def test_death_at_each_step_of_a_change(
    dying: tuple[FuseMounter, Order], playground: Playground, change: str, when: str
) -> None:
    """It was, or was not, carried out when the worker died: the program sees it done once."""
    mounter, order = dying
    directory = playground.root.parent / "mortal"
    directory.mkdir()
    mortal = Playground(directory, mounter, playground.data_path)
    populate(mortal)
    wanted = await expected(mortal, change)
    died, step = True, 0
    while died:
        step += 1
        async with mortal.mounted(mortal.stack()) as mount, attended(mount):
            prepare(mortal.root)
            order.give(when, step)
            await program(lambda: CHANGES[change](mortal.root))
            died = order.withdraw()
            assert await program(lambda: picture(mortal.root)) == wanted, step
    assert step > 1


@pytest.mark.parametrize("when", ["before", "after"])
async def test_death_while_files_that_are_written_move(
    dying: tuple[FuseMounter, Order], playground: Playground, when: str
) -> None:
    """A snapshot that fails has changed nothing: the file goes on under its name."""
    mounter, order = dying
    directory = playground.root.parent / "mortal"
    directory.mkdir()
    mortal = Playground(directory, mounter, playground.data_path)
    file = mortal.root / "file"
    died, step = True, 0
    while died:
        step += 1
        first = mortal.stack()
        async with mortal.mounted(first) as mount, attended(mount):
            with open(file, "wb", buffering=0) as writer:
                os.link(file, mortal.root / "link")
                writer.write(b"one")
                order.give(when, step)
                second = mortal.stack(first.upper.fs)
                failed = False
                try:
                    await mount.swap(second)
                except Failed:
                    failed = True
                died = order.withdraw()
                await program(lambda writer=writer: writer.write(b"two"))  # type: ignore[misc]
                assert await program(file.read_bytes) == b"onetwo", step
                if failed:
                    shutil.rmtree(second.upper.fs.parent)  # as the manager does
                    await mount.swap(mortal.stack(first.upper.fs))
                assert (first.upper.fs / "file").read_bytes() == (b"onetwo" if failed else b"one")
                writer.write(b"three")
                for path in (file, mortal.root / "link"):
                    assert path.read_bytes() == b"onetwothree"
                    assert path.stat() == os.fstat(writer.fileno())
                assert file.stat().st_nlink == 2, step
    assert step > 1


@pytest.fixture
def dying_in_swaps(playground: Playground) -> Iterator[Playground]:
    """Workers die when they have exchanged layers; if programs can write then, when one has."""

    async def die(controlled: Controlled, layers: LayerStack, *_: object) -> None:
        await until(lambda: controlled._is_frozen or os.listdir(layers.upper))
        signal.raise_signal(signal.SIGKILL)

    with tempfile.TemporaryDirectory() as directory:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Controlled, "_announce", die)
            spawner = Spawner.start()
        mortal = Path(directory, "mortal")
        mortal.mkdir()
        yield Playground(mortal, FuseMounter(spawner, Path(directory)), playground.data_path)
        spawner.close()


async def test_a_swap_that_fails_by_a_death_loses_nothing(dying_in_swaps: Playground) -> None:
    root = dying_in_swaps.root
    made: list[str] = []
    done = threading.Event()

    def make() -> None:
        while not done.is_set():
            name = str(len(made))
            (root / name).touch()
            made.append(name)

    first = dying_in_swaps.stack()
    async with dying_in_swaps.mounted(first) as mount, attended(mount):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(program, make)
            await until(lambda: made)
            second = dying_in_swaps.stack(first.upper.fs)
            with pytest.raises(Failed):
                await mount.swap(second)
            shutil.rmtree(second.upper.fs.parent)  # as the manager does
            done.set()
        assert sorted(await program(lambda: os.listdir(root))) == sorted(made)


@pytest.fixture
def dying_in_thaws(playground: Playground) -> Iterator[tuple[Playground, Order]]:
    """Workers obey an order when they are to let changes pass, and when they have."""
    order = Order()
    die, thaw = order.watched(lambda: None), Controlled.thaw

    async def watched(controlled: Controlled) -> None:
        die()
        await thaw(controlled)
        die()

    with tempfile.TemporaryDirectory() as directory:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Controlled, "thaw", watched)
            spawner = Spawner.start()
        mortal = Path(directory, "mortal")
        mortal.mkdir()
        mounter = FuseMounter(spawner, Path(directory))
        yield Playground(mortal, mounter, playground.data_path), order
        spawner.close()


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("kind", ["snapshot", "reset"])
async def test_a_swap_that_is_done_outlives_a_death(
    dying_in_thaws: tuple[Playground, Order], kind: str, step: int
) -> None:
    playground, order = dying_in_thaws
    root, first = playground.root, playground.stack()
    async with playground.mounted(first) as mount, attended(mount):
        with open(root / "file", "w+b", buffering=0) as file:
            file.write(b"one")
            order.give("before", step)
            if kind == "snapshot":
                await mount.swap(second := playground.stack(first.upper.fs))
            else:
                await mount.swap(second := playground.stack())
                shutil.rmtree(first.upper.fs.parent)  # as the manager does
            assert order.withdraw()
            await program(lambda: file.write(b"two"))
            await program((root / "made").touch)
            assert os.pread(file.fileno(), 9, 0) == b"onetwo"
            assert (second.upper.fs / "made").exists()
            if kind == "snapshot":
                assert (first.upper.fs / "file").read_bytes() == b"one"
                assert (root / "file").read_bytes() == b"onetwo"
            else:
                assert os.listdir(root) == ["made"]


@pytest.mark.parametrize("free", range(17))
async def test_a_snapshot_for_which_there_is_little_space(
    playground: Playground, mounter: FuseMounter, free: int
) -> None:
    """If it fails, at whatever point, all is as before, and nothing serves the new layer."""
    directory = playground.root.parent / "small"
    directory.mkdir()
    libc.mount("small", str(directory), "tmpfs", data="size=16M,nr_inodes=200")
    try:
        small = Playground(directory, mounter, playground.data_path)
        await take_snapshot(small, free)
    finally:
        detach(str(directory))


async def take_snapshot(small: Playground, free: int) -> None:
    """Do so with that many free inodes, while files are written."""
    first = small.stack()
    paths = [small.root / f"directory{number}/below/file" for number in range(3)]
    paths.append(small.root / "directory0/link")
    async with small.mounted(first) as mount, attended(mount):
        with ExitStack() as files:
            writers = []
            for path in paths[:3]:
                path.parent.mkdir(parents=True)
                writers.append(files.enter_context(open(path, "wb", buffering=0)))
                writers[-1].write(b"one")
            os.link(paths[0], paths[3])
            second = small.stack(first.upper.fs)
            fill = small.root.parent / "fill"
            leave_free_inodes(fill, free)
            failed = False
            try:
                await mount.swap(second)
            except SessiondError:
                failed = True
                shutil.rmtree(second.upper.fs.parent)  # as the manager does
            shutil.rmtree(fill)
            for writer in writers:
                await program(lambda writer=writer: writer.write(b"two"))  # type: ignore[misc]
            for path in paths:
                assert await program(path.read_bytes) == b"onetwo"
            for path, writer in zip(paths, (*writers, writers[0]), strict=True):
                assert path.stat() == os.fstat(writer.fileno())
                assert path.stat().st_nlink == (2 if writer is writers[0] else 1)
        (small.root / "new").touch()
        assert (first.upper.fs / "new").exists() == failed
        for path in paths:
            assert path.read_bytes() == b"onetwo"
            frozen = first.upper.fs / path.relative_to(small.root)
            if failed or small.data_path is DataPath.PASSTHROUGH:
                assert frozen.read_bytes() == (b"onetwo" if failed else b"one")
        assert failed or free > 0


def leave_free_inodes(fill: Path, free: int) -> None:
    """Fill the file system that `fill` is made on, but for that many inodes."""
    fill.mkdir()
    number = 0
    with suppress(OSError):
        while True:
            (fill / f"{number}").touch()
            number += 1
    for last in range(number - free, number):
        (fill / f"{last}").unlink()


# A successor dies, too

TAKING_OVER = [
    (sandbox, "enter"),
    (worker, "_prepare"),
    (worker, "_connect"),
    (Controlled, "leave_former"),
    (Controlled, "_attend"),  # it has reported
]


@pytest.fixture
def short_lived() -> Iterator[tuple[FuseMounter, Order]]:
    """A mounter whose workers obey an order while they take over, or are found."""
    order = Order()
    with tempfile.TemporaryDirectory() as directory:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in TAKING_OVER:
                patch.setattr(owner, name, order.watched(getattr(owner, name)))
            spawner = Spawner.start()
        yield FuseMounter(spawner, Path(directory)), order
        spawner.close()


async def answered(mount: FuseMount) -> None:
    """Return when there is a worker again that answers."""
    while True:
        with suppress(Failed):
            await mount.changes()
            return
        await trio.sleep(0.005)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("data_path", RECOVERING)
async def test_death_at_each_step_of_a_recovery(
    short_lived: tuple[FuseMounter, Order], tmp_path: Path, data_path: DataPath, when: str
) -> None:
    mounter, order = short_lived
    playground = Playground(tmp_path, mounter, data_path)
    died, step = True, 0
    while died:
        step += 1
        async with playground.mounted(playground.stack()) as mount, attended(mount):
            file = os.open(playground.root / "file", os.O_RDWR | os.O_CREAT)
            (playground.root / "file").unlink()
            os.write(file, b"one")
            order.give(when, step)
            os.kill(mount.worker, signal.SIGKILL)
            await program((playground.root / "made").mkdir)
            await answered(mount)
            died = order.withdraw()
            os.write(file, b"two")
            assert os.pread(file, 9, 0) == b"onetwo", step
            os.close(file)
            assert os.listdir(playground.root) == ["made"]
    assert step == len(TAKING_OVER) + 1


@pytest.mark.parametrize("when", ["before", "after"])
async def test_death_while_another_manager_takes_over(
    short_lived: tuple[FuseMounter, Order], tmp_path: Path, when: str
) -> None:
    mounter, order = short_lived
    playground = Playground(tmp_path, mounter, DataPath.PASSTHROUGH)
    async with playground.mounted(playground.stack()) as left:
        file = os.open(playground.root / "file", os.O_RDWR | os.O_CREAT)
        order.give(when, 1)
        left._hang_up()
        mount = await mounter.adopt(left._request)
        assert mount is not None
        async with attended(mount):
            await answered(mount)
            assert order.withdraw()
            assert mount.worker != left.worker
            os.write(file, b"one")
            assert (playground.root / "file").read_bytes() == b"one"
        os.close(file)
        left._close()
        await mount.unmount()


@pytest.fixture
def failures() -> mmap.mmap:
    """In memory that the fork server shares: how many forks are to fail."""
    return mmap.mmap(-1, mmap.PAGESIZE)


@pytest.fixture
def short_of_memory(failures: mmap.mmap) -> Iterator[FuseMounter]:
    """A mounter whose fork server tries twice."""
    fork = os.fork

    def failing() -> int:
        if failures[0]:
            failures[0] -= 1
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    with tempfile.TemporaryDirectory() as directory:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fork_server, "_PAUSES", (0.0,))
            patch.setattr(os, "fork", failing)
            spawner = Spawner.start()
        yield FuseMounter(spawner, Path(directory))
        spawner.close()


async def test_a_worker_that_cannot_be_started_at_once(
    short_of_memory: FuseMounter, failures: mmap.mmap, tmp_path: Path
) -> None:
    playground = Playground(tmp_path, short_of_memory, DataPath.PASSTHROUGH)
    async with playground.mounted(playground.stack()) as mount, attended(mount):
        failures[0] = 3
        os.kill(mount.worker, signal.SIGKILL)
        await program((playground.root / "made").mkdir)
        assert failures[0] == 0


async def test_what_is_closed_during_a_recovery_leaves_no_connection(
    playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would serve it, and programs would wait for ever."""
    before = connections()
    async with playground.mounted(playground.stack()) as mount:
        os.kill(mount.worker, signal.SIGKILL)
        await mount.wait_died()
        spawn = mount._spawner.spawn
        with trio.CancelScope() as scope:

            def spawn_and_cancel(*arguments: Any) -> None:
                spawn(*arguments)
                scope.cancel()

            monkeypatch.setattr(mount._spawner, "spawn", spawn_and_cancel)
            await mount.recover()
        assert scope.cancelled_caught
        assert connections() > before
    assert connections() == before


def connections() -> int:
    """How many descriptors of FUSE connections this process has."""
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing
            links.append(os.readlink(fd))
    return links.count("/dev/fuse")


# The manager's side


async def test_what_the_plain_path_cannot_do(mounter: FuseMounter, tmp_path: Path) -> None:
    plain = Playground(tmp_path, mounter, DataPath.PLAIN)
    async with plain.mounted(plain.stack()) as mount:
        os.kill(mount.worker, signal.SIGKILL)
        await mount.wait_died()
        with pytest.raises(Failed, match="plain"):
            await mount.recover()


async def test_a_mount_that_is_gone_has_no_successor(playground: Playground) -> None:
    async with playground.mounted(playground.stack()) as mount:
        await trio.run_process(["umount", str(playground.root)])
        await mount.wait_died()
        with pytest.raises(Failed, match="is gone"):
            await mount.recover()


async def test_requests_of_the_manager_go_on(playground: Playground) -> None:
    (playground.image / "file").touch()
    async with playground.mounted(playground.stack()) as mount:
        (playground.root / "file").unlink()
        await succeed(mount)
        assert (await mount.changes()).deleted == 1
        async with mount.frozen():
            pass
        await mount.swap(playground.stack())
        assert (playground.root / "file").exists()


@pytest.mark.parametrize("moved", [True, False])
async def test_layers_are_not_exchanged_if_changes_passed_that_were_held(
    playground: Playground, moved: bool
) -> None:
    """As in the middle of Persist, or of Restore: what was written since would be lost."""
    async with playground.mounted(first := playground.stack()) as mount:
        async with mount.frozen():
            if not moved:
                await mount.swap(playground.stack(first.upper.fs))
            await succeed(mount)
            await program((playground.root / "written").touch)
            with pytest.raises(Failed, match="try again"):
                await mount.swap(playground.stack(), moved=moved)
        (playground.root / "file").touch()
        assert sorted(os.listdir(playground.root)) == ["file", "written"]
        await mount.swap(playground.stack())
        assert os.listdir(playground.root) == []


# Under load


async def under_load(playground: Playground, kills: int) -> None:
    """Kill workers while programs verify what they do; see `tests.support.load`."""
    rng = random.Random(kills)
    load = [sys.executable, "-m", "tests.support.load", str(playground.root)]
    for number in range(20):
        directory = playground.image / f"directory{number}"
        directory.mkdir()
        for name in range(20):
            (directory / f"file{name}").write_text(f"{number}/{name}\n" * 100)
    async with playground.mounted(playground.stack()) as mount:
        process = await trio.lowlevel.open_process(load)
        for _ in range(kills):
            with trio.move_on_after(rng.uniform(0.03, 0.3)):
                await process.wait()
            if process.returncode is not None:
                break
            await succeed(mount)
        if process.returncode is None:
            process.terminate()
        with trio.fail_after(60):
            assert await process.wait() == 0


async def test_load(playground: Playground) -> None:
    await under_load(playground, 12)


@pytest.mark.soak
@pytest.mark.timeout(0)
async def test_load_for_long(playground: Playground) -> None:
    await under_load(playground, round(200 * factor()))


async def test_the_load_finds_what_is_wrong(tmp_path: Path) -> None:
    """A directory of the host, in which somebody else removes a file, is not what it expects."""
    async with trio.open_nursery() as nursery:
        load = [sys.executable, "-m", "tests.support.load", str(tmp_path)]
        run = functools.partial(trio.run_process, load, check=False, capture_stderr=True)
        process: trio.Process = await nursery.start(run)
        await until((tmp_path / "database").exists)
        await until((tmp_path / "listed/00000").exists)
        (tmp_path / "listed/00000").unlink()
        with trio.fail_after(60):
            assert await process.wait() == 1
