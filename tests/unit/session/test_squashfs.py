"""Snapshots as squashfs: what the kernel's overlayfs makes of them, and what comes back."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from sessiond.errors import Cancelled, Failed, NoSuchSnapshot, NotSupported
from sessiond.overlay.layer import Layer
from sessiond.overlay.stack import Stack
from sessiond.session import confined, loop, pipes, squashfs
from sessiond.session.pipes import Pipe
from tests.support import libc, trees
from tests.support.kernel_overlay import KernelOverlay
from tests.support.mounts import Layers, detach
from tests.support.trees import Dir, File, Link, Snapshot, Tree, Whiteout
from tests.unit.session.test_oci import LOWER, UPPER, Bench

WITHOUT_ACL: Tree = {
    **UPPER,
    "percent": File(xattrs={"user.a%25b%c": b"1"}),
    "sub": Dir(
        entries={name: node for name, node in UPPER["sub"].entries.items() if name != "acl"},
        mode=0o2750,
    ),
    "swap": File(content=b"x", uid=3_000_000_000, xattrs={"trusted.mark": b"\0\n\xff"}),
    ".wh.literal": b"a name like any other",
}


PLAINLY_NAMED: Tree = {
    **LOWER,
    "etc": replace(LOWER["etc"], xattrs={"user.mark": b"\xff\0x"}),
}


class SquashfsBench(Bench):
    """Layers that go into squashfs files, and come out of them."""

    def pack(self, name: str, *layers: str) -> Path:
        lowers = [os.fsencode(self.path(one)) for one in (*layers, "image")]
        target = self.directory / name
        with closing(Stack.open(lowers)) as stack:
            target.write_bytes(through_pipe(self.directory, stack))
        return target

    def read(self, name: str, data: bytes) -> str:
        """Import a squashfs as the layer `name`."""
        target = self.directory / name
        target.mkdir()
        left = memoryview(data)

        def read(size: int) -> bytes:
            nonlocal left
            part, left = bytes(left[:size]), left[size:]
            return part

        with (
            closing(Layer.open(os.fsencode(target), writable=True)) as layer,
            closing(Layer.open(os.fsencode(self.path("image")), writable=False)) as image,
        ):
            squashfs.read_image(read, layer, image, self.directory, lambda _: None, lambda: None)
        return str(target)

    def mounted(self, image: Path) -> str:
        """Mount a squashfs as the layer of that name without its suffix."""
        target = self.directory / image.stem
        target.mkdir()
        with loop.attached(image) as device:
            libc.mount(str(device), str(target), "squashfs", libc.MS_RDONLY, "")
        return str(target)


def through_pipe(directory: Path, stack: Stack, check: Callable[[], None] = lambda: None) -> bytes:
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with subprocess.Popen(["cat"], stdin=reader, stdout=subprocess.PIPE) as cat:
        os.close(reader)
        target = Pipe(pipes.take(writer, write=True), check)
        os.close(writer)
        try:
            squashfs.write_image(stack, target, directory, lambda _: None, check, lambda: None)
        finally:
            target.close()
        return cat.communicate()[0]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[SquashfsBench]:
    if os.geteuid() != 0:
        pytest.skip("layers take root")
    bench = SquashfsBench(tmp_path)
    yield bench
    for path in tmp_path.iterdir():
        if path.is_mount():
            detach(str(path))


def in_seconds(tree: Snapshot) -> Snapshot:
    """As a squashfs has it: times from 1970 on, in seconds."""
    return {
        path: entry._replace(mtime_ns=max(0, entry.mtime_ns) // 10**9 * 10**9)
        for path, entry in tree.items()
    }


def test_a_module_for_the_kernels_overlayfs(bench: SquashfsBench) -> None:
    bench.layer("lower", PLAINLY_NAMED)
    bench.layer("upper", WITHOUT_ACL)
    bench.mounted(bench.pack("module.squashfs", "upper", "lower"))
    expected = in_seconds(bench.shown("upper", "lower"))
    trees.assert_same(expected, in_seconds(bench.shown("module")))
    # It says what it hides as overlayfs would, and not name by name.
    assert os.getxattr(bench.path("module/usr/lib/deep"), "trusted.overlay.opaque") == b"y"
    assert os.listdir(bench.path("module/usr/lib/deep")) == ["mine"]
    gone = os.lstat(bench.path("module/usr/gone"))
    assert (gone.st_mode, gone.st_rdev) == (0o020000, 0)


def test_a_round_trip_shows_the_same(bench: SquashfsBench) -> None:
    bench.layer("lower", PLAINLY_NAMED)
    bench.layer("upper", WITHOUT_ACL)
    data = bench.pack("out.squashfs", "upper", "lower").read_bytes()
    assert data.startswith(squashfs.MAGIC)
    bench.read("imported", data)
    trees.assert_same(
        in_seconds(bench.shown("upper", "lower")), in_seconds(bench.shown("imported"))
    )
    assert os.stat(bench.path("imported/sub/sparse")).st_blocks * 512 < 1 << 16


def test_what_mksquashfs_makes_of_an_upper_is_read(bench: SquashfsBench) -> None:
    """As others make modules: of an upper that overlayfs has written, with its notes in it."""
    for name in ("view", "work", "upper"):
        (bench.directory / name).mkdir()
    layers = Layers([bench.path("image")], bench.path("upper"), bench.path("work"))
    with KernelOverlay().mounted(layers, bench.path("view"), "redirect_dir=off"):
        for path in ("etc/motd", "usr/lib/deep/file"):
            with open(bench.path(f"view/{path}"), "a") as file:
                file.write("more")
        subprocess.run(["rm", "-r", bench.path("view/usr/gone"), bench.path("view/etc/old")])
        os.mkdir(bench.path("view/etc/old"))
    assert b"trusted.overlay.origin" in map(os.fsencode, os.listxattr(bench.path("upper/etc/motd")))
    image = mksquashfs(bench, "upper")
    bench.read("imported", image)
    trees.assert_same(in_seconds(bench.shown("upper")), in_seconds(bench.shown("imported")))


def mksquashfs(bench: SquashfsBench, name: str) -> bytes:
    target = bench.directory / f"{name}.by-mksquashfs"
    command = ["mksquashfs", bench.path(name), target, "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target.read_bytes()


@pytest.mark.parametrize(
    "attribute", ["trusted.overlay.redirect", "trusted.overlay.metacopy", "trusted.overlay.opaque"]
)
def test_what_means_nothing_by_itself_is_refused(bench: SquashfsBench, attribute: str) -> None:
    bench.layer("upper", {"d": Dir(xattrs={attribute: b"x"})})
    with pytest.raises(Failed, match=f"'d' has the attribute {attribute}"):
        bench.read("imported", mksquashfs(bench, "upper"))


@pytest.mark.parametrize(
    ("tree", "path", "name"),
    [
        (UPPER, "sub/acl", "system.posix_acl_access"),
        ({"file": File(xattrs={"user.a=b": b"1"})}, "file", "user.a=b"),
    ],
)
def test_what_a_squashfs_cannot_have_is_named(
    bench: SquashfsBench, tree: Tree, path: str, name: str
) -> None:
    bench.layer("upper", tree)
    with pytest.raises(Failed, match=f"'/{path}' has the attribute {name}"):
        bench.pack("out", "upper")


@pytest.mark.parametrize("size", [4, 95, 96, 200, -1])
def test_an_image_that_is_cut_off(bench: SquashfsBench, size: int) -> None:
    bench.layer("upper", {"file": b"x" * 5000})
    data = bench.pack("out", "upper").read_bytes()
    used = struct.unpack_from("<Q", data, 40)[0]
    with pytest.raises(Failed, match="cut off"):
        bench.read("imported", data[: used + size if size < 0 else size])


def test_an_image_that_does_not_end(bench: SquashfsBench) -> None:
    bench.layer("upper", {})
    data = bench.pack("out", "upper").read_bytes()
    with pytest.raises(Failed, match="longer than it says"):
        bench.read("imported", data + bytes(2 << 20))


def test_an_image_of_something_else(bench: SquashfsBench) -> None:
    head = bytearray(squashfs.MAGIC + bytes(4000))
    with pytest.raises(Failed, match="sqfs2tar has failed"):
        bench.read("imported", bytes(head))


def test_a_program_that_is_not_there(bench: SquashfsBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    bench.layer("upper", {})
    with pytest.raises(NotSupported, match="squashfs-tools-ng"):
        bench.pack("out", "upper")


def test_who_gives_up_leaves_no_process(bench: SquashfsBench) -> None:
    bench.layer("upper", {f"file{number}": os.urandom(300_000) for number in range(20)})
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked > 30:
            raise Cancelled("It was cancelled.")

    lowers = [os.fsencode(bench.path(name)) for name in ("upper", "image")]
    with closing(Stack.open(lowers)) as stack, pytest.raises(Cancelled):
        through_pipe(bench.directory, stack, check)
    assert programs() == set()


def test_a_reader_who_goes_away(bench: SquashfsBench) -> None:
    bench.layer("upper", {"file": b"x"})
    reader, writer = os.pipe2(os.O_CLOEXEC)
    target = Pipe(pipes.take(writer, write=True), lambda: None)
    os.close(reader)
    os.close(writer)
    lowers = [os.fsencode(bench.path(name)) for name in ("upper", "image")]
    with closing(Stack.open(lowers)) as stack, pytest.raises(Failed, match="closed early"):
        squashfs.write_image(
            stack, target, bench.directory, lambda _: None, lambda: None, lambda: None
        )
    target.close()
    assert programs() == set()


def test_an_image_of_layers_that_are_gone_is_not_sent(bench: SquashfsBench) -> None:
    bench.layer("upper", {"file": b"x"})
    reader, writer = os.pipe2(os.O_CLOEXEC)
    target = Pipe(pipes.take(writer, write=True), lambda: None)
    os.close(writer)

    def require() -> None:
        raise NoSuchSnapshot("It was deleted.")

    lowers = [os.fsencode(bench.path(name)) for name in ("upper", "image")]
    with closing(Stack.open(lowers)) as stack, pytest.raises(NoSuchSnapshot):
        squashfs.write_image(stack, target, bench.directory, lambda _: None, lambda: None, require)
    target.close()
    with open(reader, "rb") as file:
        assert file.read() == b""


def test_a_full_disk(bench: SquashfsBench) -> None:
    bench.layer("upper", {"file": os.urandom(3 << 20)})
    small = bench.directory / "small"
    small.mkdir()
    libc.mount("tmpfs", str(small), "tmpfs", 0, "size=1m")
    lowers = [os.fsencode(bench.path(name)) for name in ("upper", "image")]
    with closing(Stack.open(lowers)) as stack, pytest.raises(OSError, match="No space"):
        through_pipe(small, stack)
    assert os.statvfs(small).f_bfree == os.statvfs(small).f_blocks


def test_programs_have_no_rights(bench: SquashfsBench) -> None:
    with confined.nameless_file(bench.directory) as file:
        command = ["sh", "-c", "cat /proc/self/status; cat /etc/shadow; ulimit -v; id -u; id -G"]
        with confined.Program(command, file, lambda: None, reads=False) as program:
            said = b""
            while data := program.pipe.read(1 << 16):
                said += data
    lines = said.decode().splitlines()
    assert {"CapEff:\t0000000000000000", "NoNewPrivs:\t1"} <= set(lines)
    assert lines[-3:] == [str((2 << 30) // 1024), str(confined.UID), str(confined.UID)]
    assert not any("root:" in line for line in lines)


def programs() -> set[str]:
    """Names of those that this process has started and that are there still."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        found = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in file.read().split()}
    return found & {"setpriv", "prlimit", "tar2sqfs", "sqfs2tar"}


def test_hard_links_and_whiteouts_of_one_name(bench: SquashfsBench) -> None:
    tree: Tree = {"a": {"first": b"1", "second": Link("a/first")}, "usr": Whiteout()}
    bench.layer("upper", tree)
    bench.read("imported", bench.pack("out", "upper").read_bytes())
    trees.assert_same(in_seconds(bench.shown("upper")), in_seconds(bench.shown("imported")))
    assert os.stat(bench.path("imported/a/first")).st_nlink == 2
