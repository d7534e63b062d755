"""Several programs at once: each sees its own changes, and all of them remain."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from errno import ENOENT

from tests.support import trees
from tests.support.posix import append, fails, names, opened, read, write
from tests.support.trees import File
from tests.support.views import Merge

WORKERS = 6
ROUNDS = 12


def at_once(work: Callable[[int], None]) -> None:
    """Run `work` in several threads; whatever one of them raises is raised."""
    with ThreadPoolExecutor(WORKERS) as pool:
        for done in [pool.submit(work, number) for number in range(WORKERS)]:
            done.result()


def test_changes_to_one_directory(merge: Merge) -> None:
    lower = {f"{number}-low{count}": b"low" for number in range(WORKERS) for count in range(ROUNDS)}
    view = merge({"d": lower})

    def work(number: int) -> None:
        for count in range(ROUNDS):
            name = view / f"d/{number}-{count}"
            write(name, b"first")
            append(view / f"d/{number}-low{count}", b"er")
            os.rename(name, f"{name}-renamed")
            os.link(f"{name}-renamed", f"{name}-link")
            os.mkdir(name)
            os.rename(view / f"d/{number}-low{count}", f"{name}/in")
            os.unlink(f"{name}-renamed")
            assert read(f"{name}/in") == b"lower"
            assert f"{number}-{count}-link" in names(view / "d")

    at_once(work)
    expected = {
        f"{number}-{count}{suffix}"
        for number in range(WORKERS)
        for count in range(ROUNDS)
        for suffix in ("", "-link")
    }
    assert names(view / "d") == expected
    before = trees.snapshot(view.root)
    view.remount()
    trees.assert_same(before, trees.snapshot(view.root))


def test_the_first_write_to_one_large_file(merge: Merge) -> None:
    """Whoever comes while it is copied up waits, and finds what the others wrote."""
    content = bytes(range(256)) * (24 << 10)
    view = merge({"d": {"file": content}})

    def work(number: int) -> None:
        with opened(view / "d/file", os.O_RDWR) as file:
            os.pwrite(file, bytes([255 - number]) * 16, number << 20)
            assert os.pread(file, 17, number << 20) == bytes([255 - number]) * 16 + b"\x10"

    at_once(work)
    expected = bytearray(content)
    for number in range(WORKERS):
        expected[number << 20 : (number << 20) + 16] = bytes([255 - number]) * 16
    assert read(view / "d/file") == bytes(expected)


def test_one_name_for_many(merge: Merge) -> None:
    """Of all who create a file exclusively one succeeds, and so of all who remove it."""
    view = merge({"d": {}})
    won: list[int] = []

    def work(number: int) -> None:
        for count in range(ROUNDS):
            try:
                os.close(os.open(view / f"d/{count}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                continue
            won.append(count)

    at_once(work)
    assert sorted(won) == list(range(ROUNDS))
    for count in range(ROUNDS):
        os.unlink(view / f"d/{count}")
        with fails(ENOENT):
            os.unlink(view / f"d/{count}")


def test_replacing_a_file_that_others_read(merge: Merge) -> None:
    """A reader finds either version whole, never nothing."""
    view = merge({"file": File(b"0" * 5000), "d": {}})

    def work(number: int) -> None:
        for count in range(ROUNDS):
            if number % 2:
                content = read(view / "file")
                assert len(content) == 5000
                assert len(set(content)) == 1
            else:
                write(view / f"d/{number}", str(count % 10).encode() * 5000)
                os.rename(view / f"d/{number}", view / "file")

    at_once(work)
