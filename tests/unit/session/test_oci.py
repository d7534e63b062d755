"""Archives of layers: written, read by other tools, read back, and made up by an enemy."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from sessiond.errors import Failed, NoSpace
from sessiond.overlay.layer import Layer
from sessiond.overlay.stack import Stack
from sessiond.session.oci_reader import read_layer
from sessiond.session.oci_writer import write_layer
from tests.support import libc, trees
from tests.support.kernel_overlay import KernelOverlay
from tests.support.mounts import Layers
from tests.support.trees import Device, Dir, Fifo, File, Link, Snapshot, Symlink, Tree, Whiteout

LONG = "n" * 255
IMAGE: Tree = {
    "etc": Dir(entries={"motd": b"hello\n", "hosts": b"::1\n", "old": {"a": b"a"}}, uid=3),
    "usr": {"lib": {"deep": {"file": b"from the image", "other": b"o"}}, "gone": {"x": b"x"}},
    "swap": {"inner": b"1"},
    "same": Dir(entries={"kept": b"k"}),
}
LOWER: Tree = {
    "etc": Dir(
        entries={
            "motd": File(content=b"changed\n", mode=0o4755, uid=70000, gid=3_000_000),
            "old": Whiteout(),
            LONG: File(content=b"long", mtime_ns=-1_500_000_000),
            "caf\udcc3\udca9\udcff": b"name of bytes",
        },
        mode=0o1777,
        xattrs={"user.mark": b"\xff\0x", "user.a=b%c": b"1"},
    ),
    "first": File(content=b"two names", xattrs={"user.x": b"\x80" * 9}),
    "second": Link("first"),
}
UPPER: Tree = {
    "usr": {"gone": Whiteout(), "lib": {"deep": Dir(entries={"mine": b"m"}, opaque=True)}},
    "swap": File(content=b"was a directory"),
    "sub": Dir(
        entries={
            "null": Device(kind=0o020000, major=1, minor=3),
            "fifo": Fifo(mode=0o640),
            "link": Symlink(target="/" + "t" * 300),
            "sparse": File(content=b"end", hole=1 << 20),
            "capable": File(
                content=b"#!",
                xattrs={"security.capability": bytes.fromhex("0100000200200000") + bytes(12)},
            ),
            "acl": File(
                xattrs={
                    "system.posix_acl_access": trees.acl(
                        ("u", None, 6),
                        ("u", 1000, 4),
                        ("g", None, 4),
                        ("m", None, 4),
                        ("o", None, 0),
                    )
                },
                mode=0o640,
            ),
        },
        mode=0o2750,
    ),
}


class Bench:
    """Layers in a directory, and what they show."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.layer("image", IMAGE)

    def layer(self, name: str, tree: Tree) -> str:
        path = self.directory / name
        path.mkdir()
        trees.build(tree, str(path))
        return str(path)

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def archive(self, *layers: str) -> bytes:
        """Write layers, topmost first, over the image."""
        lowers = [os.fsencode(self.path(name)) for name in (*layers, "image")]
        out: list[bytes] = []
        with closing(Stack.open(lowers)) as stack:
            write_layer(stack, out.append, lambda _: None).complete()
        return b"".join(out)

    def unpack(self, name: str, data: bytes) -> str:
        target = self.directory / name
        target.mkdir()
        with (
            closing(Layer.open(os.fsencode(target), writable=True)) as layer,
            closing(Layer.open(os.fsencode(self.path("image")), writable=False)) as image,
        ):
            # In small pieces, as they come through a pipe.
            read_layer(_piecewise(data), layer, image)
        return str(target)

    def shown(self, *layers: str) -> Snapshot:
        """Return what the kernel's overlayfs shows of layers over the image."""
        mount_point = self.directory / "view"
        mount_point.mkdir(exist_ok=True)
        lowers = [self.path(name) for name in (*layers, "image")]
        with KernelOverlay().mounted(Layers(lowers), str(mount_point)):
            return trees.snapshot(str(mount_point))


def _piecewise(data: bytes) -> Callable[[int], bytes]:
    stream = io.BytesIO(data)
    return lambda size: stream.read(min(size, 1000))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    if os.geteuid() != 0:
        pytest.skip("layers take root")
    return Bench(tmp_path)


def test_a_round_trip_shows_the_same(bench: Bench) -> None:
    bench.layer("lower", LOWER)
    bench.layer("upper", UPPER)
    archive = bench.archive("upper", "lower")
    bench.unpack("imported", archive)
    trees.assert_same(bench.shown("upper", "lower"), bench.shown("imported"))
    assert bench.archive("imported") == archive
    assert len(archive) % 10240 == 0


def test_gnu_tar_reads_it(bench: Bench) -> None:
    bench.layer("lower", LOWER)
    bench.layer("upper", UPPER)
    target = bench.directory / "by-tar"
    target.mkdir()
    done = subprocess.run(
        [
            "tar",
            "--extract",
            "--warning=no-timestamp",
            "--xattrs",
            "--xattrs-include=*",
            "--numeric-owner",
            "-C",
            target,
        ],
        input=bench.archive("upper", "lower"),
        capture_output=True,
        check=True,
    )
    assert done.stderr == b""
    found, expected = trees.snapshot(str(target)), bench.shown("upper", "lower")
    assert found[b"etc/.wh.old"].size == 0
    assert {b"usr/.wh.gone", b"usr/lib/deep/.wh.file", b"usr/lib/deep/.wh.other"} <= found.keys()
    for path, entry in found.items():
        if b".wh." not in path:
            assert entry == expected[path], path


def test_a_tar_by_gnu_tar_is_read(bench: Bench) -> None:
    bench.layer("tree", {name: node for name, node in UPPER.items() if name in ("sub", "swap")})
    expected = trees.snapshot(bench.path("tree"))
    del expected[b"."]
    for number, options in enumerate((POSIX, [*POSIX, "--sparse"], ["--format=gnu", "--sparse"])):
        command = ["tar", "--create", *options, "-C", bench.path("tree"), "sub", "swap"]
        archive = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        for kind, data in (("plain", archive), ("gzip", gzip.compress(archive))):
            found = trees.snapshot(bench.unpack(f"{kind}{number}", data))
            del found[b"."]
            if "--format=gnu" in options:
                trees.assert_same(_poorer(expected), _poorer(found))
            else:
                trees.assert_same(expected, found)
    assert os.stat(bench.path("plain1/sub/sparse")).st_blocks * 512 < 1 << 16


POSIX = ["--format=posix", "--xattrs", "--xattrs-include=*"]


def _poorer(tree: Snapshot) -> Snapshot:
    """Leave out what GNU tar's own format has no place for."""
    return {
        path: entry._replace(xattrs=(), mtime_ns=entry.mtime_ns // 10**9)
        for path, entry in tree.items()
    }


def test_a_renamed_directory_is_there_with_all_that_is_in_it(bench: Bench) -> None:
    for name in ("view", "work", "upper"):
        (bench.directory / name).mkdir()
    layers = Layers([bench.path("image")], bench.path("upper"), bench.path("work"))
    with KernelOverlay().mounted(layers, bench.path("view")):
        os.rename(bench.path("view/usr/lib"), bench.path("view/etc/library"))
    bench.unpack("imported", bench.archive("upper"))
    for path in Path(bench.path("imported")).rglob("*"):
        assert "trusted.overlay.redirect" not in os.listxattr(path, follow_symlinks=False)
    trees.assert_same(bench.shown("upper"), bench.shown("imported"))


def test_notes_of_a_nested_overlay_stay_behind(bench: Bench) -> None:
    bench.layer("upper", {"d": Dir(xattrs={"trusted.overlay.overlay.opaque": b"y"})})
    with tarfile.open(fileobj=io.BytesIO(bench.archive("upper"))) as archive:
        assert archive.getmember("d").pax_headers.keys() == {"mtime"}


def test_a_name_that_is_reserved_is_refused(bench: Bench) -> None:
    bench.layer("upper", {"etc": {".wh.motd": b""}})
    with pytest.raises(Failed, match=r"\.wh\.motd.*rename it"):
        bench.archive("upper")


def test_a_large_file_has_its_size(bench: Bench) -> None:
    bench.layer("upper", {})
    fd = os.open(bench.path("upper/huge"), os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, 9 << 30)
    os.close(fd)

    class Enough(Exception):
        pass

    out: list[bytes] = []

    def write(data: bytes) -> None:
        out.append(data)
        if sum(map(len, out)) > 1 << 20:
            raise Enough

    lowers = [os.fsencode(bench.path(name)) for name in ("upper", "image")]
    with closing(Stack.open(lowers)) as stack, pytest.raises(Enough):
        write_layer(stack, write, lambda _: None)
    with tarfile.open(fileobj=io.BytesIO(b"".join(out)), mode="r|") as archive:
        assert [(member.name, member.size) for member in (archive.next(), archive.next())] == [
            (".", 0),
            ("huge", 9 << 30),
        ]


# An archive that is not to be trusted


def member(name: str, kind: bytes = tarfile.REGTYPE, **more: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


def packed(*members: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for one in members:
            info, data = one if isinstance(one, tuple) else (one, b"")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([member("../escaped")], "a name"),
        ([member("a/../../escaped")], "a name"),
        ([member("/tmp/escaped")], "no relative path"),
        (
            [member("l", tarfile.SYMTYPE, linkname="/tmp"), member("l/escaped")],
            "symbolic link|no dir",
        ),
        ([member("h", tarfile.LNKTYPE, linkname="../../etc/passwd")], "a name"),
        ([member("h", tarfile.LNKTYPE, linkname="/etc/passwd")], "no relative path"),
        ([member("h", tarfile.LNKTYPE, linkname="etc/motd")], "which is not there"),
        (
            [
                member("l", tarfile.SYMTYPE, linkname="/etc"),
                member("h", tarfile.LNKTYPE, linkname="l/passwd"),
            ],
            "symbolic link|no directory",
        ),
        ([member("d", tarfile.DIRTYPE), member("h", tarfile.LNKTYPE, linkname="d")], "not there"),
        ([member("w", tarfile.CHRTYPE)], "device 0:0"),
        ([member("f"), member("f/below")], "no directory"),
        ([member("d", tarfile.DIRTYPE), member("d")], "something else"),
        ([member("", tarfile.REGTYPE)], "root is no directory"),
        ([member(".wh...", tarfile.REGTYPE)], "a name"),
        ([member("f", b"V")], "no known type"),
        ([member("n" * 256)], "File name too long"),
    ],
)
def test_what_an_enemy_writes_is_refused(
    bench: Bench, members: list[tarfile.TarInfo], reason: str
) -> None:
    with pytest.raises((Failed, OSError), match=reason):
        bench.unpack("target", packed(*members))
    assert not Path("/tmp/escaped").exists()
    assert not (bench.directory / "escaped").exists()


def test_symlinks_are_replaced_and_not_followed(bench: Bench) -> None:
    (bench.directory / "victim").write_bytes(b"untouched")
    victim = bench.path("victim")
    archive = packed(
        member("l", tarfile.SYMTYPE, linkname=victim), (member("l", mode=0o4777), b"taken")
    )
    bench.unpack("target", archive)
    assert Path(victim).read_bytes() == b"untouched"
    assert (bench.directory / "target/l").read_bytes() == b"taken"


def test_no_note_of_an_overlay_is_taken(bench: Bench) -> None:
    headers = {
        "SCHILY.xattr.trusted.overlay.redirect": "/etc",
        "SCHILY.xattr.trusted.overlay.opaque": "y",
        "SCHILY.xattr.trusted.overlay.metacopy": "",
        "SCHILY.xattr.user.mine": "1",
    }
    archive = packed(
        member("same", tarfile.DIRTYPE, pax_headers=headers), member("f", pax_headers=headers)
    )
    target = bench.unpack("target", archive)
    for name in ("same", "f"):
        assert os.listxattr(f"{target}/{name}") == ["user.mine"]


def test_directories_that_it_lacks_are_those_of_the_image(bench: Bench) -> None:
    bench.unpack("imported", packed((member("etc/new/file"), b"1"), member("usr/lib/.wh.deep")))
    shown, before = bench.shown("imported"), trees.snapshot(bench.path("image"))
    assert shown[b"etc"] == before[b"etc"]
    assert shown[b"usr/lib"] == before[b"usr/lib"]
    assert b"usr/lib/deep" not in shown
    assert shown[b"etc/new"].mode == 0o755
    assert b"etc/hosts" in shown


@pytest.mark.parametrize("order", [1, -1])
def test_whiteouts_hide_only_what_is_below(bench: Bench, order: int) -> None:
    members = [member(".wh.etc"), member("etc", tarfile.DIRTYPE, mode=0o700), member(".wh.swap")]
    members += [member("swap", mode=0o600)]
    bench.unpack("imported", packed(*members[::order]))
    shown = bench.shown("imported")
    assert shown[b"etc"].kind == "directory"
    assert b"etc/motd" not in shown
    assert shown[b"swap"].kind == "file"


def test_an_opaque_directory(bench: Bench) -> None:
    members = [member("usr/lib/.wh..wh..opq"), member("usr/lib/x"), member("usr/.wh..wh.plnk")]
    bench.unpack("imported", packed(*members))
    shown = bench.shown("imported")
    assert {path for path in shown if path.startswith(b"usr/lib/")} == {b"usr/lib/x"}
    assert b"usr/.wh..wh.plnk" not in shown


def test_every_end_but_the_end_is_noticed(bench: Bench) -> None:
    archive = packed((member("a" * 150), b"1" * 700), member("b"))
    for size in [*range(0, len(archive), 512), 100, 700, 1800]:
        if any(archive[size:]) or size % 512:
            with pytest.raises(Failed, match="damaged, cut off"):
                bench.unpack(f"target{size}", archive[:size])
    end = len(archive.rstrip(b"\0")) // 512 * 512 + 512
    with pytest.raises(Failed, match="its end is missing"):
        bench.unpack("target", archive[:end])
    with pytest.raises(Failed, match="damaged, cut off"):
        bench.unpack("gzip", gzip.compress(archive)[:-20])


def test_nonsense_is_refused(bench: Bench) -> None:
    for number, data in enumerate([b"", b"x", b"nonsense" * 1000, b"\x1f\x8b" + b"x" * 99]):
        with pytest.raises(Failed, match="damaged, cut off, or no tar"):
            bench.unpack(f"target{number}", data)


def extended(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)


def chained() -> bytes:
    return b"".join(extended(b"8 a=bc\n\n"[:7]) for _ in range(5000)) + packed(member("f"))


def claiming(size: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(4096)


HOSTILE = {
    "a header larger than memory": lambda: claiming(1 << 40, tarfile.XHDTYPE),
    "a name larger than memory": lambda: claiming(1 << 40, tarfile.GNUTYPE_LONGNAME),
    "a negative size": lambda: claiming(-1024, tarfile.REGTYPE),
    "headers of headers": chained,
    "a sparse map without end": lambda: (
        extended(b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n30 GNU.sparse.name=aaaaaaaaaaa\n")
        + packed((member("f"), b"99999999\n" + b"1\n" * (1 << 20)))
    ),
    "a sparse map of negative sizes": lambda: (
        extended(
            b"22 GNU.sparse.major=0\n22 GNU.sparse.minor=1\n"
            b"24 GNU.sparse.map=0,-10\n25 GNU.sparse.size=1000\n"
        )
        + packed((member("f"), b"1" * 100))
    ),
    "a time without bounds": lambda: extended(b"22 mtime=1e9999999999\n") + packed(member("f")),
    "an owner without bounds": lambda: (
        extended(b"26 uid=99999999999999999\n") + packed(member("f"))
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_claims_are_not_believed(bench: Bench, what: str) -> None:
    with pytest.raises(Failed):
        bench.unpack("target", HOSTILE[what]())


def test_more_than_there_is_room_for_is_refused_first(bench: Bench) -> None:
    target = bench.directory / "small"
    target.mkdir()
    libc.mount("tmpfs", str(target), "tmpfs", 0, "size=1m")
    data = packed((member("f"), b"1" * (2 << 20)))
    try:
        with (
            closing(Layer.open(os.fsencode(target), writable=True)) as layer,
            closing(Layer.open(os.fsencode(bench.path("image")), writable=False)) as image,
            pytest.raises(NoSpace),
        ):
            read_layer(io.BytesIO(data).read, layer, image)
        assert list(target.iterdir()) == []
    finally:
        libc.umount(str(target), libc.MNT_DETACH)
