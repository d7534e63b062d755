"""``python -m tests.support.load DIRECTORY``: programs at work in a directory, each of which knows
what has to be there, and compares.

Runs until SIGTERM, or the first difference or error, which makes the exit status 1. If there are
directories ``directory0/file0`` and so on, of which each file holds its numbers, these are read.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import sqlite3
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

IMAGE_DIRECTORIES = 20
IMAGE_FILES = 20
KEPT_DIRECTORIES = 2
"""The last of the directories, from which nothing is removed."""

Work = Iterator[None]
"""Steps; between two of them it may be told to end."""


def contents(root: Path, seed: int) -> Work:
    """Write, truncate and read one file at random."""
    rng = random.Random(seed)
    path = root / f"contents{seed}"
    model = bytearray()
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    while True:
        offset, size = rng.randrange(200_000), rng.randrange(1, 20_000)
        match rng.choice(["write", "write", "truncate", "stat", "reopen", "read", "read"]):
            case "write":
                data = rng.randbytes(size)
                assert os.pwrite(fd, data, offset) == size
                model.extend(bytes(max(offset + size - len(model), 0)))
                model[offset : offset + size] = data
            case "truncate":
                os.ftruncate(fd, offset)
                del model[offset:]
                model.extend(bytes(offset - len(model)))
            case "stat":
                assert os.fstat(fd).st_size == len(model)
            case "reopen":
                os.close(fd)
                fd = os.open(path, os.O_RDWR)
            case "read":
                assert os.pread(fd, size, offset) == model[offset : offset + size]
        yield


class _File:
    """What names of one file have in common."""

    def __init__(self, text: str) -> None:
        self.text = text


def names(root: Path, seed: int) -> Work:
    """Create, remove, link, move and list objects at random; None stands for a directory."""
    rng = random.Random(seed)
    base = root / f"names{seed}"
    base.mkdir()
    model: dict[str, _File | None] = {}
    steps = [_create, _mkdir, _remove, _rename, _link, _list, _read]
    while True:
        rng.choice(steps)(base, model, *rng.choices([f"name{n}" for n in range(30)], k=2))
        yield


def _outcome(call: Callable[[], object]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


def _create(base: Path, model: dict[str, _File | None], name: str, _: str) -> None:
    def create() -> None:
        with open(base / name, "x") as file:
            file.write(name)

    assert _outcome(create) == (errno.EEXIST if name in model else 0)
    model.setdefault(name, _File(name))


def _mkdir(base: Path, model: dict[str, _File | None], name: str, _: str) -> None:
    assert _outcome((base / name).mkdir) == (errno.EEXIST if name in model else 0)
    model.setdefault(name, None)


def _remove(base: Path, model: dict[str, _File | None], name: str, _: str) -> None:
    remove = (base / name).rmdir if model.get(name, 0) is None else (base / name).unlink
    assert _outcome(remove) == (0 if name in model else errno.ENOENT)
    model.pop(name, None)


def _rename(base: Path, model: dict[str, _File | None], old: str, new: str) -> None:
    wanted = 0
    if old not in model:
        wanted = errno.ENOENT
    elif new in model and old != new and (model[old] is None) != (model[new] is None):
        wanted = errno.EISDIR if model[new] is None else errno.ENOTDIR
    assert _outcome(lambda: (base / old).rename(base / new)) == wanted
    same = new in model and model[old] is not None and model[old] is model[new] if not wanted else 0
    if not wanted and old != new and not same:
        model[new] = model.pop(old)


def _link(base: Path, model: dict[str, _File | None], old: str, new: str) -> None:
    if isinstance(model.get(old), _File):
        wanted = errno.EEXIST if new in model else 0
        assert _outcome(lambda: os.link(base / old, base / new)) == wanted
        model.setdefault(new, model[old])


def _list(base: Path, model: dict[str, _File | None], *_: str) -> None:
    assert sorted(os.listdir(base)) == sorted(model)


def _read(base: Path, model: dict[str, _File | None], name: str, _: str) -> None:
    if isinstance(file := model.get(name), _File):
        assert (base / name).read_text() == file.text
        links = sum(other is file for other in model.values())
        assert (base / name).stat().st_nlink == links


def _image_text(directory: int, file: int) -> str:
    return f"{directory}/{file}\n" * 100


def image(root: Path) -> Work:
    """Read files of the image, and look for what is not there."""
    rng = random.Random(0)
    while True:
        directory = IMAGE_DIRECTORIES - 1 - rng.randrange(KEPT_DIRECTORIES)
        file = rng.randrange(IMAGE_FILES)
        path = root / f"directory{directory}"
        if path.exists():
            assert (path / f"file{file}").read_text() == _image_text(directory, file)
            assert len(os.listdir(path)) == IMAGE_FILES
        assert not (path / f"missing{file}").exists()
        yield


def listing(root: Path) -> Work:
    """List a directory that is larger than one reply, with pauses."""
    base = root / "listed"
    base.mkdir()
    wanted = [f"{number:05d}" for number in range(500)]
    for name in wanted:
        (base / name).touch()
    while True:
        listed = []
        with os.scandir(base) as entries:
            for entry in entries:
                listed.append(entry.name)
                if len(listed) % 100 == 0:
                    yield
        assert sorted(listed) == wanted
        yield


def removed(root: Path) -> Work:
    """Read and write files that are open, and have no name any more."""
    rng = random.Random(1)
    files: list[tuple[int, bytes]] = []
    while True:
        if len(files) < 8:
            path = root / f"removed{rng.random()}"
            data = rng.randbytes(5000)
            fd = os.open(path, os.O_RDWR | os.O_CREAT)
            os.write(fd, data)
            path.unlink()
            files.append((fd, data))
            directory = rng.randrange(IMAGE_DIRECTORIES - KEPT_DIRECTORIES)
            file = rng.randrange(IMAGE_FILES)
            path = root / f"directory{directory}/file{file}"
            if path.exists():
                files.append((os.open(path, os.O_RDONLY), _image_text(directory, file).encode()))
                path.unlink()
        fd, data = rng.choice(files)
        stat = os.fstat(fd)
        assert (stat.st_nlink, stat.st_size) == (0, len(data))
        assert os.pread(fd, 2 * len(data), 0) == data
        if rng.random() < 0.1:
            files.remove((fd, data))
            os.close(fd)
        yield


def database(root: Path) -> Work:
    """Insert and delete rows, in WAL mode."""
    connection = sqlite3.connect(root / "database", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, data BLOB)")
    number = 0
    while True:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO rows VALUES (?, ?)", (number, os.urandom(300)))
        connection.execute("DELETE FROM rows WHERE number < ?", (number - 50,))
        connection.execute("COMMIT")
        number += 1
        if number % 40 == 0:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            rows = connection.execute("SELECT count(*) FROM rows").fetchone()
            assert rows == (min(number, 51),)
        yield


def mapped(root: Path) -> Work:
    """Change a file through a shared mapping."""
    rng = random.Random(2)
    size = 1 << 16
    fd = os.open(root / "mapped", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, size)
    memory = mmap.mmap(fd, size)
    model = bytearray(size)
    while True:
        offset = rng.randrange(size - 100)
        model[offset : offset + 100] = memory[offset : offset + 100] = rng.randbytes(100)
        offset = rng.randrange(size - 100)
        assert memory[offset : offset + 100] == model[offset : offset + 100]
        if rng.random() < 0.01:
            memory.flush()
            assert os.pread(fd, size, 0) == model
        yield


class Load:
    """Several of these at once, in threads."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.failed = False
        self.longest = 0.0
        """The longest step, in seconds, but for the first ones, which make what is worked on."""

    def run(self, work: Work) -> None:
        """Take steps until told to end."""
        try:
            next(work)
            while not self.ended.is_set():
                start = time.monotonic()
                next(work)
                self.longest = max(self.longest, time.monotonic() - start)
        except BaseException:
            traceback.print_exc()
            self.failed = True
            self.ended.set()


def main(root: Path) -> int:
    load = Load()
    signal.signal(signal.SIGTERM, lambda *_: load.ended.set())
    works = [
        contents(root, 1),
        names(root, 1),
        names(root, 2),
        image(root),
        listing(root),
        removed(root),
        database(root),
        mapped(root),
    ]
    threads = [threading.Thread(target=load.run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"the longest step took {load.longest * 1000:.0f} ms", flush=True)
    return int(load.failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
