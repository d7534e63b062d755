"""Reset, snapshot and restore as the merged view sees them, with files open and programs inside."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from sessiond.errors import Failed
from sessiond.fuse import device
from sessiond.session.model import DataPath, Stack, UpperDirectories
from tests.fuse.conftest import Playground
from tests.support.waiting import until

LARGE = 24 << 20


async def test_reset_shows_the_image_again(playground: Playground) -> None:
    (playground.image / "kept").write_text("image")
    (playground.image / "deleted").write_text("image")
    (playground.image / "directory").mkdir()
    async with playground.mounted(playground.stack()) as mount:
        root = playground.root
        (root / "kept").write_text("changed")
        (root / "deleted").unlink()
        (root / "directory").rename(root / "moved")
        (root / "added").write_text("new")
        assert not (root / "directory").exists()
        await mount.swap(playground.stack())
        assert sorted(os.listdir(root)) == ["deleted", "directory", "kept"]
        assert (root / "kept").read_text() == "image"
        assert (root / "deleted").read_text() == "image"
        assert (root / "directory").is_dir()
        assert not (root / "added").exists()


async def test_a_removed_file_of_the_image_outlives_a_reset(playground: Playground) -> None:
    (playground.image / "file").write_text("image")
    async with playground.mounted(playground.stack()) as mount:
        with open(playground.root / "file") as file:
            (playground.root / "file").unlink()
            for _ in range(2):
                await mount.swap(playground.stack())
                assert os.fstat(file.fileno()).st_nlink == 0
            assert file.read() == "image"
        assert (playground.root / "file").read_text() == "image"


@pytest.mark.parametrize("change", ["snapshot", "reset"])
async def test_what_is_mounted_inside_outlives_a_swap(playground: Playground, change: str) -> None:
    """As are /proc and /dev in a session that programs are started in."""
    (playground.image / "system/proc/below").mkdir(parents=True)
    async with playground.mounted(first := playground.stack()) as mount:
        inside = playground.root / "system/proc"
        (playground.root / "file").write_text("first")
        (playground.root / "system/changed").touch()
        cwd = os.open(inside, os.O_PATH)
        await trio.run_process(["mount", "-t", "tmpfs", "inside", inside])
        try:
            (inside / "mounted").touch()
            committed = (first.upper.fs,) if change == "snapshot" else ()
            await mount.swap(playground.stack(*committed))
            assert os.listdir(inside) == ["mounted"]
            assert (playground.root / "file").exists() == bool(committed)
            assert (playground.root / "system/changed").exists() == bool(committed)
            (playground.root / "file").write_text("second")
            assert (playground.root / "file").read_text() == "second"
            assert (first.upper.fs / "file").read_text() == "first"
            assert os.readlink(f"/proc/self/fd/{cwd}") == str(inside)
        finally:
            os.close(cwd)
            await trio.run_process(["umount", inside])


async def test_who_works_in_a_directory_goes_on_after_a_reset(playground: Playground) -> None:
    (playground.image / "home/user/work").mkdir(parents=True)
    async with playground.mounted(playground.stack()) as mount:
        work = playground.root / "home/user/work"
        (work / "file").touch()
        directory = os.open(work, os.O_PATH)
        try:
            await mount.swap(playground.stack())
            assert not (work / "file").exists()
            assert os.readlink(f"/proc/self/fd/{directory}") == str(work)
            os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
        finally:
            os.close(directory)
        assert os.listdir(work) == ["new"]


async def test_who_works_in_a_directory_that_a_reset_takes_away(playground: Playground) -> None:
    """As after rm -r; and directories that are made in its place are not taken for it."""
    first = playground.stack()
    async with playground.mounted(first) as mount:
        made = playground.root / "made"
        (made / "below/deep").mkdir(parents=True)
        for number in range(3000):
            (made / "below" / f"{number}").touch()
        directory = os.open(made / "below", os.O_RDONLY)
        try:
            await mount.swap(playground.stack())
            assert not made.exists()
            assert os.listdir(directory) == []
            with pytest.raises(FileNotFoundError):
                os.open("7", os.O_RDONLY, dir_fd=directory)
            with pytest.raises(FileNotFoundError):
                os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=directory)
        finally:
            os.close(directory)


@pytest.mark.parametrize("again", ["made", "restored"])
async def test_directories_that_come_again_after_a_reset(
    playground: Playground, again: str
) -> None:
    """Made anew, or the very same by a restore, while the kernel drops what it had of them."""
    first = playground.stack()
    names = [f"made-{number}" for number in range(20)]
    for name in names:
        (first.upper.fs / name).mkdir()
        for number in range(50):
            (first.upper.fs / name / f"{number}").touch()
    directories = [playground.root / name for name in names]
    async with playground.mounted(first) as mount:
        known = [entry.stat() for directory in directories for entry in os.scandir(directory)]
        assert len(known) == 1000
        await mount.swap(playground.stack())
        if again == "restored":
            await mount.swap(playground.stack(first.upper.fs))
        for directory in directories:
            directory.mkdir(exist_ok=True)
            (directory / "inside").mkdir()
        await trio.run_process(["mount", "-t", "tmpfs", "inside", directories[0] / "inside"])
        try:
            (directories[0] / "inside/mounted").touch()
            for directory in directories:
                (directory / "new").touch()
                assert {"inside", "new"} <= set(os.listdir(directory))
            assert os.listdir(directories[0] / "inside") == ["mounted"]
        finally:
            await trio.run_process(["umount", directories[0] / "inside"])


async def test_a_file_of_a_snapshot_that_is_open(playground: Playground) -> None:
    first = playground.stack()
    async with playground.mounted(first) as mount:
        (playground.root / "file").write_text("snapshot")
        await mount.swap(playground.stack(first.upper.fs))
        with open(playground.root / "file") as reader:
            await mount.swap(playground.stack())
            assert not (playground.root / "file").exists()
            assert reader.read() == "snapshot"


async def test_names_that_the_kernel_knows_to_be_missing(playground: Playground) -> None:
    """Deleted ones, and such as a snapshot has: more than the worker can keep in mind, too."""
    names = [f"{number:0200}" for number in range(6000)]
    (playground.image / "directory").mkdir()
    (playground.image / "deleted").touch()
    first, second = playground.stack(), playground.stack()
    (second.upper.fs / "directory").mkdir()
    for name in (*names, "late"):
        (second.upper.fs / "directory" / name).touch()
    async with playground.mounted(first) as mount:
        (playground.root / "deleted").unlink()
        for _ in range(2):
            assert not (playground.root / "deleted").exists()
            for name in (*names, "late"):
                assert not (playground.root / "directory" / name).exists()
        await mount.swap(second)
        assert (playground.root / "deleted").exists()
        assert all((playground.root / "directory" / name).exists() for name in (*names, "late"))
        await mount.swap(playground.stack())
        assert not any((playground.root / "directory" / name).exists() for name in names)


async def test_contents_that_only_the_image_had_before(playground: Playground) -> None:
    """Files of one size and number: what was kept open of the one must not be read as the other."""
    (playground.image / "file").write_text("image")
    async with playground.mounted(changed := playground.stack()):
        (playground.root / "file").write_text("upper")
    async with playground.mounted(playground.stack()) as mount:
        assert (playground.root / "file").read_text() == "image"
        held = os.open(playground.root / "file", os.O_PATH)  # or the kernel would forget it
        for layers, contents in (((changed.upper.fs,), "upper"), ((), "image")):
            await mount.swap(playground.stack(*layers))
            assert (playground.root / "file").read_text() == contents
        os.close(held)


async def test_open_files_outlive_a_reset(playground: Playground) -> None:
    (playground.image / "file").write_text("image")
    async with playground.mounted(playground.stack()) as mount:
        root = playground.root
        with open(root / "file", "r+b", buffering=0) as changed:
            changed.write(b"chang")
            with open(root / "new", "w+b", buffering=0) as added:
                added.write(b"added")
                await mount.swap(playground.stack())
                assert os.pread(changed.fileno(), 9, 0) == b"chang"
                assert os.pread(added.fileno(), 9, 0) == b"added"
                added.write(b" more")
                assert os.pread(added.fileno(), 99, 0) == b"added more"
                assert os.fstat(added.fileno()).st_nlink == 0
                assert os.fstat(added.fileno()).st_size == 10
                os.ftruncate(added.fileno(), 2)
                assert os.pread(added.fileno(), 99, 0) == b"ad"
        assert (root / "file").read_text() == "image"
        assert not (root / "new").exists()


async def test_untouched_files_keep_their_inode_over_a_reset(playground: Playground) -> None:
    (playground.image / "file").write_text("image")
    async with playground.mounted(playground.stack()) as mount:
        path = playground.root / "file"
        with open(path, "rb", buffering=0) as reader:
            before = os.fstat(reader.fileno())
            await mount.swap(playground.stack())
            assert os.path.samestat(before, path.stat())
            assert os.fstat(reader.fileno()).st_nlink == 1
            path.write_text("later")
            expected = b"later" if playground.descriptors_follow_copy_ups else b"image"
            assert os.pread(reader.fileno(), 9, 0) == expected


async def test_working_directories_outlive_a_reset(playground: Playground) -> None:
    (playground.image / "home").mkdir()
    async with playground.mounted(playground.stack()) as mount:
        (playground.root / "home/file").write_text("x")
        (playground.root / "gone").mkdir()
        home = os.open(playground.root / "home", os.O_RDONLY)
        gone = os.open(playground.root / "gone", os.O_RDONLY)
        try:
            await mount.swap(playground.stack())
            assert os.listdir(home) == []
            os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=home))
            assert os.listdir(playground.root / "home") == ["new"]
            # Like a directory that rmdir(2) has removed.
            assert os.fstat(gone).st_nlink == 0
            assert os.listdir(gone) == []
            with pytest.raises(FileNotFoundError):
                os.mkdir("new", dir_fd=gone)
        finally:
            os.close(home)
            os.close(gone)


async def test_a_running_program_goes_on_over_resets(playground: Playground) -> None:
    program = "import os, sys\nfor line in sys.stdin: print(os.getcwd(), os.listdir(), flush=True)"
    (playground.image / "home").mkdir()
    async with playground.mounted(playground.stack()) as mount:
        home = playground.root / "home"
        inside = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert inside.stdin is not None
        assert inside.stdout is not None
        with inside:
            for _ in range(3):
                (home / "file").write_text("x")
                await mount.swap(playground.stack())
                inside.stdin.write("?\n")
                answer = await trio.to_thread.run_sync(inside.stdout.readline)
                assert answer == f"{home} []\n"
            inside.stdin.close()
        assert inside.returncode == 0


async def test_a_snapshot_keeps_what_was_written_before(playground: Playground) -> None:
    async with playground.mounted(first := playground.stack()) as mount:
        root = playground.root
        with open(root / "log", "wb", buffering=0) as log:
            log.write(b"before")
            second = playground.stack(first.upper.fs)
            await mount.swap(second)
            log.write(b" after")
            assert (root / "log").read_bytes() == b"before after"
        assert (first.upper.fs / "log").read_bytes() == b"before"
        await mount.swap(playground.stack(first.upper.fs))
        assert (root / "log").read_bytes() == b"before"


async def test_st_ino_survives_copy_up_and_snapshot(playground: Playground) -> None:
    (playground.image / "file").write_text("image")
    (playground.image / "directory").mkdir()
    async with playground.mounted(first := playground.stack()) as mount:
        names = ("file", "directory")
        before = [(playground.root / name).stat().st_ino for name in names]
        (playground.root / "file").write_text("changed")
        (playground.root / "directory/entry").write_text("")
        await mount.swap(playground.stack(first.upper.fs))
        assert [(playground.root / name).stat().st_ino for name in names] == before


async def test_a_snapshot_says_what_was_written_to_meanwhile(playground: Playground) -> None:
    script = (
        "import os, sys\n"
        "file = os.open(sys.argv[1], os.O_WRONLY)\n"
        "print(flush=True)\n"
        "while os.write(file, b'x' * 4096): os.lseek(file, 0, os.SEEK_SET)"
    )
    committed: list[Path] = []
    async with playground.mounted(stack := playground.stack()) as mount:

        async def snapshot() -> tuple[str, ...]:
            nonlocal stack
            committed.insert(0, stack.upper.fs)
            return await mount.swap(stack := playground.stack(*committed))

        for name in ("busy", "open", "closed"):
            (playground.root / name).write_bytes(b"a" * (4 << 20))
        with (
            open(playground.root / "open", "r+b"),
            subprocess.Popen(
                [sys.executable, "-c", script, playground.root / "busy"], stdout=subprocess.PIPE
            ) as writer,
        ):
            try:
                assert writer.stdout is not None
                await trio.to_thread.run_sync(writer.stdout.readline)
                told = await snapshot()
                # It may happen not to run in these milliseconds, but not for ever.
                while playground.data_path is DataPath.PASSTHROUGH and not told:
                    told = await snapshot()
            finally:
                writer.kill()
        assert told == (("/busy",) if playground.data_path is DataPath.PASSTHROUGH else ())
        # Now nobody writes.
        with open(playground.root / "busy", "r+b"):
            assert await snapshot() == ()


async def test_a_number_that_is_a_files_now_is_announced_in_vain(playground: Playground) -> None:
    """It was that of a directory, now removed, in which the kernel knew a name to be missing."""
    async with playground.mounted(playground.stack()) as mount:
        file = playground.root / "file"
        file.write_text("text")
        names = [(file.stat().st_ino, b"missing")]
        await trio.to_thread.run_sync(device.expire, mount.device, names)


async def test_a_shared_mapping_of_a_snapshot_file_goes_on(playground: Playground) -> None:
    (playground.image / "file").write_bytes(b"a" * 4096)
    async with playground.mounted(first := playground.stack()) as mount:
        with open(playground.root / "file", "r+b") as file, mmap.mmap(file.fileno(), 4096) as pages:
            pages[0] = ord("b")
            pages.flush()
            await mount.swap(playground.stack(first.upper.fs))
            pages[1] = ord("c")
            pages.flush()
            assert (playground.root / "file").read_bytes()[:3] == b"bca"
        assert (first.upper.fs / "file").read_bytes()[:3] == b"baa"


async def test_a_mapping_that_outlives_its_descriptor(playground: Playground) -> None:
    async with playground.mounted(first := playground.stack()) as mount:
        path = playground.root / "file"
        path.write_bytes(b"a" * 4096)
        with open(path, "r+b") as file:
            pages = mmap.mmap(file.fileno(), 4096)
        with pages:
            pages[0] = ord("b")
            pages.flush()
            await mount.swap(playground.stack(first.upper.fs))
            pages[1] = ord("c")
            pages.flush()
            assert path.read_bytes()[:3] == b"bca"
        assert (first.upper.fs / "file").read_bytes()[:3] == b"baa"


async def test_open_files_go_on_in_copies_of_their_layers(playground: Playground) -> None:
    (playground.image / "lower").write_text("image")
    async with playground.mounted(first := playground.stack()) as mount:
        root = playground.root
        with (
            open(root / "upper", "w+b", buffering=0) as upper,
            open(root / "lower", "rb", buffering=0) as lower,
            open(root / "unlinked", "w+b", buffering=0) as unlinked,
        ):
            upper.write(b"before")
            unlinked.write(b"before")
            (root / "unlinked").unlink()
            second = playground.stack()
            async with mount.frozen():
                for source in first.upper.fs.iterdir():
                    await trio.run_process(["cp", "-a", source, second.upper.fs])
                await mount.swap(second, moved=True)
            upper.write(b" after")
            unlinked.write(b" after")
            if playground.data_path is DataPath.PASSTHROUGH:
                # The kernel writes where it was opened; fsync(2) gets it to where it belongs.
                assert (second.upper.fs / "upper").read_bytes() == b"before"
                assert (root / "upper").read_bytes() == b"before after"
                assert (root / "upper").stat().st_size == 12
                os.fsync(upper.fileno())
            else:
                assert (first.upper.fs / "upper").read_bytes() == b"before"
            assert (second.upper.fs / "upper").read_bytes() == b"before after"
            assert os.pread(upper.fileno(), 99, 0) == b"before after"
            assert os.pread(unlinked.fileno(), 99, 0) == b"before after"
            assert os.path.samestat(os.fstat(upper.fileno()), (root / "upper").stat())
            (root / "lower").write_text("changed")
            expected = b"changed" if playground.descriptors_follow_copy_ups else b"image"
            assert os.pread(lower.fileno(), 99, 0) == expected
            upper.write(b", and after fsync")
        await until(
            lambda: (second.upper.fs / "upper").read_bytes() == b"before after, and after fsync"
        )
        assert (root / "upper").read_bytes() == b"before after, and after fsync"


async def test_a_swap_that_cannot_be_leaves_all_as_it_was(playground: Playground) -> None:
    async with playground.mounted(playground.stack()) as mount:
        (playground.root / "file").write_text("x")
        missing = Path("/nonexistent/fs")
        with pytest.raises(Failed, match="does not exist"):
            await mount.swap(Stack(UpperDirectories(missing, missing), (playground.image,)))
        assert (playground.root / "file").read_text() == "x"
        (playground.root / "file").write_text("y")


async def test_frozen_holds_changes_back_and_lets_reads_pass(playground: Playground) -> None:
    (playground.image / "file").write_text("image")
    async with playground.mounted(stack := playground.stack()) as mount:
        # Opened before: who creates holds the directory's lock, so that no name in it can be looked
        # up until the change passes.
        with open(playground.root / "file", "rb", buffering=0) as file:
            async with mount.frozen():
                writer = subprocess.Popen(["touch", playground.root / "new"])

                def waits() -> bool:
                    where = Path("/proc", str(writer.pid), "wchan").read_text()
                    return where == "request_wait_answer"

                await until(waits)
                await mount.changes()  # the worker has been round once more
                await until(waits)  # what it waited for before may have been the look-up
                assert os.pread(file.fileno(), 9, 0) == b"image"
                assert not (stack.upper.fs / "new").exists()
        assert await trio.to_thread.run_sync(writer.wait) == 0
        assert (playground.root / "new").exists()


async def test_a_swap_while_frozen_does_not_wait_for_those_that_are_held(
    playground: Playground,
) -> None:
    """They hold the lock of a directory, which it takes to tell the kernel that names are old."""
    (playground.image / "file").write_text("image")
    async with playground.mounted(playground.stack()) as mount:
        root = playground.root
        (root / "file").write_text("changed")
        held = os.open(root / "file", os.O_PATH)
        with trio.fail_after(30):
            async with mount.frozen():
                writer = subprocess.Popen(["touch", root / "new"])
                wchan = Path("/proc", str(writer.pid), "wchan")
                await until(lambda: wchan.read_text() == "request_wait_answer")
                await mount.swap(playground.stack())
        assert (root / "file").read_text() == "image"
        os.close(held)
        assert await trio.to_thread.run_sync(writer.wait) == 0
        assert (root / "new").exists()


async def test_a_swap_during_large_copy_ups_loses_no_write(playground: Playground) -> None:
    for number in range(4):
        (playground.image / f"file{number}").write_bytes(b"x" * LARGE)

    def change(number: int) -> None:
        with open(playground.root / f"file{number}", "r+b") as file:
            file.write(b"changed")

    async with playground.mounted(first := playground.stack()) as mount:
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(trio.to_thread.run_sync, change, number)
            await mount.swap(playground.stack(first.upper.fs))
        for number in range(4):
            contents = (playground.root / f"file{number}").read_bytes()
            assert contents == b"changed" + b"x" * (LARGE - 7)


async def test_many_openers_of_one_large_file(playground: Playground) -> None:
    (playground.image / "file").write_bytes(b"x" * LARGE)

    def change(number: int) -> None:
        fd = os.open(playground.root / "file", os.O_RDWR)
        try:
            os.pwrite(fd, b"%d" % number, number)
        finally:
            os.close(fd)

    async with playground.mounted(stack := playground.stack()):
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(trio.to_thread.run_sync, change, number)
        assert (playground.root / "file").read_bytes()[:9] == b"01234567x"
    assert os.listdir(stack.upper.work / "work") == []


async def test_image_is_never_written(playground: Playground) -> None:
    (playground.image / "file").write_text("image")
    os.utime(playground.image / "file", ns=(1, 1))
    async with playground.mounted(playground.stack()):
        (playground.root / "file").read_text()
        with open(playground.root / "file", "a") as file:
            file.write("more")
        (playground.root / "file").chmod(0o600)
    stat = (playground.image / "file").stat()
    assert (stat.st_atime_ns, stat.st_mtime_ns) == (1, 1)
    assert (playground.image / "file").read_text() == "image"


async def test_unlinked_open_file_outlives_a_snapshot(playground: Playground) -> None:
    async with playground.mounted(first := playground.stack()) as mount:
        with open(playground.root / "file", "w+b", buffering=0) as file:
            file.write(b"x")
            (playground.root / "file").unlink()
            await mount.swap(playground.stack(first.upper.fs))
            file.write(b"y")
            assert os.pread(file.fileno(), 9, 0) == b"xy"
            with pytest.raises(OSError) as caught:
                os.link(f"/proc/self/fd/{file.fileno()}", playground.root / "again")
            assert caught.value.errno in {errno.ENOENT, errno.EXDEV}


async def test_a_restore_shows_what_the_snapshot_had(playground: Playground) -> None:
    """Also of objects of the image that only the fast path has known so far."""
    for name in ("a/kept", "a/deleted", "a/changed", "a/b/deep"):
        (playground.image / name).parent.mkdir(parents=True, exist_ok=True)
        (playground.image / name).write_text("image")
    root = playground.root
    async with playground.mounted(first := playground.stack()) as mount:
        (root / "a/deleted").unlink()
        (root / "a/b/deep").unlink()
        (root / "a/changed").write_text("snapshot")
        await mount.swap(playground.stack())
        assert sorted(path.name for path in (root / "a").iterdir()) == [
            "b", "changed", "deleted", "kept"
        ]  # fmt: skip
        reads = {name: (root / "a" / name).read_text() for name in ("kept", "deleted", "changed")}
        assert set(reads.values()) == {"image"}
        assert (root / "a/b/deep").read_text() == "image"
        await mount.swap(playground.stack(first.upper.fs))
        assert not (root / "a/deleted").exists()
        assert not (root / "a/b/deep").exists()
        assert (root / "a/changed").read_text() == "snapshot"
        assert sorted(path.name for path in (root / "a").iterdir()) == ["b", "changed", "kept"]
        assert not list((root / "a/b").iterdir())
        (root / "a/kept").write_text("later")
        await mount.swap(playground.stack())
        assert (root / "a/kept").read_text() == "image"
        assert (root / "a/b/deep").read_text() == "image"


async def test_hard_links_of_a_file_that_is_written_over_a_snapshot(
    playground: Playground,
) -> None:
    root = playground.root
    async with playground.mounted(first := playground.stack()) as mount:
        with open(root / "one", "wb", buffering=0) as file:
            file.write(b"before")
            (root / "directory").mkdir()
            os.link(root / "one", root / "directory/two")
            await mount.swap(playground.stack(first.upper.fs))
            file.write(b" after")
            assert (root / "one").read_bytes() == b"before after"
            for name in ("one", "directory/two"):
                assert (first.upper.fs / name).read_bytes() == b"before"
