"""Programs that ask much of a file system, run in a merged view."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

from tests.support import trees
from tests.support.posix import names, read
from tests.support.trees import Device, Dir, File, Link, Symlink, Tree
from tests.support.views import Merge

PROJECT: Tree = {
    "Makefile": b"""\
CFLAGS = -O1 -Wall -Werror
program: main.o greet.o
\t$(CC) -o $@ $^
main.o greet.o: greet.h
clean:
\trm -f program *.o
""",
    "greet.h": b"void greet(const char *name);\n",
    "greet.c": b"""\
#include <stdio.h>
#include "greet.h"
void greet(const char *name) { printf("hello, %s\\n", name); }
""",
    "main.c": b"""\
#include "greet.h"
int main(void) { greet("world"); return 0; }
""",
}


def run(*command: str, cwd: str, env: Mapping[str, str] | None = None) -> str:
    """Return what a program prints; it has to succeed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} failed: {done.stdout}{done.stderr}"
    return done.stdout


def test_compiling(merge: Merge) -> None:
    view = merge({"project": PROJECT})
    source = view / "project"
    run("make", cwd=source)
    assert run("./program", cwd=source) == "hello, world\n"
    assert "up to date" in run("make", cwd=source)
    run("sed", "-i", "s/hello/goodbye/", "greet.c", cwd=source)
    run("make", cwd=source)
    assert run("./program", cwd=source) == "goodbye, world\n"
    run("make", "clean", cwd=source)
    assert names(source) == PROJECT.keys()


def test_git(merge: Merge) -> None:
    # Without the machine's own configuration, and with all that a commit asks for.
    env = {
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
        **dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "Tester"),
        **dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "tester@example.org"),
    }
    view = merge({"origin": PROJECT})
    origin, clone = view / "origin", view / "clone"

    def git(*arguments: str, cwd: str = clone) -> str:
        return run("git", *arguments, cwd=cwd, env=env)

    git("init", "--quiet", "--initial-branch=main", cwd=origin)
    git("add", ".", cwd=origin)
    git("commit", "--quiet", "--message=first", cwd=origin)
    git("clone", "--quiet", origin, clone, cwd=view.root)
    assert git("status", "--porcelain") == ""
    with open(f"{clone}/main.c", "a") as file:
        file.write("/* more */\n")
    os.unlink(f"{clone}/greet.h")
    assert git("status", "--porcelain") == " D greet.h\n M main.c\n"
    git("checkout", "--quiet", "-b", "topic")
    git("commit", "--quiet", "--all", "--message=second")
    git("gc", "--quiet", "--prune=now")
    git("fsck", "--strict")
    git("checkout", "--quiet", "main")
    assert git("status", "--porcelain") == ""
    assert names(clone) == PROJECT.keys() | {".git"}
    view.remount()
    git("fsck", "--strict")
    assert git("log", "--all", "--topo-order", "--format=%s") == "second\nfirst\n"


SETUP = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
print(db.execute("PRAGMA journal_mode=WAL").fetchone()[0])
db.execute("CREATE TABLE t (n, x)")
db.close()
"""

WRITER = """
import sqlite3, sys
path, base, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
db = sqlite3.connect(path, timeout=60, isolation_level=None)
assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
for number in range(base, base + count):
    db.execute("BEGIN IMMEDIATE")
    db.execute("INSERT INTO t VALUES (?, ?)", (number, "x" * 500))
    db.execute("COMMIT")
db.close()
"""

READER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=60)
count, low, high, check = (
    *db.execute("SELECT count(*), min(n), max(n) FROM t").fetchone(),
    db.execute("PRAGMA integrity_check").fetchone()[0],
)
print(count, low, high, check)
"""


def test_sqlite_in_wal_mode(merge: Merge) -> None:
    """Two processes write at once, through shared memory mapped from the file system."""
    view = merge({"db": {}})
    path = view / "db/base.sqlite"

    def python(program: str, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", program, path, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
        )

    with python(SETUP) as setup:
        assert setup.communicate()[0] == "wal\n"
    with python(WRITER, 0, 200) as one, python(WRITER, 1000, 200) as other:
        assert (one.wait(), other.wait()) == (0, 0)
    for _ in range(2):
        assert python(READER).communicate()[0] == "400 0 1199 ok\n"
        view.remount()


ARCHIVED: Tree = {
    "sbin": Dir({"su": File(b"#!", mode=0o4755), "w": File(b"#!", mode=0o2755, gid=5)}, uid=0),
    "home": Dir({"user": Dir({"x": File(b"x", uid=1000, gid=100, mode=0o600)}, uid=1000)}),
    "tmp": Dir({}, mode=0o1777),
    "lib": Dir({"a": File(b"lib", xattrs={"user.x": b"y"}), "b": Link("lib/a")}, mode=0o555),
    "link": Symlink("lib/a", uid=3),
    "null": Device(0o020000, 1, 3, mode=0o666),
    "sparse": File(b"end", hole=1 << 20),
}


@pytest.mark.parametrize("below", [{}, {"lib": {"a": b"old", "b": b"older"}, "link": {}}])
def test_tar(merge: Merge, below: Tree, fast: str) -> None:
    """As root, with owners, modes, xattrs and hard links; over nothing, and over lower files."""
    source = f"{fast}/source"
    os.mkdir(source)
    trees.build(ARCHIVED, source)
    archive = f"{fast}/archive.tar"
    run("tar", "cf", archive, "--xattrs", "--sparse", "--sort=name", ".", cwd=source)
    view = merge({"target": below})
    run("tar", "xpf", archive, "--xattrs", "--xattrs-include=*", cwd=view / "target")
    # The archive's format knows whole seconds only.
    expected = whole_seconds(trees.snapshot(source))
    trees.assert_same(expected, whole_seconds(trees.snapshot(view / "target")))
    view.remount()
    trees.assert_same(expected, whole_seconds(trees.snapshot(view / "target")))
    assert read(view / "target/lib/b") == b"lib"


def whole_seconds(snapshot: trees.Snapshot) -> trees.Snapshot:
    """Return a snapshot with times cut to what an archive keeps."""
    return {
        path: entry._replace(mtime_ns=entry.mtime_ns // 10**9) for path, entry in snapshot.items()
    }
