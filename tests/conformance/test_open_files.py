"""What holds while files are open: flags, offsets, unlinked files, locks, programs."""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import struct
import subprocess
from contextlib import nullcontext
from errno import (
    EACCES,
    EAGAIN,
    EEXIST,
    EINVAL,
    EISDIR,
    ELOOP,
    ENOENT,
    ENOTDIR,
    EOPNOTSUPP,
    ESTALE,
    ETXTBSY,
)

from tests.support import libc
from tests.support.posix import append, fails, names, opened, read, write
from tests.support.trees import File, Symlink
from tests.support.views import Merge


def test_open_flags(merge: Merge) -> None:
    view = merge({"file": b"0123456789", "d": {}, "link": Symlink("file")})
    for flags, error in (
        (os.O_CREAT | os.O_EXCL | os.O_RDWR, EEXIST),
        (os.O_DIRECTORY, ENOTDIR),
    ):
        with fails(error):
            os.open(view / "file", flags)
    with fails(EISDIR):
        os.open(view / "d", os.O_RDWR)
    with fails(EISDIR):
        os.open(view / "d", os.O_CREAT | os.O_RDONLY)
    with fails(ENOENT):
        os.open(view / "nothing", os.O_RDWR)
    with fails(EEXIST):
        os.open(view / "link", os.O_CREAT | os.O_EXCL | os.O_RDWR)
    with fails(ELOOP):
        os.open(view / "link", os.O_NOFOLLOW)
    with opened(view / "file", os.O_RDWR | os.O_TRUNC) as file:
        assert os.fstat(file).st_size == 0
    assert read(view / "file") == b""


def test_truncating_open_for_reading_only(merge: Merge) -> None:
    """Unspecified by POSIX; Linux truncates."""
    view = merge({"file": b"0123456789"})
    os.close(os.open(view / "file", os.O_RDONLY | os.O_TRUNC))
    assert read(view / "file") == b""


def test_created_for_reading_with_no_permission_for_others(merge: Merge) -> None:
    view = merge({})
    with opened(view / "new", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o000) as file:
        os.write(file, b"x")
        assert os.pread(file, 1, 0) == b"x"


def test_appending_goes_to_the_end(merge: Merge) -> None:
    view = merge({"log": b"lower\n"})
    with (
        opened(view / "log", os.O_WRONLY | os.O_APPEND) as one,
        opened(view / "log", os.O_WRONLY | os.O_APPEND) as other,
    ):
        os.write(one, b"1\n")
        os.write(other, b"2\n")
        os.lseek(one, 0, os.SEEK_SET)
        os.write(one, b"3\n")
        os.ftruncate(other, 8)
        os.write(one, b"4\n")
    assert read(view / "log") == b"lower\n1\n4\n"


def test_unlinked_files(merge: Merge) -> None:
    view = merge({"low": b"lower", "two": b"x", "copied": b"c"}, upper={"up": b"upper"})
    os.chmod(view / "copied", 0o600)
    for name, content in (("low", b"lower"), ("up", b"upper"), ("copied", b"c")):
        with opened(view / name, os.O_RDWR) as file, opened(view / name) as reader:
            os.unlink(view / name)
            with fails(ENOENT):
                os.stat(view / name)
            assert os.fstat(file).st_nlink == 0
            assert os.pread(file, 9, 0) == content
            os.pwrite(file, b"+", 1)
            os.ftruncate(file, 2)
            os.fchmod(file, 0o604)
            os.fchown(file, 3, 4)
            os.utime(file, ns=(5, 6))
            os.setxattr(file, "user.x", b"1")
            assert os.getxattr(file, "user.x") == b"1"
            status = os.fstat(file)
            assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o604, 3, 4)
            assert (status.st_size, status.st_mtime_ns, status.st_nlink) == (2, 6, 0)
            assert os.pread(reader, 9, 0) == content[:1] + b"+"
            os.fsync(file)
            write(view / name, b"another")
            assert os.pread(file, 9, 0) == content[:1] + b"+"
        assert read(view / name) == b"another"


def test_unlinked_while_open_for_reading(merge: Merge) -> None:
    view = merge({"low": b"lower"}, upper={"up": b"upper"})
    for name, content in (("low", b"lower"), ("up", b"upper")):
        with opened(view / name) as file:
            os.unlink(view / name)
            assert os.pread(file, 9, 0) == content
            if view.descriptors_follow_changes:
                assert os.fstat(file).st_nlink == 0
            with fails(ENOENT):
                os.stat(view / name)


def test_unlinked_through_another_name(merge: Merge) -> None:
    view = merge({"a": b"1"})
    os.link(view / "a", view / "b")
    with opened(view / "a", os.O_RDWR) as file:
        os.unlink(view / "a")
        assert os.fstat(file).st_nlink == 1
        os.pwrite(file, b"2", 0)
        assert read(view / "b") == b"2"
        os.unlink(view / "b")
        assert os.fstat(file).st_nlink == 0
        assert os.pread(file, 1, 0) == b"2"


def test_replaced_while_mapped(merge: Merge) -> None:
    view = merge({"lib": b"old".ljust(4096)})
    with (
        opened(view / "lib") as file,
        mmap.mmap(file, 4096, mmap.MAP_SHARED, mmap.PROT_READ) as mapping,
    ):
        write(view / "lib.new", b"new".ljust(4096))
        os.rename(view / "lib.new", view / "lib")
        assert mapping[:3] == b"old"
        assert read(view / "lib")[:3] == b"new"


def test_reopening_through_proc(merge: Merge) -> None:
    view = merge({"file": b"lower"})
    with opened(view / "file") as file:
        if view.copy_up_makes_another_inode:
            with fails(ESTALE):
                os.open(f"/proc/self/fd/{file}", os.O_WRONLY)
            write(view / "file", b"written")
        else:
            write(f"/proc/self/fd/{file}", b"written")
        assert read(view / "file") == b"written"
    with opened(view / "file") as file:
        write(f"/proc/self/fd/{file}", b"again")
    assert read(view / "file") == b"again"


def test_path_descriptors(merge: Merge) -> None:
    view = merge({"d": {"file": b"lower"}})
    with opened(view / "d", os.O_PATH) as directory, opened(view / "d/file", os.O_PATH) as file:
        os.rename(view / "d", view / "e")
        assert os.stat("file", dir_fd=directory).st_size == 5
        append(view / "e/file", b"+")
        assert os.fstat(file).st_size == 6


def test_anonymous_files(merge: Merge) -> None:
    """A file system may lack O_TMPFILE, but has to say so in the way that programs fall back on."""
    view = merge({})
    try:
        file = os.open(view.root, os.O_TMPFILE | os.O_RDWR, 0o640)
    except OSError as error:
        if error.errno != EOPNOTSUPP or view.file_system is None:
            raise
        return
    os.write(file, b"anonymous")
    assert os.fstat(file).st_nlink == 0
    # Only with a descriptor does os.link() follow what follow_symlinks, its default, says.
    os.link(f"/proc/self/fd/{file}", view / "named", src_dir_fd=file)
    os.close(file)
    assert read(view / "named") == b"anonymous"
    assert names(view.root) == {"named"}


def test_preallocation(merge: Merge) -> None:
    view = merge({"file": b"lower"})
    with opened(view / "file", os.O_RDWR) as file:
        os.posix_fallocate(file, 0, 10000)
        assert os.fstat(file).st_size == 10000
        assert os.pread(file, 6, 0) == b"lower\0"


def test_copying_between_files(merge: Merge) -> None:
    content = os.urandom(100_000)
    view = merge({"source": content, "d": {"target": b""}})
    os.chmod(view / "source", 0o600)  # so that both are on the upper's file system
    with opened(view / "source") as source, opened(view / "d/target", os.O_RDWR) as target:
        copied = 0
        while copied < len(content):
            copied += os.copy_file_range(source, target, len(content) - copied)
        os.sendfile(target, source, 0, 10)
    assert read(view / "d/target") == content + content[:10]


def test_sync(merge: Merge) -> None:
    view = merge({"d": {"file": b"lower"}})
    with opened(view / "d/file", os.O_RDWR) as file, opened(view / "d") as directory:
        os.fsync(file)
        os.write(file, b"LOWER")
        os.fsync(file)
        os.fdatasync(file)
        os.fsync(directory)
        libc.syncfs(directory)
    with opened(view / "d/file") as file:
        os.fsync(file)


def test_statfs(merge: Merge) -> None:
    view = merge({"low": b""}, upper={"up": b""})
    figures = [os.statvfs(path) for path in (view.root, view / "low", view / "up")]
    assert figures[0].f_namemax == 255
    assert figures[0].f_blocks > 0
    assert figures[0].f_bavail <= figures[0].f_blocks
    assert {(f.f_bsize, f.f_blocks, f.f_files) for f in figures} == {
        (figures[0].f_bsize, figures[0].f_blocks, figures[0].f_files)
    }
    if view.layers is not None:
        upper = os.statvfs(view.layers.upper or "")
        assert figures[0].f_blocks * figures[0].f_frsize == upper.f_blocks * upper.f_frsize


LOCK_WRITE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 10, 0)


def test_locks(merge: Merge) -> None:
    view = merge({"file": b"0123456789"})
    with opened(view / "file", os.O_RDWR) as one, opened(view / "file", os.O_RDWR) as other:
        fcntl.flock(one, fcntl.LOCK_EX)
        with fails(EAGAIN):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_SH | fcntl.LOCK_NB)

        fcntl.fcntl(one, fcntl.F_OFD_SETLK, LOCK_WRITE)
        with fails(EAGAIN):
            fcntl.fcntl(other, fcntl.F_OFD_SETLK, LOCK_WRITE)


def test_record_locks_between_processes(merge: Merge) -> None:
    view = merge({"file": b"0123456789"})
    with opened(view / "file", os.O_RDWR) as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 5, 0)
        for offset, allowed in ((0, False), (5, True)):
            attempt = (
                "import fcntl, sys; f = open(sys.argv[1], 'r+b');"
                "fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, int(sys.argv[2]))"
            )
            done = subprocess.run(
                ["python3", "-c", attempt, view / "file", str(offset)],
                capture_output=True,
                check=False,
            )
            assert (done.returncode == 0) == allowed, done.stderr


def test_locks_across_copy_up(merge: Merge) -> None:
    """A lock taken through a read-only descriptor holds against one who opens to write."""
    view = merge({"file": b""})
    with opened(view / "file") as reader:
        fcntl.flock(reader, fcntl.LOCK_EX)
        refused = nullcontext() if view.copy_up_makes_another_inode else fails(EAGAIN)
        with opened(view / "file", os.O_RDWR) as writer, refused:
            fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with opened(view / "file") as reader, opened(view / "file", os.O_RDWR) as writer:
        fcntl.flock(reader, fcntl.LOCK_EX)
        with fails(EAGAIN):
            fcntl.flock(writer, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_programs_run_and_cannot_be_written_meanwhile(merge: Merge) -> None:
    with open(shutil.which("cat") or "/bin/cat", "rb") as program:
        cat = program.read()
    view = merge({"low": File(cat, mode=0o755)}, upper={"up": File(cat, mode=0o755)})
    for name in ("low", "up"):
        with subprocess.Popen(
            [view / name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as running:
            assert running.stdin is not None
            assert running.stdout is not None
            running.stdin.write(b"running\n")
            running.stdin.flush()
            assert running.stdout.readline() == b"running\n"
            with fails(ETXTBSY):
                os.open(view / name, os.O_WRONLY)
            write(view / f"{name}.new", b"#!/bin/sh\necho replaced\n")
            os.chmod(view / f"{name}.new", 0o755)
            os.rename(view / f"{name}.new", view / name)
            running.stdin.write(b"still\n")
            running.stdin.close()
            assert running.stdout.readline() == b"still\n"
        assert subprocess.check_output([view / name]) == b"replaced\n"


def test_what_is_open_for_writing_cannot_be_run(merge: Merge) -> None:
    view = merge({"script": File(b"#!/bin/sh\n", mode=0o755), "data": b"#!/bin/sh\n"})
    with opened(view / "script", os.O_WRONLY), fails(ETXTBSY):
        subprocess.run([view / "script"], check=True)
    subprocess.run([view / "script"], check=True)
    with fails(EACCES):
        subprocess.run([view / "data"], check=True)


def test_invalid_offsets(merge: Merge) -> None:
    view = merge({"file": b"0123"})
    with opened(view / "file", os.O_RDWR) as file:
        with fails(EINVAL):
            os.ftruncate(file, -1)
        assert os.pread(file, 10, 4) == b""
        assert os.pread(file, 10, 1 << 40) == b""
        os.pwrite(file, b"!", 10)
        assert os.pread(file, 20, 0) == b"0123" + bytes(6) + b"!"
