"""Rows of single operations, done in great numbers by the client; and fio's.

Unless a row is about cold caches, what it works on is in the page cache when the clock starts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence

from tests.bench.materials import missing_names, tree_names
from tests.bench.rows import Scale
from tests.bench.view import View, ViewRow, Work, drop_everything, drop_inodes


def rows(scale: Scale) -> list[ViewRow]:
    """Return these rows, for so much work."""
    return [*_names(scale), *_contents(scale), *_changes(scale)]


def _names(scale: Scale) -> Iterator[ViewRow]:
    name = f"walk + lstat of {scale.tree:,} files"
    yield ViewRow(f"{name}, cold", "tree", _cold("walk"))
    yield ViewRow(f"{name}, warm", "tree", _warm("walk"))
    name = f"open + read + close of {scale.opened:,} files"
    opened = tree_names(scale.opened)
    yield ViewRow(f"{name}, cold", "tree", _cold("read", names=opened))
    yield ViewRow(f"{name}, warm", "tree", _warm("read", names=opened))
    name = f"lookup of {scale.missing:,} missing names"
    missing = missing_names(scale.missing)
    yield ViewRow(f"{name}, cold", "tree", _cold("miss", names=missing))
    yield ViewRow(f"{name}, warm", "tree", _warm("miss", names=missing))
    name = f"readdir of {scale.entries:,} entries"
    yield ViewRow(f"{name}, cold", "listing", _cold("list"))
    yield ViewRow(f"{name}, warm", "listing", _warm("list"))


def _contents(scale: Scale) -> Iterator[ViewRow]:
    name = f"sequential read of {scale.read_mib} MiB"
    yield ViewRow(f"{name}, cold", "large_file", _from_disk("read-sequentially", "file"))
    yield ViewRow(f"{name}, warm", "large_file", _warm("read-sequentially", "file"))
    name = f"mmap read of {scale.read_mib} MiB"
    yield ViewRow(f"{name}, cold", "large_file", _from_disk("map-and-read", "file"))
    yield ViewRow(f"{name}, warm", "large_file", _warm("map-and-read", "file"))
    size = str(scale.written_mib)
    yield ViewRow(f"sequential write of {size} MiB", "tree", _write_new(size))
    pages = str(scale.random_writes)
    name = f"random write of {scale.random_writes:,} pages"
    yield ViewRow(name, "tree", _write_old(size, "write-randomly", "new", pages))
    yield ViewRow(f"mmap write of {size} MiB", "tree", _write_old(size, "map-and-write", "new"))
    name = f"fio randrw 4k, 4 jobs, {size} MiB"
    yield ViewRow(name, "tree", _run_fio(scale.written_mib, jobs=4))


def _changes(scale: Scale) -> Iterator[ViewRow]:
    created = [f"{name}.created" for name in tree_names(scale.created)]
    yield ViewRow(f"create {scale.created:,} files", "tree", _change("create", created))
    changed = tree_names(scale.changed)
    files = f"{scale.changed:,} files of the lower"
    yield ViewRow(f"copy-up of {files}", "tree", _change("modify", changed), changes_lower=True)
    file = f"copy-up of a file of {scale.copied_mib} MiB"
    copy_up = _change("modify", ["file"])
    yield ViewRow(file, "larger_file", copy_up, changes_lower=True)
    reflinks = "larger_file_with_reflinks"
    yield ViewRow(f"{file}, with reflinks", reflinks, copy_up, changes_lower=True)
    yield ViewRow(f"unlink {files}", "tree", _change("unlink", changed), changes_lower=True)
    yield ViewRow(f"rename {files}", "tree", _change("rename", changed), changes_lower=True)


def _cold(mode: str, *arguments: str, names: Sequence[str] = ()) -> Work:
    """Do it on a fresh mount, with no name and no inode cached, of the lower neither.

    But the disk's blocks are in the page cache, and so are the contents, if these are read.
    """

    def work(view: View) -> int:
        # With contents that other rows have left in the page cache, inodes could not be dropped.
        drop_everything()
        view.on_lower(mode, *arguments, names=names)
        view.remount()
        drop_inodes()
        return view.client(mode, *arguments, names=names)

    return work


def _from_disk(mode: str, *arguments: str) -> Work:
    """Do it on a fresh mount, with nothing cached at all."""

    def work(view: View) -> int:
        drop_everything()
        return view.client(mode, *arguments)

    return work


def _warm(mode: str, *arguments: str, names: Sequence[str] = ()) -> Work:
    """Do it for the second time."""

    def work(view: View) -> int:
        view.client(mode, *arguments, names=names)
        return view.client(mode, *arguments, names=names)

    return work


def _write_new(mib: str) -> Work:
    def work(view: View) -> int:
        return view.client("write-sequentially", "new", mib)

    return work


def _write_old(mib: str, mode: str, *arguments: str) -> Work:
    """Do it to the file ``new``, which the upper has already."""

    def work(view: View) -> int:
        view.client("write-sequentially", "new", mib)
        os.sync()
        return view.client(mode, *arguments)

    return work


def _change(mode: str, names: Sequence[str]) -> Work:
    """Do it to files which nobody has looked at through this mount."""

    def work(view: View) -> int:
        view.on_lower("load")
        return view.client(mode, names=names)

    return work


def _run_fio(mib: int, *, jobs: int) -> Work:
    """Have `jobs` processes read and write random pages, each of its own part of `mib`."""

    def work(view: View) -> int:
        report = view.scratch / "fio.json"
        command = [
            *("fio", "--name=mixed", "--directory=.", "--rw=randrw", "--bs=4k", "--ioengine=psync"),
            *(f"--numjobs={jobs}", f"--size={mib // jobs}M", "--fallocate=none", "--randseed=1"),
        ]
        view.run(*command, "--create_only=1")
        os.sync()
        view.run(*command, "--output-format=json", f"--output={report}")
        milliseconds = max(job["job_runtime"] for job in json.loads(report.read_text())["jobs"])
        return int(milliseconds) * 1_000_000

    return work
