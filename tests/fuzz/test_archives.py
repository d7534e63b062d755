"""Archives that are imported: nearly right ones, and whatever bytes there are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessiond.errors import SessiondError
from sessiond.overlay.layer import Layer
from sessiond.overlay.stack import Stack
from sessiond.session.oci_reader import Marks, read_layer
from sessiond.session.oci_writer import write_layer
from sessiond.session.pipes import Pipe
from sessiond.session.squashfs import read_image, write_image
from tests.support import trees
from tests.support.fuzzing import fuzz
from tests.support.trees import Dir, File, Link, Symlink, Tree, Whiteout

pytestmark = pytest.mark.root

TREE: Tree = {
    "n" * 120: File(content=b"1" * 600, xattrs={"user.x": b"\xff"}),
    "d": Dir(entries={"link": Symlink(target="/etc"), "gone": Whiteout(), "f": b"2"}),
    "hard": Link("d/f"),
}


@contextmanager
def small_layer() -> Iterator[tuple[Path, Stack]]:
    """Yield a directory to work in, and a small layer there on another one."""
    with tempfile.TemporaryDirectory() as directory:
        layers = [os.fsencode(f"{directory}/{name}") for name in ("layer", "image")]
        for layer in layers:
            os.mkdir(layer)
        trees.build({"d": {"gone": b"1"}}, os.fsdecode(layers[1]))
        trees.build(TREE, os.fsdecode(layers[0]))
        with closing(Stack.open(layers)) as stack:
            yield Path(directory), stack


def archive() -> bytes:
    """A small archive with headers of all kinds."""
    out: list[bytes] = []
    with small_layer() as (_, stack):
        write_layer(stack, out.append, lambda _: None).complete()
    return b"".join(out)


@st.composite
def nearly_right(draw: st.DrawFn) -> bytes:
    data = bytearray(_ARCHIVE)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data) - 1))
        value = draw(st.binary(min_size=1, max_size=12))
        data[at : at + len(value)] = value
    for block in range(0, len(data) - 511, 512):  # checksums are right, or nothing else is tried
        header = data[block : block + 512]
        if header[257:262] == b"ustar" and draw(st.booleans()):
            total = sum(header[:148]) + 8 * 32 + sum(header[156:])
            data[block + 148 : block + 156] = b"%06o\0 " % total
    return bytes(data)


_ARCHIVE = archive() if os.geteuid() == 0 else b""


@fuzz(150)
@given(st.binary(max_size=2000) | nearly_right(), st.sampled_from(Marks))
def test_an_archive_is_read_or_refused(data: bytes, marks: Marks) -> None:
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory)
        for name in ("target", "image", "beside"):
            (top / name).mkdir()
        with (
            closing(Layer.open(os.fsencode(top / "target"), writable=True)) as layer,
            closing(Layer.open(os.fsencode(top / "image"), writable=False)) as image,
            suppress(SessiondError, OSError),
        ):
            read_layer(BytesIO(data).read, layer, image, marks=marks)
        assert list((top / "beside").iterdir()) == list((top / "image").iterdir()) == []
        assert {path.name for path in top.iterdir()} == {"target", "image", "beside"}


def image() -> bytes:
    """The same as a squashfs."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)
    pipe = Pipe(writer, _nothing)
    with small_layer() as (directory, stack), closing(pipe):
        write_image(stack, pipe, directory, lambda _: None, _nothing, _nothing)
    with open(reader, "rb") as file:
        return file.read()


def _nothing() -> None:
    """Nobody gives up."""


_IMAGE = image() if os.geteuid() == 0 else b""
_END = len(_IMAGE)


@st.composite
def nearly_right_image(draw: st.DrawFn) -> bytes:
    """One with other bytes in its superblock or its tables."""
    data = bytearray(_IMAGE)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(4, 95) | st.integers(96, _END - 1))
        value = draw(st.binary(min_size=1, max_size=8))
        data[at : at + len(value)] = value
    return bytes(data[: draw(st.just(_END) | st.integers(0, _END))])


@fuzz(40)
@given(nearly_right_image())
def test_a_squashfs_is_read_or_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory)
        for name in ("target", "image", "beside"):
            (top / name).mkdir()
        with (
            closing(Layer.open(os.fsencode(top / "target"), writable=True)) as layer,
            closing(Layer.open(os.fsencode(top / "image"), writable=False)) as below,
            suppress(SessiondError, OSError),
        ):
            read_image(BytesIO(data).read, layer, below, top, lambda _: None, _nothing)
        assert list((top / "beside").iterdir()) == list((top / "image").iterdir()) == []
        assert {path.name for path in top.iterdir()} == {"target", "image", "beside"}
