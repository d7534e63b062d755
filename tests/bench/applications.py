"""Rows of programs that people wait for: archivers, Git, dpkg, Python, a browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence

from tests.bench.materials import GIT_ENVIRONMENT, PACKAGES
from tests.bench.rows import Scale
from tests.bench.view import View, ViewRow, Work, drop_everything, drop_inodes

_MODULES = (
    "numpy",  # comes with matplotlib; the others are Python's own
    *("asyncio", "concurrent.futures", "configparser", "csv", "ctypes", "curses", "dataclasses"),
    *("decimal", "difflib", "doctest", "email.mime.multipart", "ftplib", "gettext", "html.parser"),
    *("http.cookiejar", "http.server", "imaplib", "importlib.metadata", "logging.config"),
    *("mailbox", "multiprocessing.pool", "pdb", "pickletools", "plistlib", "pydoc", "shelve"),
    *("smtplib", "sqlite3", "ssl", "statistics", "tarfile", "unittest.mock", "urllib.request"),
    *("uuid", "wsgiref.simple_server", "xml.dom.minidom", "xml.etree.ElementTree", "xml.sax"),
    *("xmlrpc.client", "zipapp", "zoneinfo"),
)
"""Some four hundred modules, with those that they import."""

_PYTHON = ("/usr/bin/python3", "-I", "-c", f"import {', '.join(_MODULES)}")

_CHROMIUM = (
    *("/usr/bin/chromium", "--headless", "--no-sandbox", "--disable-gpu"),
    *("--dump-dom", "data:text/html,<p>Hello"),
)

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}


def rows(scale: Scale) -> list[ViewRow]:
    """Return these rows, for so much work."""
    return [*_trees(scale), *_git(scale), *_programs(scale)]


def _trees(scale: Scale) -> Iterator[ViewRow]:
    files = f"{scale.tree:,} files"
    yield ViewRow(f"tar x of {files}", "tree", _unpack)
    yield ViewRow(f"rm -r of {files} of the lower", "tree", _remove, changes_lower=True)


def _git(scale: Scale) -> Iterator[ViewRow]:
    files = f"{scale.tree:,} files"
    yield ViewRow(f"git status, {files}, cold", "repository", _git_status_cold)
    yield ViewRow(f"git status, {files}, warm", "repository", _git_status_warm)
    name = f"git checkout, {files}, {scale.tree // 5:,} of them other ones"
    yield ViewRow(name, "repository", _git_checkout, changes_lower=True)


def _programs(scale: Scale) -> Iterator[ViewRow]:
    packages = PACKAGES[: scale.packages]
    name = f"dpkg -i of {', '.join(packages)}"
    yield ViewRow(name, "debian", _install(packages), changes_lower=True)
    yield ViewRow("python3 with 400 modules, cold", "machine", _start_cold(_PYTHON))
    yield ViewRow("python3 with 400 modules, warm", "machine", _start_warm(_PYTHON))
    yield ViewRow("headless Chromium, cold", "machine_with_chromium", _start_cold(_CHROMIUM))
    yield ViewRow("headless Chromium, warm", "machine_with_chromium", _start_warm(_CHROMIUM))


# Trees


def _unpack(view: View) -> int:
    target = view.root / "unpacked"
    target.mkdir()
    archive = view.materials.archive
    archive.read_bytes()  # from now on it is in the page cache
    return view.run("tar", "--extract", "--file", archive, "--directory", target)


def _remove(view: View) -> int:
    view.on_lower("load")
    return view.run("rm", "--recursive", *os.listdir(view.root))


# Git: the index is written first, so that it knows the files by what they are in this view


def _git_status(view: View) -> int:
    return view.run("git", "status", "--short", environment=GIT_ENVIRONMENT, silent=True)


def _git_status_cold(view: View) -> int:
    _git_status(view)
    view.remount()
    drop_inodes()
    return _git_status(view)


def _git_status_warm(view: View) -> int:
    _git_status(view)
    return _git_status(view)


def _git_checkout(view: View) -> int:
    _git_status(view)
    return view.run("git", "checkout", "--quiet", "other", environment=GIT_ENVIRONMENT)


# Programs whose own files are in the view


def _install(packages: Sequence[str]) -> Work:
    def work(view: View) -> int:
        view.on_lower("load")
        archives = [f"/packages/{package}.deb" for package in packages]
        install = ("dpkg", "--install", *archives)
        return view.run("chroot", view.root, *install, environment=_ENVIRONMENT)

    return work


def _start_cold(command: Sequence[str]) -> Work:
    """Start it on a fresh mount, with nothing cached at all."""

    def work(view: View) -> int:
        drop_everything()
        return _start(view, command)

    return work


def _start_warm(command: Sequence[str]) -> Work:
    """Start it for the second time."""

    def work(view: View) -> int:
        _start(view, command)
        return _start(view, command)

    return work


def _start(view: View, command: Sequence[str]) -> int:
    """Run a program of this machine with the merged view in place of its ``/usr``."""
    home = view.scratch / "home"
    home.mkdir()
    try:
        return view.run(
            *("unshare", "--mount", "sh", "-c", 'mount --bind "$0" /usr && cd / && exec "$@"'),
            view.root,
            *command,
            environment=_ENVIRONMENT | {"HOME": str(home)},
        )
    finally:
        shutil.rmtree(home)
