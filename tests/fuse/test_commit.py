"""Commit through a real mount: while programs go on, given up, over deaths, with hostile users."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from sessiond.errors import Failed
from sessiond.fuse.mounter import FuseMount
from sessiond.session.model import DataPath
from tests.fuse.conftest import Playground
from tests.fuse.test_keep import commit, ignore, mounted
from tests.support.waiting import until

PATH = "/home/u/docs"


@pytest.fixture
def docs(playground: Playground) -> Path:
    """A directory in the merged view."""
    docs = playground.image / "home/u/docs"
    (docs / "deep").mkdir(parents=True)
    for name in ("letter", "deep/note", "gone"):
        (docs / name).write_text("image")
    return playground.root / "home/u/docs"


def tree(top: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return what is in a directory: mode, owner, and contents or target, by path."""
    found = {}
    for path in sorted([top, *top.rglob("*")]):
        status = path.lstat()
        data = b""
        if stat.S_ISREG(status.st_mode):
            data = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            data = os.fsencode(os.readlink(path))
        found[str(path.relative_to(top))] = (status.st_mode, status.st_uid, data)
    return found


def is_clean(playground: Playground) -> bool:
    """Say whether a commit that was given up has left nothing."""
    return not os.listdir(playground.kept().upper.work / "work")


async def test_programs_go_on_until_the_end(playground: Playground, docs: Path) -> None:
    async with mounted(playground, "/nothing") as mount:
        for name in ("rewritten", "renamed", "removed", "mapped", "linked"):
            (docs / name).write_text("before")
        os.link(docs / "linked", docs / "other name")
        with open(docs / "open", "wb", buffering=0) as file, open(docs / "mapped", "r+b") as shared:
            file.write(b"before ")
            with mmap.mmap(shared.fileno(), 6) as mapped:
                async with mount.committing((PATH,), ignore) as step:
                    # Nobody is held: all of this would wait.
                    (docs / "rewritten").write_text("after")
                    (docs / "renamed").rename(docs / "deep/renamed")
                    (docs / "removed").unlink()
                    (docs / "gone").unlink()
                    (docs / "linked").write_text("after")
                    (docs / "deep").rename(docs / "deeper")
                    (docs / "letter").chmod(0o600)
                    (docs / "new/in").mkdir(parents=True)
                    (docs / "new/in/file").write_text("after")
                    file.write(b"after ")
                    mapped[:] = b"MAPPED"
                    wanted = tree(docs)
                    async with mount.frozen():
                        await step()
                        await step()
                        await mount.keep((PATH,))
                mapped[:] = b"AFTER!"
            file.write(b"all")
            assert tree(docs).keys() == wanted.keys()
        wanted["open"] = (*wanted["open"][:2], b"before after all")
        wanted["mapped"] = (*wanted["mapped"][:2], b"AFTER!")
        await until(lambda: tree(docs) == wanted)
        await mount.swap(playground.stack())
        assert tree(docs) == wanted
        assert (docs / "linked").samefile(docs / "other name")
        await until(lambda: is_clean(playground))


async def test_names_that_are_of_other_files_now(playground: Playground, docs: Path) -> None:
    """A further name of a file is not made one of what its other names are by then."""
    async with mounted(playground, "/nothing") as mount:
        (docs / "the file").write_text("the file")
        for number in range(20):
            os.link(docs / "the file", docs / f"a name {number}")
        async with mount.committing((PATH,), ignore) as step:
            os.link(docs / "the file", docs / "the link")
            for number in range(20):
                (docs / f"a name {number}").unlink()
                if number % 2:
                    (docs / f"a name {number}").write_text("another")
                else:
                    (docs / f"a name {number}").mkdir()
            wanted = tree(docs)
            async with mount.frozen():
                await step()
                await step()
                await mount.keep((PATH,))
        await mount.swap(playground.stack())
        assert tree(docs) == wanted
        assert (docs / "the link").samefile(docs / "the file")


async def test_it_tells_how_far_it_is(playground: Playground, docs: Path) -> None:
    async with mounted(playground, "/nothing") as mount:
        for number in range(8):
            (docs / str(number)).write_bytes(bytes([number]) * (1 << 20))
        told: list[tuple[int, int]] = []
        async with mount.committing((PATH,), lambda *progress: told.append(progress)):
            assert told[0] == (0, 8 << 20)
            assert told == sorted(told)
        await until(lambda: is_clean(playground))


@pytest.mark.parametrize("steps", range(3))
async def test_one_that_is_given_up_has_changed_nothing(
    playground: Playground, docs: Path, steps: int
) -> None:
    """After the second step, that it does not count is told by the rules."""
    async with mounted(playground, PATH):
        (docs / "kept once").write_text("kept")
    async with mounted(playground, "/nothing") as mount:
        (docs / "new").write_text("new")
        wanted = tree(docs)
        fs = tree(playground.kept().upper.fs)
        async with mount.committing((PATH,), ignore) as step, mount.frozen():
            for _ in range(steps):
                await step()
            if steps == 2:
                assert tree(playground.kept().upper.fs) != fs
                await mount.keep(("/nothing",))
        await until(lambda: is_clean(playground))
        assert tree(playground.kept().upper.fs).keys() == fs.keys()
        assert tree(docs) == wanted
        await mount.keep((PATH,))
        assert (docs / "kept once").read_text() == "kept"


@pytest.mark.parametrize("steps", range(3))
async def test_the_worker_is_killed(playground: Playground, docs: Path, steps: int) -> None:
    if playground.data_path is DataPath.PLAIN:
        pytest.skip("leaves nothing to go on with")
    async with mounted(playground, "/nothing") as mount:
        for number in range(20):
            (docs / str(number)).write_text("new")
        wanted = tree(docs)

        async def die(mount: FuseMount) -> None:
            async with mount.committing((PATH,), ignore) as step, mount.frozen():
                for _ in range(steps):
                    await step()
                os.kill(mount.worker, signal.SIGKILL)
                await mount.wait_died()
                await step()

        with pytest.raises(Failed):
            await die(mount)
        await mount.recover()
        assert tree(docs) == wanted
        await until(lambda: is_clean(playground))
        (docs / "goes on").write_text("")
        wanted = tree(docs)
        await commit(mount, PATH)
        await mount.swap(playground.stack())
        assert tree(docs) == wanted


AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
HOSTILE = """
import os, socket, sys
os.umask(0)
names = ["new\\nline", "\\xff".encode("latin-1"), "-rf", "a" * 255]
for name in names:
    open(name, "w").write("x")
os.mkfifo("fifo")
socket.socket(socket.AF_UNIX).bind("socket")
os.symlink("/etc/shadow", "link")
os.symlink("../../../../../../../../etc", "directory-link")
os.makedirs("/".join("d" * 60))
os.mkdir("x"); os.mkdir("y")
open("x/file", "w").write("of x"); open("y/file", "w").write("of y")
os.link("x/file", "y/link")
print(flush=True)
round = 0
while True:
    round += 1
    for make in (lambda: os.mkfifo("t"), lambda: os.symlink("/etc/shadow", "t"),
                 lambda: open("t", "w").write(str(round)), lambda: os.link("x/file", "t"),
                 lambda: os.symlink("/", "t")):
        make()
        os.rename("t", "victim")
    os.rename("x", "z"); os.rename("y", "x"); os.rename("z", "y")
    os.remove("victim")
    os.makedirs("victim/in")
    open("victim/in/file", "w").write(str(round))
    os.rename("victim", "was"); os.remove("was/in/file"); os.rmdir("was/in"); os.rmdir("was")
"""


async def test_a_hostile_user(playground: Playground, docs: Path) -> None:
    """What is committed is exchanged all the while; nothing outside is read, nothing hangs."""
    (playground.image / "home/u/docs").chmod(0o777)
    async with mounted(playground, "/nothing") as mount:
        own = docs / "own"
        own.mkdir()
        own.chmod(0o777)
        attacker = subprocess.Popen(
            [*AS_NOBODY, sys.executable, "-c", HOSTILE],
            cwd=own,
            stdout=subprocess.PIPE,
        )
        assert attacker.stdout is not None
        try:
            with attacker.stdout:
                assert await trio.to_thread.run_sync(attacker.stdout.readline) == b"\n"
            for _ in range(3):
                async with mount.committing((PATH,), ignore):
                    pass  # given up
            async with mount.committing((PATH,), ignore) as step, mount.frozen():
                await step()
                await step()
                os.kill(attacker.pid, signal.SIGSTOP)
                await mount.keep((PATH,))
        finally:
            attacker.kill()
            attacker.wait()
        wanted = tree(docs)
        assert not any(b"root:" in data for _, _, data in wanted.values())
        await mount.swap(playground.stack())
        assert tree(docs) == wanted
        assert stat.S_ISFIFO((own / "fifo").stat().st_mode)
        assert os.readlink(own / "link") == "/etc/shadow"
        await until(lambda: is_clean(playground))
        shutil.rmtree(own)
