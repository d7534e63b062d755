"""What differs between data paths, and what must not: descriptors, mappings, holes, numbers."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from sessiond.session.model import DataPath, Stack
from tests.fuse.conftest import Playground
from tests.support.sessiond_overlay import COMMAND, REPOSITORY
from tests.support.waiting import until

pytestmark = pytest.mark.root

PAGE = 4096


async def blocking(work: Callable[[], None]) -> None:
    """Run something long on the mount without holding up the mount's own loop."""
    await trio.to_thread.run_sync(work)


async def test_the_data_path_asked_for_is_in_use(
    playground: Playground, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with playground.mounted(playground.stack()):
        assert f"data path of session test is {playground.data_path};" in caplog.text


async def test_descriptors_from_before_and_after_a_copy_up(playground: Playground) -> None:
    (playground.image / "file").write_bytes(b"before")
    async with playground.mounted(playground.stack()):
        path = playground.root / "file"
        with open(path, "rb", buffering=0) as old:
            assert old.read(3) == b"bef"
            with open(path, "r+b", buffering=0) as writer, open(path, "rb", buffering=0) as new:
                writer.write(b"after!")
                assert new.read() == b"after!"
                expected = b"er!" if playground.descriptors_follow_copy_ups else b"ore"
                assert old.read() == expected
                for descriptor in (old, new, writer):
                    assert os.fstat(descriptor.fileno()).st_ino == path.stat().st_ino
                path.chmod(0o640)
                for descriptor in (old, new, writer):
                    assert os.fstat(descriptor.fileno()).st_mode & 0o777 == 0o640
                os.fchmod(old.fileno(), 0o600)
                assert os.fstat(new.fileno()).st_mode & 0o777 == 0o600
                assert path.stat().st_mode & 0o777 == 0o600
                assert os.fstat(old.fileno()).st_size == 6
        assert path.read_bytes() == b"after!"
    assert (playground.image / "file").read_bytes() == b"before"


async def test_what_is_replaced_needs_no_room(playground: Playground) -> None:
    """As editors save: whoever has the file open goes on with what was in it."""
    text = b"a" * (2 << 20)
    async with playground.on_small_disk("5m") as small:
        frozen = small.image.parent / "frozen"  # what the image has, the extension answers for
        frozen.mkdir()
        for name in ("open", "closed"):
            (frozen / name).write_bytes(text)
        async with small.mounted(small.stack(frozen)):
            with open(small.root / "open", "rb", buffering=0) as old:
                assert old.read(PAGE) == text[:PAGE]
                for name in ("open", "closed"):
                    assert (small.root / name).stat().st_size == len(text)
                    (small.root / "new").write_bytes(b"new")
                    os.rename(small.root / "new", small.root / name)
                    assert (small.root / name).read_bytes() == b"new"
                assert os.fstat(old.fileno()).st_nlink == 0
                assert os.pread(old.fileno(), len(text) + 1, 0) == text
            assert sorted(os.listdir(small.root)) == ["closed", "open"]


@pytest.mark.parametrize("kind", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
async def test_mappings_from_before_and_after_a_copy_up(playground: Playground, kind: int) -> None:
    (playground.image / "file").write_bytes(b"a" * PAGE)
    async with playground.mounted(playground.stack()):
        path = playground.root / "file"
        with (
            open(path, "rb") as reader,
            mmap.mmap(reader.fileno(), PAGE, kind, mmap.PROT_READ) as old,
            open(path, "r+b", buffering=0) as writer,
            mmap.mmap(writer.fileno(), PAGE, kind) as new,
        ):
            assert old[:2] == b"aa"
            new[0] = ord("b")
            new.flush()
            expected = b"ba" if kind == mmap.MAP_SHARED else b"aa"
            assert path.read_bytes()[:2] == expected
            os.pwrite(writer.fileno(), b"c", 1)
            assert new[1:2] == b"c" or kind == mmap.MAP_PRIVATE
            if playground.data_path is DataPath.PASSTHROUGH:
                assert old[:2] == b"aa"
    assert (playground.image / "file").read_bytes() == b"a" * PAGE


async def test_a_mapping_changes_the_time(playground: Playground) -> None:
    async with playground.mounted(playground.stack()):
        path = playground.root / "file"
        path.write_bytes(b"a" * PAGE)
        os.utime(path, (1, 1))
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), PAGE) as pages:
            pages[0] = ord("b")
            pages.flush()
        await until(lambda: path.stat().st_mtime > 1)


async def test_a_program_goes_on_while_it_is_copied_up(playground: Playground) -> None:
    program = playground.image / "program"
    shutil.copy(shutil.which("cat") or "/bin/cat", program)
    async with playground.mounted(playground.stack()):
        path = playground.root / "program"

        def run() -> None:
            with subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
                assert running.stdin is not None
                assert running.stdout is not None
                running.stdin.write(b"one\n")
                running.stdin.flush()
                assert running.stdout.readline() == b"one\n"
                with pytest.raises(OSError, match="busy") as refused:
                    path.open("r+b")
                assert refused.value.errno == errno.ETXTBSY
                path.chmod(0o700)  # copies it up
                assert subprocess.run([path], input=b"two", capture_output=True).stdout == b"two"
                running.stdin.write(b"three\n")
                running.stdin.close()
                assert running.stdout.read() == b"three\n"

        await blocking(run)
        assert path.read_bytes() == program.read_bytes()


async def test_many_openers_at_once(playground: Playground) -> None:
    """Some read, some write, all meet the moment of copy-up; each sees a whole file."""
    (playground.image / "file").write_bytes(b"x" * 100_000)
    async with playground.mounted(playground.stack()):
        path = playground.root / "file"
        failures: list[BaseException] = []
        ready = threading.Barrier(12)

        def use(number: int) -> None:
            try:
                ready.wait()
                for _ in range(40):
                    if number % 3:
                        content = path.read_bytes()
                        assert len(content) == 100_000
                    else:
                        with open(path, "r+b", buffering=0) as file:
                            os.pwrite(file.fileno(), b"y", number)
            except BaseException as error:
                failures.append(error)

        def run() -> None:
            threads = [threading.Thread(target=use, args=(number,)) for number in range(12)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        await blocking(run)
        assert not failures
        assert path.read_bytes() == b"yxxyxxyxxy" + b"x" * 99_990
    assert (playground.image / "file").read_bytes() == b"x" * 100_000


async def test_holes(playground: Playground) -> None:
    with (playground.image / "sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"data")
    async with playground.mounted(playground.stack()):
        path = playground.root / "sparse"
        for flags in (os.O_RDONLY, os.O_RDWR):  # in the lower, and copied up
            fd = os.open(path, flags)
            if playground.data_path is DataPath.PLAIN:  # pyfuse3 alone does not tell of holes
                assert os.lseek(fd, 0, os.SEEK_DATA) == 0
                os.close(fd)
                continue
            assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 20
            assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
            assert os.lseek(fd, 1 << 20, os.SEEK_HOLE) == (1 << 20) + 4
            with pytest.raises(OSError, match="No such device or address"):
                os.lseek(fd, 1 << 21, os.SEEK_DATA)
            os.close(fd)


async def test_preallocating_and_punching(playground: Playground) -> None:
    (playground.image / "file").write_bytes(b"z" * 3 * PAGE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    keep_size, punch_hole = 1, 2
    async with playground.mounted(playground.stack()):
        path = playground.root / "file"
        with open(path, "r+b", buffering=0) as file:
            if playground.data_path is DataPath.PLAIN:  # pyfuse3 alone cannot
                assert libc.fallocate(file.fileno(), 0, 0, 8 * PAGE) == -1
                assert ctypes.get_errno() == errno.EOPNOTSUPP
                return
            assert libc.fallocate(file.fileno(), keep_size | punch_hole, PAGE, PAGE) == 0
            assert libc.fallocate(file.fileno(), 0, 0, 8 * PAGE) == 0
            assert os.fstat(file.fileno()).st_size == 8 * PAGE
        content = path.read_bytes()
        assert content[PAGE - 1 : PAGE + 1] == b"z\0"
        assert content[2 * PAGE - 1 : 2 * PAGE + 1] == b"\0z"
        assert len(content) == 8 * PAGE


async def test_copying_ranges(playground: Playground) -> None:
    data = os.urandom(200_000)
    (playground.image / "source").write_bytes(data)
    async with playground.mounted(playground.stack()):
        source, target = playground.root / "source", playground.root / "target"
        source.chmod(0o600)  # on the same file system as the target
        with open(source, "rb") as reader, open(target, "wb") as writer:
            copied = 0
            while copied < len(data):
                copied += os.copy_file_range(
                    reader.fileno(), writer.fileno(), len(data) - copied, copied, copied
                )
        assert target.read_bytes() == data


async def test_inode_numbers_are_those_of_the_first_look(playground: Playground) -> None:
    """A new number for the kernel is none for programs."""
    (playground.image / "file").write_bytes(b"before")
    async with playground.mounted(playground.stack()):
        path = playground.root / "file"
        number = path.stat().st_ino
        with open(path, "rb"):
            path.write_bytes(b"after")
            assert path.stat().st_ino == number
            with os.scandir(playground.root) as entries:
                assert {entry.name: entry.inode() for entry in entries} == {"file": number}


async def test_listings_follow_changes_made_while_they_are_read(playground: Playground) -> None:
    """Once through with removals, then again from the start, on one descriptor."""
    directory = playground.image / "directory"
    directory.mkdir()
    names = {f"entry-{number:04}" for number in range(1500)}
    for name in names:
        (directory / name).touch()
    async with playground.mounted(playground.stack()):
        root = playground.root / "directory"

        def remove_while_listing() -> None:
            listed = []
            with os.scandir(root) as entries:
                for entry in entries:
                    listed.append(entry.name)
                    os.unlink(entry.path)
            assert sorted(listed) == sorted(names)
            assert not os.listdir(root)

        await blocking(remove_while_listing)

        def rewind() -> None:
            fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
            assert os.listdir(fd) == []
            (root / "new").touch()
            assert os.listdir(fd) == ["new"]  # rewinds
            os.close(fd)

        await blocking(rewind)


async def test_rewinding_a_listing_of_the_image(playground: Playground) -> None:
    directory = playground.image / "directory"
    directory.mkdir()
    (directory / "old").touch()
    async with playground.mounted(playground.stack()):
        fd = os.open(playground.root / "directory", os.O_RDONLY | os.O_DIRECTORY)
        assert os.listdir(fd) == ["old"]
        os.rename(playground.root / "directory/old", playground.root / "directory/renamed")
        assert os.listdir(fd) == ["renamed"]
        os.close(fd)


async def test_objects_of_the_image_after_changes_beside_them(playground: Playground) -> None:
    """What was answered for the image stays right when its directory gets into the upper."""
    (playground.image / "a/b").mkdir(parents=True)
    for name in ("a/one", "a/two", "a/b/three"):
        (playground.image / name).write_text(name)
    async with playground.mounted(playground.stack()):
        root = playground.root
        before = {name: (root / name).stat().st_ino for name in ("a/one", "a/two", "a/b/three")}
        assert not (root / "a/new").exists()
        (root / "a/new").write_text("new")
        (root / "a/one").unlink()
        os.rename(root / "a/b", root / "a/c")
        assert (root / "a/new").read_text() == "new"
        assert not (root / "a/one").exists()
        assert not (root / "a/b").exists()
        assert (root / "a/c/three").read_text() == "a/b/three"
        assert (root / "a/two").stat().st_ino == before["a/two"]
        assert (root / "a/c/three").stat().st_ino == before["a/b/three"]
        assert {entry.name for entry in (root / "a").iterdir()} == {"two", "c", "new"}


async def test_removed_files_free_their_space(playground: Playground) -> None:
    async with playground.mounted(first := playground.stack()):
        path = playground.root / "file"
        path.write_bytes(b"x" * PAGE)
        assert path.read_bytes()
        held = first.upper.fs / "file"
        inode = held.stat().st_ino
        path.unlink()
        assert not held.exists()
        assert inode


async def test_an_unknown_data_path_is_refused(
    playground: Playground, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result = await trio.run_process(
        [*COMMAND, "-o", f"lowerdir={tmp_path}", str(playground.root)],
        env={**os.environ, "SESSIOND_DATAPATH": "fast"},
        cwd=REPOSITORY,
        check=False,
        capture_stderr=True,
    )
    assert result.returncode == 2
    assert b"data path 'fast' is none" in result.stderr


async def test_layers_on_a_stacked_file_system(playground: Playground, tmp_path: Path) -> None:
    """The kernel refuses passthrough for these: the extension reads and writes them itself."""
    for name in ("below", "changes", "work", "stacked"):
        (tmp_path / name).mkdir()
    (tmp_path / "below/file").write_bytes(b"a" * 2 * PAGE)
    options = f"lowerdir={tmp_path}/below,upperdir={tmp_path}/changes,workdir={tmp_path}/work"
    stacked = tmp_path / "stacked"
    await trio.run_process(["mount", "-t", "overlay", "-o", options, "stacked", stacked])
    try:
        own = playground.stack()
        reachable = (own.upper.fs.parent, stacked)
        async with playground.mounted(Stack(own.upper, (stacked,)), reachable):
            path = playground.root / "file"
            with open(path, "rb") as old:
                assert old.read(1) == b"a"
                with open(path, "r+b") as file, mmap.mmap(file.fileno(), PAGE) as pages:
                    pages[0] = ord("b")
                    pages.flush()
                    os.pwrite(file.fileno(), b"c", PAGE)
                    assert path.read_bytes()[:2] == b"ba"
                    assert path.read_bytes()[PAGE : PAGE + 2] == b"ca"
            assert os.stat(path).st_size == 2 * PAGE
    finally:
        await trio.run_process(["umount", "-l", stacked])


def test_without_the_extension(tmp_path: Path) -> None:
    """What cannot be built is not missed, but for its speed."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower/file").write_text("lower")
    program = (
        "import sys; sys.modules['sessiond.fuse._kernel_io'] = None\n"
        "from sessiond.fuse import data_path, mount\n"
        "assert data_path.available() == ['plain'], data_path.available()\n"
        "assert data_path.choose('passthrough') == 'plain'\n"
        f"options = 'lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work'\n"
        f"sys.exit(mount.main(['-o', options, '{tmp_path}/merged']))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    try:
        assert (tmp_path / "merged/file").read_text() == "lower"
        (tmp_path / "merged/file").write_text("changed")
        assert (tmp_path / "merged/file").read_text() == "changed"
        assert (tmp_path / "upper/file").read_text() == "changed"
    finally:
        subprocess.run(["umount", tmp_path / "merged"], check=True)
