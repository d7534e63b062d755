"""What outlives resets, through a real mount: by programs, with files open, over deaths."""

from __future__ import annotations

import mmap
import os
import random
import signal
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from sessiond.errors import Failed
from sessiond.fuse.mounter import FuseMount
from sessiond.session.model import DataPath
from tests.fuse.conftest import Playground
from tests.support import libc
from tests.support.waiting import until

T = TypeVar("T")

RULES = ("/home/*/docs", "/home/*/.rc", "/data")


@pytest.fixture
def home(playground: Playground) -> Path:
    """The home directory in the merged view; `image_home` has what is in it."""
    docs = playground.image / "home/u/docs"
    (docs / "deep").mkdir(parents=True)
    for name in ("docs/letter", "docs/deep/note", ".rc", "other"):
        (playground.image / "home/u" / name).write_text("image")
    return playground.root / "home/u"


@asynccontextmanager
async def mounted(playground: Playground, *rules: str) -> AsyncIterator[FuseMount]:
    keep = playground.kept(*(rules or RULES))
    async with playground.mounted(playground.stack(), keep=keep) as mount:
        yield mount


def ignore(done: int, total: int) -> None:
    """Do not care how far a commit is."""


async def commit(mount: FuseMount, *paths: str, rules: tuple[str, ...] = ()) -> None:
    async with mount.committing(paths, ignore) as step, mount.frozen():
        await step()
        await step()
        await mount.keep((*rules, *paths))


async def test_what_is_kept_outlives_resets(playground: Playground, home: Path) -> None:
    async with mounted(playground) as mount:
        assert (home / "docs/deep/note").read_text() == "image"
        (home / "docs/letter").write_text("mine")
        (home / "docs/deep/new").write_text("new")
        (home / ".rc").unlink()
        (home / "other").write_text("lost")
        (playground.root / "data").mkdir()
        (playground.root / "data/file").write_text("data")
        for _ in range(2):
            await mount.swap(playground.stack())
            assert (home / "docs/letter").read_text() == "mine"
            assert sorted(os.listdir(home / "docs/deep")) == ["new", "note"]
            assert sorted(os.listdir(home)) == ["docs", "other"]
            assert not (home / ".rc").exists()
            assert (home / "other").read_text() == "image"
            assert (playground.root / "data/file").read_text() == "data"
    async with mounted(playground):
        assert (home / "docs/letter").read_text() == "mine"
        assert sorted(os.listdir(playground.root)) == ["data", "home"]


async def test_what_is_open_goes_on_over_a_reset(playground: Playground, home: Path) -> None:
    async with mounted(playground) as mount:
        with open(home / "docs/letter", "r+b", buffering=0) as file:
            file.write(b"first")
            with mmap.mmap(file.fileno(), 5) as mapped:
                await mount.swap(playground.stack())
                file.write(b"second")
                mapped[:5] = b"FIRST"
                mapped.flush()
        assert (home / "docs/letter").read_bytes() == b"FIRSTsecond"
        await mount.swap(playground.stack())
        assert (home / "docs/letter").read_bytes() == b"FIRSTsecond"


async def test_an_editor_that_writes_beside_and_renames(playground: Playground, home: Path) -> None:
    async with mounted(playground) as mount:
        before_that = "image"
        for text in ("first", "second"):
            (home / ".rc.new").write_text(text)
            os.chmod(home / ".rc.new", 0o640)
            with open(home / ".rc") as before:
                os.rename(home / ".rc.new", home / ".rc")
                assert before.read() == before_that
            before_that = f"{text}!"
            assert (home / ".rc").read_text() == text
            assert stat.S_IMODE((home / ".rc").stat().st_mode) == 0o640
            with open(home / ".rc", "a") as file:
                file.write("!")
            assert (home / ".rc").read_text() == f"{text}!"
            os.rename(home / ".rc", home / "backup")
            assert (home / "backup").read_text() == f"{text}!"
            os.rename(home / "backup", home / ".rc")
            await mount.swap(playground.stack())
            assert (home / ".rc").read_text() == f"{text}!"
            assert sorted(os.listdir(home)) == [".rc", "docs", "other"]


async def test_a_program_that_has_it_open_for_writing_is_asked_to_copy(
    playground: Playground, home: Path
) -> None:
    """The kernel would go on writing into the file that was opened."""
    async with mounted(playground):
        with open(home / "new", "w") as file:
            file.write("text")
            file.flush()
            if playground.data_path is DataPath.PASSTHROUGH:
                with pytest.raises(OSError, match="cross-device"):
                    os.rename(home / "new", home / ".rc")
                return
            os.rename(home / "new", home / ".rc")
            file.write("!")
        assert (home / ".rc").read_text() == "text!"


async def test_mv_copies_directories_over_the_border(playground: Playground, home: Path) -> None:
    async with mounted(playground) as mount:
        (home / "papers/in").mkdir(parents=True)
        (home / "papers/in/one").write_text("one")
        await trio.run_process(["mv", home / "papers", home / "docs/papers"])
        await mount.swap(playground.stack())
        assert (home / "docs/papers/in/one").read_text() == "one"
        await trio.run_process(["mv", home / "docs", home / "letters"])
        assert sorted(os.listdir(home)) == [".rc", "letters", "other"]
        assert (home / "letters/papers/in/one").read_text() == "one"
        await mount.swap(playground.stack())
        assert sorted(os.listdir(home)) == [".rc", "other"]
        await trio.run_process(["mv", home.parent / "u", home.parent / "v"])
        assert os.listdir(home.parent) == ["v"]


async def test_what_may_not_cross_the_border_needs_no_room(playground: Playground) -> None:
    async with playground.on_small_disk("20m") as small:
        (small.image / "home/u/docs").mkdir(parents=True)
        home = small.root / "home/u"
        (small.image / "home/u/docs/letter").write_text("letter")
        (small.image / "home/u/large").write_bytes(b"a" * (17 << 20))
        async with mounted(small):
            assert (home / "large").stat().st_size == 17 << 20
            for cross in (os.rename, os.link):
                with pytest.raises(OSError, match="cross-device"):
                    cross(home / "large", home / "docs/large")
            with pytest.raises(OSError, match="cross-device"):
                libc.renameat2(str(home / "large"), str(home / "docs/letter"), libc.RENAME_EXCHANGE)
            assert os.listdir(home / "docs") == ["letter"]


async def test_a_directory_that_the_image_lacks_is_there_again(playground: Playground) -> None:
    (playground.image / "home").mkdir()
    async with mounted(playground) as mount:
        new = playground.root / "home/new"
        new.mkdir()
        os.chown(new, 1000, 1001)
        os.chmod(new, 0o700)
        (new / "docs").mkdir()
        (new / "docs/file").write_text("kept")
        await mount.swap(playground.stack())
        assert (new / "docs/file").read_text() == "kept"
        assert (new.stat().st_uid, new.stat().st_gid) == (1000, 1001)
        assert stat.S_IMODE(new.stat().st_mode) == 0o700
        await trio.run_process(["rm", "-r", new])
        await mount.swap(playground.stack())
        assert os.listdir(playground.root / "home") == []


async def test_rules_change_live(playground: Playground, home: Path) -> None:
    async with mounted(playground, "/elsewhere") as mount:
        (home / "docs/letter").write_text("lost")
        (home / "other").write_text("lost")
        os.stat(home / ".rc")
        await mount.keep(RULES)
        assert (home / "docs/letter").read_text() == "image"  # not committed
        assert (home / "other").read_text() == "lost"
        (home / "docs/letter").write_text("kept")
        (home / ".rc").write_text("kept")
        await mount.swap(playground.stack())
        assert [(home / name).read_text() for name in ("docs/letter", ".rc", "other")] == [
            *("kept", "kept", "image")
        ]
        await mount.keep(())
        assert [(home / name).read_text() for name in ("docs/letter", ".rc", "other")] == [
            *("image", "image", "image")
        ]


async def test_a_directory_that_is_not_kept_any_more(playground: Playground, home: Path) -> None:
    """It is the image's again, which the fast path may tell by another number than before."""
    async with mounted(playground, "/home/u/docs") as mount:
        docs = playground.root / "home/u/docs"
        (docs / "kept once").write_text("kept")
        before = os.open(docs, os.O_PATH)
        try:
            await mount.keep(())
            assert not (docs / "kept once").exists()
            (docs / "new").write_text("new")
            assert "new" in os.listdir(docs)
            await mount.keep(("/home/u/docs",))
            assert (docs / "kept once").read_text() == "kept"
            assert "new" not in os.listdir(docs)
        finally:
            os.close(before)


async def test_a_commit_with_files_open(playground: Playground, home: Path) -> None:
    async with mounted(playground, "/nothing") as mount:
        (home / "docs/new").write_text("new")
        (home / "docs/letter").unlink()
        (home / "docs/deep").rename(home / "docs/moved")
        with (
            open(home / "docs/open", "wb", buffering=0) as file,
            open(home / "docs/new") as read,
        ):
            file.write(b"before ")
            await commit(mount, "/home/u/docs")
            assert read.read() == "new"
            file.write(b"after")
            assert sorted(os.listdir(home / "docs")) == ["moved", "new", "open"]
            os.fsync(file.fileno())
            assert (playground.kept().upper.fs / "home/u/docs/open").read_bytes() == b"before after"
            file.write(b"!")
        await until(lambda: (home / "docs/open").read_bytes() == b"before after!")
        await until(
            lambda: (
                (playground.kept().upper.fs / "home/u/docs/open").read_bytes() == b"before after!"
            )
        )
        await mount.swap(playground.stack())
        assert sorted(os.listdir(home / "docs")) == ["moved", "new", "open"]
        assert (home / "docs/open").read_bytes() == b"before after!"
        assert (home / "docs/moved/note").read_text() == "image"


async def test_what_cannot_be_committed(playground: Playground, home: Path) -> None:
    async with mounted(playground, "/nothing") as mount:
        (home / "link").symlink_to("docs")
        for path in ("/home/u/missing/file", "/home/u/other/file", "/home/u/link/letter"):
            with pytest.raises(Failed):
                await commit(mount, path)
        with pytest.raises(Failed, match="nothing can be committed now"):
            async with mount.committing(("/home/u/docs",), ignore) as step:
                await step()
        (home / "docs/letter").write_text("writing goes on")


async def program(call: Callable[[], T]) -> T:
    return await trio.to_thread.run_sync(call, abandon_on_cancel=True)


def _work(home: Path, number: int) -> None:
    """What a program does, on both sides of the border; leaves ``.rc`` and `docs/N` as told."""
    (home / "tmp").write_text(str(number))
    os.rename(home / "tmp", home / ".rc")
    (home / f"docs/{number}").write_text(str(number))
    (home / f"other{number}").write_text(str(number))
    if number:
        os.rename(home / f"docs/{number - 1}", home / "docs/letter")
        (home / f"other{number - 1}").unlink()


@pytest.mark.parametrize("seed", range(2))
async def test_workers_that_are_killed(playground: Playground, home: Path, seed: int) -> None:
    if playground.data_path is DataPath.PLAIN:
        pytest.skip("leaves nothing to go on with")
    choice = random.Random(seed)
    async with mounted(playground) as mount:
        done = 0

        async def work() -> None:
            nonlocal done
            with open(home / "docs/held", "wb", buffering=0) as file:
                for done in range(60):
                    await program(lambda number=done: _work(home, number))  # type: ignore[misc]
                    await program(lambda: file.write(b"x"))

        async with trio.open_nursery() as nursery:

            async def kill() -> None:
                for _ in range(8):
                    wanted = done + choice.randrange(1, 6)
                    while done < wanted and done < 58:
                        await trio.sleep(0)
                    os.kill(mount.worker, signal.SIGKILL)
                    await mount.wait_died()
                    await mount.recover()

            nursery.start_soon(kill)
            await work()
        assert (home / ".rc").read_text() == "59"
        assert (home / "docs/letter").read_text() == "58"
        assert (home / "docs/held").read_bytes() == b"x" * 60
        assert sorted(os.listdir(home)) == [".rc", "docs", "other", "other59"]
        await mount.swap(playground.stack())
        assert (home / ".rc").read_text() == "59"
        assert sorted(os.listdir(home / "docs")) == ["59", "deep", "held", "letter"]


async def test_an_open_file_that_was_removed_after_a_death(
    playground: Playground, home: Path
) -> None:
    if playground.data_path is DataPath.PLAIN:
        pytest.skip("leaves nothing to go on with")
    async with mounted(playground) as mount:
        for path in (home / "docs/letter", home / "docs/new", home / ".rc"):
            with open(path, "w+b", buffering=0) as file:
                file.write(b"text")
                path.unlink()
                os.kill(mount.worker, signal.SIGKILL)
                await mount.wait_died()
                await mount.recover()
                file.write(b"more")
                assert os.pread(file.fileno(), 99, 0) == b"textmore"
                assert os.fstat(file.fileno()).st_nlink == 0
        orphans = playground.kept().orphans
        await until(lambda: not list(orphans.iterdir()))
