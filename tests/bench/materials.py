"""What all peers are given alike: the lowers, the client, an archive. The same in every run.

A lower is made when it is first asked for, below one directory, and is read-only from then on, by
its mount: not every peer leaves lowers alone.
"""

from __future__ import annotations

import os
import platform
import random
import stat
import subprocess
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from tests.bench.client import Client
from tests.bench.rows import Scale, SkippedError

MIB = 1 << 20

PACKAGES = ("linux-libc-dev", "iso-codes", "vim-runtime")
"""Large ones that depend on nothing; in each Debian, and on each architecture."""

GIT_ENVIRONMENT = os.environ | {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}

_FILES_PER_DIRECTORY = 100
_DIRECTORIES_PER_DIRECTORY = 20


class Lower(NamedTuple):
    """A lower, and a directory of the same file system for the uppers that go above it."""

    path: Path
    uppers: Path


def tree_names(count: int) -> list[str]:
    """Return the names of the first `count` files of the tree."""
    names = []
    for number in range(count):
        directory, file = divmod(number, _FILES_PER_DIRECTORY)
        top, below = divmod(directory, _DIRECTORIES_PER_DIRECTORY)
        names.append(f"{top:02}/{below:02}/{file:02}")
    return names


def missing_names(count: int) -> list[str]:
    """Return `count` names that the directories of the tree do not have."""
    return [f"{name}.missing" for name in tree_names(count)]


def small_contents(number: int, revision: bytes = b"") -> bytes:
    """Return the contents of a small file: up to 8 KiB."""
    size = number * 7919 % 8192
    line = b"%d %s\n" % (number, revision)
    return (line * (size // len(line) + 1))[:size]


class Materials:
    """The lowers, and what else the rows work with."""

    def __init__(self, directory: Path, cache: Path, scale: Scale) -> None:
        """Make things below `directory`, but what takes a network below `cache`, to be kept."""
        self.scale = scale
        self.directory = directory
        self.client = Client(directory / "client")
        self._cache = cache

    @cached_property
    def tree(self) -> Lower:
        """A tree of small files, named by `tree_names`."""
        root = self._new("tree")
        for number, name in enumerate(tree_names(self.scale.tree)):
            if number % _FILES_PER_DIRECTORY == 0:
                (root / name).parent.mkdir(parents=True)
            (root / name).write_bytes(small_contents(number))
        return self._read_only(root)

    @cached_property
    def archive(self) -> Path:
        """A tar archive of the tree."""
        archive = self.directory / "tree.tar"
        subprocess.run(["tar", "--create", "--file", archive, "."], cwd=self.tree.path, check=True)
        return archive

    @cached_property
    def listing(self) -> Lower:
        """One large directory of empty files."""
        root = self._new("listing")
        for number in range(self.scale.entries):
            os.mknod(root / f"entry-{number:06}", stat.S_IFREG | 0o644)
        return self._read_only(root)

    @cached_property
    def large_file(self) -> Lower:
        """One large file, ``file``, to be read."""
        root = self._new("large")
        _write_large(root / "file", self.scale.read_mib)
        return self._read_only(root)

    @cached_property
    def larger_file(self) -> Lower:
        """One larger file, ``file``, to be copied up."""
        root = self._new("larger")
        _write_large(root / "file", self.scale.copied_mib)
        return self._read_only(root)

    @cached_property
    def larger_file_with_reflinks(self) -> Lower:
        """The same on a file system that can share blocks between files."""
        mount_point = self._new("xfs")
        image = self.directory / "xfs.image"
        with open(image, "wb") as file:
            file.truncate((1024 + 4 * self.scale.copied_mib) * MIB)
        _run_or_skip("mkfs.xfs", "-q", "-m", "reflink=1", str(image))
        _run_or_skip("mount", "-o", "loop", str(image), str(mount_point))
        root = self._new("xfs/larger")
        _write_large(root / "file", self.scale.copied_mib)
        return self._read_only(root)

    @cached_property
    def repository(self) -> Lower:
        """A Git repository at branch ``main``; one file in five is not the same in ``other``."""
        root = self._new("repository")
        git = ["git", "-C", str(root), "-c", "gc.auto=0"]
        subprocess.run([*git, "init", "--quiet"], env=GIT_ENVIRONMENT, check=True)
        with subprocess.Popen(
            [*git, "fast-import", "--quiet"], stdin=subprocess.PIPE, env=GIT_ENVIRONMENT
        ) as importer:
            assert importer.stdin is not None
            for command in _commits(self.scale.tree):
                importer.stdin.write(command)
        assert importer.returncode == 0
        checkout = [*git, "checkout", "--quiet", "--force", "main"]
        subprocess.run(checkout, env=GIT_ENVIRONMENT, check=True)
        return self._read_only(root)

    @cached_property
    def debian(self) -> Lower:
        """A Debian root with the archives of `PACKAGES` in ``/packages``, under their bare names.

        Raises `SkippedError` without a Debian archive in reach.
        """
        suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
        archive = self._cache / f"{suite}.tar"
        if not archive.exists():
            self._cache.mkdir(parents=True, exist_ok=True)
            unfinished = self._cache / f"{suite}.part.tar"
            _run_or_skip(
                *("mmdebstrap", "--quiet", "--mode=root", "--variant=minbase"),
                *(f"--customize-hook={command}" for command in _download()),
                *(suite, str(unfinished)),
            )
            unfinished.rename(archive)
        root = self._new("debian")
        subprocess.run(
            ["tar", "--extract", "--numeric-owner", "--file", archive, "--directory", root],
            check=True,
        )
        return self._read_only(root)

    @cached_property
    def machine(self) -> Lower:
        """This machine's programs, ``/usr``."""
        return self._read_only(Path("/usr"), at=self._new("usr"))

    @property
    def machine_with_chromium(self) -> Lower:
        """The same, if a browser is among them; raises `SkippedError` if not."""
        if not (self.machine.path / "bin/chromium").exists():
            raise SkippedError("chromium is not installed")
        return self.machine

    def _new(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir()
        return path

    @staticmethod
    def _read_only(root: Path, at: Path | None = None) -> Lower:
        at = at or root
        subprocess.run(["mount", "-o", "bind,ro", root, at], check=True)
        return Lower(at, at.parent)


def _write_large(path: Path, mib: int) -> None:
    """Write a file without holes, in which no two pages are the same."""
    generator = random.Random(0)
    with open(path, "wb") as file:
        file.writelines(generator.randbytes(MIB) for _ in range(mib))
        os.fsync(file.fileno())


def _commits(files: int) -> Iterator[bytes]:
    """Yield what git-fast-import(1) reads: the first commit, on both branches, and one on top."""
    names = tree_names(files)
    yield _commit(b"main")
    for number, name in enumerate(names):
        yield _file(name, small_contents(number))
    yield _commit(b"other", parent=b"main")
    for number, name in enumerate(names):
        if number % 10 == 0:
            yield _file(name, small_contents(number, b"changed"))
        elif number % 20 == 1:
            yield b"D %s\n" % name.encode()
        elif number % 20 == 2:
            yield _file(f"{name}.new", small_contents(number))


def _commit(branch: bytes, parent: bytes = b"") -> bytes:
    head = b"commit refs/heads/%s\ncommitter Nobody <nobody@localhost> 1700000000 +0000\n" % branch
    return head + b"data 0\n" + (b"from refs/heads/%s\n" % parent if parent else b"")


def _file(name: str, contents: bytes) -> bytes:
    return b"M 100644 inline %s\ndata %d\n%s\n" % (name.encode(), len(contents), contents)


def _download() -> Iterator[str]:
    """Yield what the shell is to do, with the root as its argument, to get the packages."""
    yield 'mkdir "$1/packages"'
    for package in PACKAGES:
        apt = f"APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get download {package}"
        yield f'cd "$1/packages" && {apt} && mv {package}_*.deb {package}.deb'


def _run_or_skip(*command: str) -> None:
    """Run a command that not every machine can; raises `SkippedError` with what it said."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
        )
    except FileNotFoundError:
        raise SkippedError(f"{command[0]} is not installed") from None
    if done.returncode != 0:
        words = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise SkippedError(f"{command[0]}: {words}")
