"""Formats that this overlay reads though it writes them seldom or never, and malformed ones."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from sessiond.overlay.overlay import Overlay
from sessiond.overlay.stack import Stack
from tests.unit.overlay.conftest import Bench, contents, find, names, new_directory

pytestmark = pytest.mark.root


def mark(path: os.PathLike[str], name: str, value: bytes) -> None:
    os.setxattr(path, f"trusted.overlay.{name}", value)


def test_absolute_redirect_through_several_lowers(bench: Bench) -> None:
    low, middle = bench.layer("low"), bench.layer("middle")
    (low / "a/b").mkdir(parents=True)
    (low / "a/b/deep").write_text("low")
    (middle / "c").mkdir()
    mark(middle / "c", "redirect", b"/a/b")
    (bench.layer("upper") / "d").mkdir()
    mark(bench.layer("upper") / "d", "redirect", b"/c")
    overlay = bench.overlay("middle", "low")
    assert contents(overlay, "d/deep") == b"low"


def test_relative_redirect_applies_to_the_layers_below(bench: Bench) -> None:
    (bench.layer("low") / "old").mkdir()
    (bench.layer("low") / "old/file").write_text("low")
    (bench.layer("upper") / "new").mkdir()
    mark(bench.layer("upper") / "new", "redirect", b"old")
    assert contents(bench.overlay("low"), "new/file") == b"low"


_MALFORMED = [b"/../etc", b"/a//b", b"a/b", b"..", b"/", b"a\0b", b"/a\0b", b"x" * 256]


@pytest.mark.parametrize("target", _MALFORMED)
def test_a_malformed_redirect_is_an_error_and_leads_nowhere(bench: Bench, target: bytes) -> None:
    bench.layer("low")
    (bench.layer("upper") / "d").mkdir()
    mark(bench.layer("upper") / "d", "redirect", target)
    with pytest.raises(OSError) as caught:
        find(bench.overlay("low"), "d")
    assert caught.value.errno == errno.EIO


def test_redirect_stops_at_an_opaque_directory_on_its_way(bench: Bench) -> None:
    low, middle, upper = bench.layer("low"), bench.layer("middle"), bench.layer("upper")
    (low / "a/b").mkdir(parents=True)
    (low / "a/b/hidden").write_text("")
    (middle / "a/b").mkdir(parents=True)
    mark(middle / "a", "opaque", b"y")
    (upper / "d").mkdir()
    mark(upper / "d", "redirect", b"/a/b")
    assert names(bench.overlay("middle", "low"), "d") == []


@pytest.mark.parametrize("redirect", [b"/z", b"z"])
def test_redirect_through_a_redirected_directory(bench: Bench, redirect: bytes) -> None:
    """`a` was renamed before a snapshot, `a/x` afterwards."""
    low, middle, upper = bench.layer("low"), bench.layer("middle"), bench.layer("upper")
    (low / "z/x").mkdir(parents=True)
    (low / "z/x/deep").write_text("low")
    (middle / "a/x").mkdir(parents=True)
    mark(middle / "a", "redirect", redirect)
    (upper / "y").mkdir()
    mark(upper / "y", "redirect", b"/a/x")
    assert contents(bench.overlay("middle", "low"), "y/deep") == b"low"


def test_redirect_leads_on_where_a_layer_has_only_the_way(bench: Bench) -> None:
    low, middle, upper = bench.layer("low"), bench.layer("middle"), bench.layer("upper")
    (low / "z/x").mkdir(parents=True)
    (low / "z/x/deep").write_text("low")
    (middle / "a").mkdir()
    mark(middle / "a", "redirect", b"/z")
    (upper / "y").mkdir()
    mark(upper / "y", "redirect", b"/a/x")
    assert contents(bench.overlay("middle", "low"), "y/deep") == b"low"


def test_absolute_redirect_leads_out_of_an_opaque_directory(bench: Bench) -> None:
    low, middle, upper = bench.layer("low"), bench.layer("middle"), bench.layer("upper")
    (low / "z").mkdir()
    (low / "z/deep").write_text("low")
    (middle / "new/x").mkdir(parents=True)
    mark(middle / "new", "opaque", b"y")
    mark(middle / "new/x", "redirect", b"/z")
    (upper / "y").mkdir()
    mark(upper / "y", "redirect", b"/new/x")
    assert contents(bench.overlay("middle", "low"), "y/deep") == b"low"


def test_whiteouts_that_are_files(bench: Bench) -> None:
    low, upper = bench.layer("low"), bench.layer("upper")
    (low / "gone").write_text("")
    (low / "kept").write_text("")
    (upper / "gone").write_text("")
    (upper / "empty").write_text("")
    mark(upper / "gone", "whiteout", b"")
    mark(upper, "opaque", b"x")
    overlay = bench.overlay("low")
    assert names(overlay) == ["empty", "kept"]
    with pytest.raises(FileNotFoundError):
        find(overlay, "gone")


def test_metadata_only_copies_take_data_from_below(bench: Bench) -> None:
    (bench.layer("low") / "file").write_text("contents")
    upper = bench.layer("upper") / "file"
    upper.write_text("")
    os.truncate(upper, 8)
    upper.chmod(0o600)
    mark(upper, "metacopy", b"")
    overlay = bench.overlay("low")
    assert contents(overlay, "file") == b"contents"
    node = find(overlay, "file")
    assert overlay.view.stat(node).st_mode == 0o100600
    overlay.open_file(node, write=True)
    overlay.write(node, b"C", 0)
    overlay.release_file(node)
    assert upper.read_bytes() == b"Contents"
    assert os.listxattr(upper) == []


def test_a_completed_copy_keeps_its_capabilities_and_times(bench: Bench) -> None:
    (bench.layer("low") / "file").write_text("contents")
    upper = bench.layer("upper") / "file"
    upper.write_text("")
    os.truncate(upper, 8)
    capability = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)  # cap_net_raw
    os.setxattr(upper, "security.capability", capability)
    os.utime(upper, ns=(1, 2))
    mark(upper, "metacopy", b"")
    overlay = bench.overlay("low")
    overlay.chmod(find(overlay, "file"), 0o755)
    assert upper.read_bytes() == b"contents"
    assert os.getxattr(upper, "security.capability") == capability
    assert upper.stat().st_mtime_ns == 2


def test_contents_from_data_only_lowers(bench: Bench) -> None:
    (bench.layer("data") / "objects").mkdir()
    (bench.layer("data") / "objects/1").write_text("contents")
    (bench.layer("data") / "hidden").write_text("")
    low = bench.layer("low") / "file"
    low.write_text("")
    os.truncate(low, 8)
    mark(low, "metacopy", b"")
    mark(low, "redirect", b"/objects/1")
    layers = [os.fsencode(bench.layer(name)) for name in ("low", "data", "upper", "upper-work")]
    overlay = Overlay(Stack.open(layers[:1], layers[2], layers[3], data=layers[1:2]))
    assert names(overlay) == ["file"]
    assert contents(overlay, "file") == b"contents"
    overlay.close()


def test_metadata_without_data_is_an_error(bench: Bench) -> None:
    bench.layer("low")
    (bench.layer("upper") / "file").write_text("")
    mark(bench.layer("upper") / "file", "metacopy", b"")
    with pytest.raises(OSError) as caught:
        find(bench.overlay("low"), "file")
    assert caught.value.errno == errno.EIO


def test_a_file_stops_merging(bench: Bench) -> None:
    (bench.layer("low") / "x").mkdir()
    (bench.layer("low") / "x/hidden").write_text("")
    (bench.layer("middle") / "x").write_text("")
    (bench.layer("top") / "x").mkdir()
    assert names(bench.overlay("top", "middle", "low"), "x") == []


def test_a_symlink_in_a_layer_is_never_followed(bench: Bench) -> None:
    """A layer that changes underneath must not lead out of it."""
    low = bench.layer("low")
    (low / "directory").mkdir()
    overlay = bench.overlay("low")
    node = find(overlay, "directory")
    (low / "directory").rmdir()
    (low / "directory").symlink_to("/etc")
    with pytest.raises(OSError) as caught:
        overlay.view.lookup(node, b"passwd")
    assert caught.value.errno in {errno.ELOOP, errno.ENOTDIR}


def test_what_is_mounted_in_a_lower_is_not_seen() -> None:
    assert "self" in os.listdir("/proc")
    overlay = Overlay(Stack.open([b"/"]))
    try:
        assert names(overlay, "proc") == []
    finally:
        overlay.close()


def test_names_deeper_than_path_max(bench: Bench) -> None:
    overlay = bench.overlay("low")
    node = overlay.view.root
    component = b"x" * 200
    for _ in range(45):
        node, _ = overlay.create(node, component, new_directory())
        overlay.view.refer(node)
    assert overlay.names(node) == []
    assert len(node.path) > 9000
    overlay.view.stack.layers[0].forget_all()
    assert overlay.names(node) == []
