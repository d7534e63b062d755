"""The core's own promises: identity, numbers, swaps, and what stays in the workdir."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

import pytest

from sessiond.overlay import syscalls
from sessiond.overlay.diff import ChangeKind, changes
from sessiond.overlay.directory import NewObject
from sessiond.overlay.exchange import Exchange
from sessiond.overlay.lookup import Entry
from sessiond.overlay.nodes import Node
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.stack import Stack
from tests.crash.writers import Writers
from tests.unit.overlay.conftest import Bench, contents, find, names, new_directory, new_file

pytestmark = pytest.mark.root


def test_numbers_survive_copy_up_and_reopening(bench: Bench) -> None:
    (bench.layer("low") / "file").write_text("low")
    overlay = bench.overlay("low")
    number = find(overlay, "file").number
    overlay.chmod(find(overlay, "file"), 0o600)
    assert find(overlay, "file").number == number
    bench.close()
    assert find(bench.overlay("low"), "file").number == number


def test_a_file_with_names_in_a_directory_and_in_one_above_is_let_go(bench: Bench) -> None:
    (bench.layer("low") / "a/b").mkdir(parents=True)
    overlay = bench.overlay("low")
    node, _ = overlay.create_file(find(overlay, "a"), b"above", new_file())
    overlay.link(node, find(overlay, "a/b"), b"below")
    overlay.release_file(node)
    assert overlay.view.nodes.all() == [overlay.view.root]


def test_a_held_file_and_its_successor_have_different_numbers(bench: Bench) -> None:
    overlay = bench.overlay("low")
    first, _ = overlay.create_file(overlay.view.root, b"file", new_file())
    overlay.unlink(overlay.view.root, b"file")
    second, _ = overlay.create_file(overlay.view.root, b"file", new_file())
    assert first.number != second.number
    overlay.write(first, b"old", 0)
    assert overlay.read(first, 9, 0) == b"old"
    assert overlay.read(second, 9, 0) == b""


def test_broken_hard_links_of_one_origin_stay_apart(bench: Bench) -> None:
    """Without an index, the kernel copies each name of a lower file up on its own."""
    (bench.layer("low") / "a").write_text("low")
    os.link(bench.layer("low") / "a", bench.layer("low") / "b")
    overlay = bench.overlay("low")
    overlay.chmod(find(overlay, "a"), 0o600)
    bench.close()
    upper = bench.layer("upper")
    origin = os.getxattr(upper / "a", "trusted.overlay.origin")
    (upper / "b").write_text("other")
    os.setxattr(upper / "b", "trusted.overlay.origin", origin)
    overlay = bench.overlay("low")
    assert contents(overlay, "b") == b"other"
    first, second = find(overlay, "a"), find(overlay, "b")
    assert first is not second
    overlay.view.refer(first)
    overlay.view.refer(second)
    assert first.number != second.number


def test_one_lower_file_with_several_names_stays_one_file(bench: Bench) -> None:
    (bench.layer("low") / "a").write_text("low")
    os.link(bench.layer("low") / "a", bench.layer("low") / "b")
    overlay = bench.overlay("low")
    node = find(overlay, "a")
    overlay.view.refer(node)
    assert find(overlay, "b") is node
    overlay.open_file(node, write=True)
    overlay.write(node, b"new", 0)
    overlay.release_file(node)
    assert contents(overlay, "b") == b"new"
    assert overlay.view.link_count(node, overlay.view.stat(node)) == 2
    overlay.unlink(overlay.view.root, b"a")
    assert overlay.view.link_count(node, overlay.view.stat(node)) == 1
    overlay.unlink(overlay.view.root, b"b")
    assert overlay.view.link_count(node, overlay.view.stat(node)) == 0
    assert os.listdir(bench.layer("upper-work") / "index") == []


def test_a_snapshot_keeps_the_hard_links_of_lowers_together(bench: Bench) -> None:
    """Also under names under which they were not copied up."""
    link_names(bench, "a", "b", "c")
    overlay = bench.overlay("low", upper="first")
    write(overlay, "a", b"one")
    overlay.unlink(overlay.view.root, b"c")
    bench.close()
    overlay = bench.overlay("first", "low", upper="second")
    assert contents(overlay, "b") == b"one"
    node = find(overlay, "b")
    assert overlay.view.link_count(node, overlay.view.stat(node)) == 2
    assert find(overlay, "a").number == node.number
    write(overlay, "b", b"two")
    assert contents(overlay, "a") == b"two"
    bench.close()
    overlay = bench.overlay("second", "first", "low", upper="third")
    for name in ("a", "b"):
        assert contents(overlay, name) == b"two"
        node = find(overlay, name)
        assert overlay.view.link_count(node, overlay.view.stat(node)) == 2
    bench.close()
    assert contents(bench.overlay("first", "low", upper="fourth"), "b") == b"one"


def link_names(bench: Bench, *names: str) -> None:
    """Have a file of the lower with these names."""
    first = bench.layer("low") / names[0]
    first.write_text("low")
    for name in names[1:]:
        os.link(first, bench.layer("low") / name)


def write(overlay: Overlay, name: str, data: bytes) -> None:
    node = find(overlay, name)
    overlay.open_file(node, write=True)
    overlay.write(node, data, 0)
    overlay.release_file(node)


def count_links(overlay: Overlay, name: str) -> int:
    node = find(overlay, name)
    return overlay.view.link_count(node, overlay.view.stat(node))


@pytest.mark.parametrize("known", [["b"], ["b", "c"]])
@pytest.mark.parametrize("change", ["write", "chmod", "link", "rename", "unlink", "replace"])
def test_a_snapshot_of_a_hard_link_that_only_the_index_has(
    bench: Bench, known: list[str], change: str
) -> None:
    """The name that it was changed under has gone, the others are the image's still."""
    link_names(bench, "a", "b", "c")
    overlay = bench.overlay("low", upper="first")
    write(overlay, "a", b"one")
    overlay.unlink(overlay.view.root, b"a")
    bench.close()
    assert os.listdir(bench.layer("first-work") / "index") != []

    overlay = bench.overlay("first", "low", upper="second")
    root = overlay.view.root
    for name in known:
        overlay.view.refer(find(overlay, name))
        assert contents(overlay, name) == b"one"
        assert count_links(overlay, name) == 2
    left = {"b", "c"}
    if change == "write":
        write(overlay, "b", b"two")
    elif change == "chmod":
        overlay.chmod(find(overlay, "b"), 0o600)
    elif change == "link":
        overlay.link(find(overlay, "b"), root, b"d")
        left = {"b", "c", "d"}
    elif change == "rename":
        overlay.rename((root, b"b"), (root, b"d"))
        left = {"c", "d"}
    elif change == "unlink":
        overlay.unlink(root, b"b")
        left = {"c"}
    else:
        overlay.create(root, b"new", new_file())
        overlay.rename((root, b"new"), (root, b"b"))
        left = {"c"}
    expected = contents(overlay, "c")
    assert expected == (b"two" if change == "write" else b"one")
    for _ in range(2):  # also of the same layers, opened anew
        for name in left:
            assert contents(overlay, name) == expected
            assert count_links(overlay, name) == len(left)
            assert find(overlay, name).number == find(overlay, "c").number
        bench.close()
        overlay = bench.overlay("first", "low", upper="second")
    for name in left:
        overlay.unlink(overlay.view.root, os.fsencode(name))
    assert os.listdir(bench.layer("second-work") / "index") == []


def test_nothing_is_kept_of_what_nobody_holds(bench: Bench) -> None:
    (bench.layer("low") / "a/b/c").mkdir(parents=True)
    overlay = bench.overlay("low")
    node = find(overlay, "a/b/c")
    overlay.view.refer(node)
    assert len(overlay.view.nodes.all()) == 4
    overlay.view.forget(node.number, 1)
    assert overlay.view.nodes.all() == [overlay.view.root]


def test_names_that_are_too_long(bench: Bench) -> None:
    overlay = bench.overlay("low")
    with pytest.raises(OSError) as caught:
        overlay.view.lookup(overlay.view.root, b"x" * 256)
    assert caught.value.errno == errno.ENAMETOOLONG


@pytest.mark.parametrize("call", ["create_file", "copy_data", "setxattr", "rename"])
def test_a_failed_copy_up_leaves_nothing_behind(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    (bench.layer("low") / "file").write_text("low")
    overlay = bench.overlay("low")
    descriptors = os.listdir("/proc/self/fd")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(syscalls, call, full)
    with pytest.raises(OSError) as caught:
        overlay.chmod(find(overlay, "file"), 0o600)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(bench.layer("upper-work") / "work") == []
    assert os.listdir(bench.layer("upper")) == []
    assert os.listdir("/proc/self/fd") == descriptors
    overlay.chmod(find(overlay, "file"), 0o600)
    assert stat.S_IMODE((bench.layer("upper") / "file").stat().st_mode) == 0o600


def test_data_is_on_disk_before_a_copy_is_published(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where there is none, nobody waits for the disk."""
    for name in ("written", "emptied"):
        (bench.layer("low") / name).write_text("low")
    overlay = bench.overlay("low")
    written, emptied = find(overlay, "written"), find(overlay, "emptied")
    calls = []

    def recorded(name: str) -> Callable[..., object]:
        call = getattr(syscalls, name)

        def record(*args: object) -> object:
            calls.append(name)
            return call(*args)

        return record

    for name in ("fsync", "rename"):
        monkeypatch.setattr(syscalls, name, recorded(name))
    overlay.chmod(written, 0o600)
    assert calls == ["fsync", "rename"]
    calls.clear()
    overlay.open_file(emptied, write=True, truncate=True)
    overlay.release_file(emptied)
    assert calls == ["rename"]


def test_a_failed_removal_changes_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    (bench.layer("low") / "file").write_text("low")
    (bench.layer("low") / "open").write_text("low")
    overlay = bench.overlay("low")
    file, opened = find(overlay, "file"), find(overlay, "open")
    overlay.open_file(opened, write=False)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(syscalls, "link", full)
    monkeypatch.setattr(syscalls, "mknod", full)
    for name in (b"file", b"open"):
        with pytest.raises(OSError):
            overlay.unlink(overlay.view.root, name)
    monkeypatch.undo()
    for node in (file, opened):
        overlay.view.refer(node)
        overlay.chmod(node, 0o600)
        assert stat.S_IMODE(overlay.view.stat(node).st_mode) == 0o600
        assert overlay.view.link_count(node, overlay.view.stat(node)) == 1
    overlay.release_file(opened)


def test_leftovers_of_a_crash_are_removed_at_opening(bench: Bench) -> None:
    deep = bench.layer("upper-work") / "work"
    deep.mkdir()
    (deep / "#1/a/b").mkdir(parents=True)
    (deep / "#2").write_text("half a copy")
    bench.overlay("low")
    assert os.listdir(deep) == []


def test_the_upper_of_a_crashed_volatile_mount_is_refused(bench: Bench) -> None:
    (bench.layer("upper-work") / "work/incompat/volatile").mkdir(parents=True)
    with pytest.raises(OSError, match="volatile") as caught:
        bench.stack("low")
    assert caught.value.errno == errno.EUCLEAN


def test_an_upper_is_used_once(bench: Bench) -> None:
    bench.overlay("low")
    with pytest.raises(OSError, match="in use"):
        bench.stack("low")


def test_upper_and_workdir_are_apart(bench: Bench) -> None:
    upper = os.fsencode(bench.layer("upper"))
    inside = os.path.join(upper, b"work")
    os.mkdir(inside)
    with pytest.raises(OSError, match="separate"):
        Stack.open([os.fsencode(bench.layer("low"))], upper, inside)


def test_a_view_without_upper_is_read_only(bench: Bench) -> None:
    (bench.layer("low") / "file").write_text("low")
    overlay = Overlay(Stack.open([os.fsencode(bench.layer("low"))]))
    for change in (
        lambda: overlay.chmod(find(overlay, "file"), 0),
        lambda: overlay.unlink(overlay.view.root, b"file"),
        lambda: overlay.create(overlay.view.root, b"new", new_directory()),
    ):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EROFS
    overlay.close()


def test_a_directory_becomes_empty_before_it_is_replaced(bench: Bench) -> None:
    (bench.layer("low") / "target").mkdir()
    (bench.layer("low") / "target/file").write_text("")
    overlay = bench.overlay("low")
    overlay.unlink(find(overlay, "target"), b"file")
    overlay.create(overlay.view.root, b"source", new_directory())
    overlay.create_file(find(overlay, "source"), b"inside", new_file())
    overlay.rename((overlay.view.root, b"source"), (overlay.view.root, b"target"))
    assert names(overlay) == ["target"]
    assert names(overlay, "target") == ["inside"]
    bench.close()
    assert names(bench.overlay("low"), "target") == ["inside"]


def test_a_directory_moved_out_of_one_that_a_snapshot_has_renamed(bench: Bench) -> None:
    (bench.layer("low") / "a/b").mkdir(parents=True)
    (bench.layer("low") / "a/b/file").write_text("low")
    overlay = bench.overlay("low", upper="first")
    overlay.rename((overlay.view.root, b"a"), (overlay.view.root, b"c"))
    bench.close()
    overlay = bench.overlay("first", "low")
    overlay.rename((find(overlay, "c"), b"b"), (overlay.view.root, b"d"))
    assert contents(overlay, "d/file") == b"low"
    bench.close()
    assert contents(bench.overlay("first", "low"), "d/file") == b"low"


def test_what_is_noted_before_a_rename_holds_without_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back to where it was a bare name would do, but not before it is there."""
    (bench.layer("low") / "a/b").mkdir(parents=True)
    (bench.layer("low") / "a/b/file").write_text("low")
    overlay = bench.overlay("low")
    overlay.rename((find(overlay, "a"), b"b"), (overlay.view.root, b"c"))

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(syscalls, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        overlay.rename((overlay.view.root, b"c"), (find(overlay, "a"), b"d"))
    monkeypatch.undo()
    bench.close()
    assert contents(bench.overlay("low"), "c/file") == b"low"


def test_who_comes_too_late_twice_is_served_all_the_same(bench: Bench) -> None:
    """The kernel looks a name up again once if what it found has been replaced, not twice."""
    overlay = bench.overlay("low")
    view, root = overlay.view, overlay.view.root

    def put(text: bytes) -> None:
        new, _ = overlay.create_file(root, b"new", new_file())
        overlay.write(new, text, 0)
        overlay.release_file(new)
        overlay.rename((root, b"new"), (root, b"file"))

    put(b"first")
    first = find(overlay, "file")
    view.refer(first)
    put(b"second")
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        overlay.open_file(first, write=False)
    put(b"third")
    third = find(overlay, "file")
    view.refer(third)
    put(b"fourth")
    overlay.open_file(third, write=False)
    assert overlay.read(third, 9, 0) == b"third"
    overlay.release_file(third)
    assert contents(overlay, "file") == b"fourth"

    # It is no rule for ever: an anchor takes space until the kernel forgets the file.
    fourth = find(overlay, "file")
    view.refer(fourth)
    overlay.unlink(root, b"file")
    assert fourth.anchor < 0


def test_swap_finds_nodes_again_and_lets_the_rest_go(bench: Bench) -> None:
    (bench.layer("low") / "kept").write_text("low")
    (bench.layer("low") / "directory").mkdir()
    overlay = bench.overlay("low")
    kept, directory = find(overlay, "kept"), find(overlay, "directory")
    added, _ = overlay.create_file(directory, b"added", new_file())
    for node in (kept, directory, added):
        overlay.view.refer(node)
    outdated = Exchange(overlay).swap(bench.stack("low", upper="second"))
    root = overlay.view.root.number
    assert set(outdated.directories) == {root, directory.number}
    assert set(outdated.names) == {
        (root, b"kept"),
        (root, b"directory"),
        (directory.number, b"added"),
    }
    assert overlay.view.node(kept.number) is kept
    assert overlay.view.node(directory.number) is directory
    assert overlay.names(directory) == []
    overlay.write(added, b"still", 0)
    assert overlay.read(overlay.view.node(added.number), 9, 0) == b"still"
    assert overlay.view.link_count(added, overlay.view.stat(added)) == 0
    overlay.release_file(added)
    overlay.view.forget(added.number, 1)
    with pytest.raises(OSError) as caught:
        overlay.view.node(added.number)
    assert caught.value.errno == errno.ESTALE


def test_what_is_below_a_directory_that_a_swap_takes_away_is_not_told(bench: Bench) -> None:
    (bench.layer("low") / "kept").mkdir()
    overlay = bench.overlay("low")
    root = overlay.view.root.number
    directories = {}
    for path in ("made", "made/below", "opaque", "kept/made"):
        parent = overlay.view.find_parent(os.fsencode(path))
        name = os.fsencode(path.rpartition("/")[2])
        directories[path], _ = overlay.create(parent, name, new_directory())
        overlay.view.refer(directories[path])
        overlay.create(directories[path], b"file", new_file())
        overlay.view.refer(find(overlay, f"{path}/file"))
    kept = find(overlay, "kept").number
    stack = bench.stack("low", upper="second")
    (bench.layer("second") / "opaque").mkdir()
    outdated = Exchange(overlay).swap(stack)
    numbers = {path: node.number for path, node in directories.items()}
    assert set(outdated.vanished) == {
        (root, b"made", numbers["made"]),
        (kept, b"made", numbers["kept/made"]),
    }
    assert outdated.below == {numbers["made"], numbers["made/below"], numbers["kept/made"]}
    assert set(outdated.names) == {
        (root, b"kept"),
        (root, b"made"),
        (root, b"opaque"),
        (kept, b"made"),
        (numbers["opaque"], b"file"),
    }


def test_a_reset_to_an_image_that_is_damaged(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the way out: only who uses what cannot be read gets an error."""
    programs = Writers(recorded=True)
    overlay = Overlay(bench.stack("low"), programs)
    view, root = overlay.view, overlay.view.root
    (bench.layer("upper") / "file").write_bytes(b"upper")
    programs.open(overlay, "file")
    made, _ = overlay.create(root, b"made", new_directory())
    for node in (made, find(overlay, "file")):
        view.refer(node)

    def damaged(parent: Node, name: bytes) -> Entry:
        raise OSError(errno.EIO, os.strerror(errno.EIO), name)

    exchange = Exchange(overlay)
    held = exchange.upper_names()
    with monkeypatch.context() as patch:
        patch.setattr(view, "find", damaged)
        outdated = exchange.swap(bench.stack("low", upper="second"))
        assert exchange.lost_names(held, outdated) == [(root.number, b"file")]
        assert outdated.vanished == [(root.number, b"made", made.number)]
        with pytest.raises(OSError, match="Input/output error"):
            find(overlay, "file")
    assert overlay.names(root) == []
    overlay.close()


def test_a_snapshot_has_nothing_to_tell(bench: Bench) -> None:
    (bench.layer("low") / "kept").write_text("low")
    overlay = bench.overlay("low")
    overlay.view.refer(find(overlay, "kept"))
    outdated = Exchange(overlay).swap(bench.stack("upper", "low", upper="second"))
    assert outdated == ([], [], [], set(), ())


@pytest.mark.parametrize("change", ["look up", "link", "create", "rename"])
def test_a_name_is_of_one_node_also_after_a_swap(bench: Bench, change: str) -> None:
    """One that was another's before, who may still be held, and be asked for later."""
    (bench.layer("low") / "file").write_text("low")
    overlay = bench.overlay("low", upper="first")
    view, root = overlay.view, overlay.view.root
    former, _ = overlay.create(root, b"name", new_file())
    file = find(overlay, "file")
    for node in (former, file):
        view.refer(node)
    if change == "look up":
        os.link(bench.layer("low") / "file", bench.layer("low") / "name")
    Exchange(overlay).swap(bench.stack("low", upper="second"))
    match change:
        case "look up":
            assert find(overlay, "name") is file
        case "link":
            overlay.link(view.node(file.number), root, b"name")
        case "create":
            overlay.create(root, b"name", new_file())
        case "rename":
            overlay.rename((root, b"file"), (root, b"name"))
    nodes = view.nodes.all()
    links = {(*link, node) for node in nodes for link in node.links}
    assert links == {(node, *child) for node in nodes for child in node.children.items()}
    assert not view.node(former.number).linked
    assert find(overlay, "name") is not former


def test_own_xattrs_are_hidden_and_others_like_them_escaped(bench: Bench) -> None:
    overlay = bench.overlay("low")
    node, _ = overlay.create(overlay.view.root, b"d", new_directory())
    overlay.setxattr(node, b"trusted.overlay.opaque", b"y")
    assert overlay.listxattr(node) == [b"trusted.overlay.opaque"]
    assert overlay.getxattr(node, b"trusted.overlay.opaque") == b"y"
    stored = os.listxattr(bench.layer("upper") / "d")
    assert stored == ["trusted.overlay.overlay.opaque"]
    overlay.removexattr(node, b"trusted.overlay.opaque")
    assert overlay.listxattr(node) == []


def test_differences_follow_changes_and_not_copies(bench: Bench) -> None:
    low = bench.layer("low")
    for name in ("same", "contents", "metadata", "type", "deleted"):
        (low / name).write_text("low")
    (low / "directory").mkdir()
    (low / "directory/inside").write_text("low")
    overlay = bench.overlay("low")
    for name in ("same", "contents"):
        node = find(overlay, name)
        overlay.open_file(node, write=True)
        overlay.write(node, b"low" if name == "same" else b"new", 0)
        overlay.utime(node, 1, (low / name).stat().st_mtime_ns)
        overlay.release_file(node)
    overlay.chmod(find(overlay, "metadata"), 0o600)
    overlay.unlink(overlay.view.root, b"type")
    overlay.create(overlay.view.root, b"type", new_directory())
    overlay.unlink(overlay.view.root, b"deleted")
    overlay.unlink(find(overlay, "directory"), b"inside")
    overlay.rmdir(overlay.view.root, b"directory")
    overlay.create(overlay.view.root, b"directory", new_directory())
    copy = overlay.view.stack.copy()
    base = copy.bottom()
    try:
        found = {(change.path, change.kind) for change in changes(copy, base)}
    finally:
        copy.close()
        base.close()
    assert found == {
        (b"contents", ChangeKind.CONTENTS),
        (b"metadata", ChangeKind.METADATA),
        (b"type", ChangeKind.TYPE),
        (b"deleted", ChangeKind.DELETED),
        (b"directory/inside", ChangeKind.DELETED),
    }


def test_trees_deeper_than_the_python_stack(bench: Bench) -> None:
    depth = 1200
    directory = os.open(bench.layer("low"), os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=directory)
        below = os.open("d", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(directory)
    overlay = bench.overlay("low")
    node = overlay.view.root
    for _ in range(depth):
        node, _ = overlay.view.lookup(node, b"d")
        overlay.view.refer(node)
    Exchange(overlay).swap(bench.stack("low", upper="second"))
    assert overlay.view.node(node.number) is node
    overlay.create(node, b"new", new_directory())
    assert overlay.names(node) == [b"new"]


def test_a_reader_follows_a_copy_up_without_write_access(bench: Bench) -> None:
    """A file of the upper that nobody may write, not even root, can be read."""
    overlay = bench.overlay("low")
    overlay.create_file(overlay.view.root, b"file", new_file())
    path = bench.layer("upper") / "file"
    path.write_text("fixed")
    node = find(overlay, "file")
    overlay.release_file(node)
    try:
        os.system(f"chattr +i {path}")
        assert contents(overlay, "file") == b"fixed"
    finally:
        os.system(f"chattr -i {path}")


def test_a_copy_up_in_a_thread_outlives_the_descriptors_of_its_layer(bench: Bench) -> None:
    """While data is copied, other requests may have the directory of the source closed."""
    directory = bench.layer("low") / "directory"
    directory.mkdir()
    (directory / "file").write_text("low")
    os.setxattr(directory / "file", "user.note", b"kept")
    overlay = bench.overlay("low")
    node = find(overlay, "directory/file")
    with overlay.begin_copy_up(node) as copy:
        copy.copy_data()
        overlay.view.stack.lowers[0].forget_all()
        copy.publish()
    assert overlay.getxattr(node, b"user.note") == b"kept"
    assert (bench.layer("upper") / "directory/file").read_text() == "low"


@pytest.mark.parametrize("kind", [new_file(), new_directory()], ids=["file", "directory"])
def test_a_name_leads_to_the_directory_that_has_it_now(bench: Bench, kind: NewObject) -> None:
    """After an exchange, and when the one that came in its place has gone again."""
    overlay = bench.overlay("low")
    directory, _ = overlay.create(overlay.view.root, b"directory", new_directory())
    overlay.create(directory, b"inside", new_directory())
    other, _ = overlay.create(overlay.view.root, b"other", kind)
    for node in (directory, other):
        overlay.view.refer(node)
    assert names(overlay, "directory/inside") == []
    ends = (overlay.view.root, b"other"), (overlay.view.root, b"directory")
    overlay.rename(*ends, syscalls.RENAME_EXCHANGE)
    remove = overlay.rmdir if other.is_directory else overlay.unlink
    remove(overlay.view.root, b"directory")
    overlay.create(overlay.view.root, b"directory", new_directory())
    assert names(overlay, "directory") == []
    assert names(overlay, "other") == ["inside"]
    assert names(overlay, "other/inside") == []


@pytest.mark.parametrize("uid", [0, 1000])
def test_a_new_object_is_owned_and_inherits_as_its_directory_says(bench: Bench, uid: int) -> None:
    """Whether it is made where it belongs or in the workdir."""
    for name in ("plain", "shared"):
        (bench.layer("low") / name).mkdir()
        (bench.layer("low") / name / "removed").write_text("")
    overlay = bench.overlay("low")
    plain, shared = find(overlay, "plain"), find(overlay, "shared")
    for directory in (plain, shared):
        overlay.view.refer(directory)
        overlay.unlink(directory, b"removed")
    overlay.chown(shared, 0, 50)
    overlay.chmod(shared, 0o2775)
    new = NewObject(0o104666, uid, uid, umask=0o022)
    for directory, gid in ((plain, uid), (shared, 50)):
        for name in (b"new", b"removed"):
            _, made = overlay.create(directory, name, new)
            assert (made.st_mode, made.st_uid, made.st_gid) == (0o104644, uid, gid)
    _, made = overlay.create(shared, b"directory", NewObject(0o040755, uid, uid))
    assert (made.st_mode, made.st_gid) == (0o042755, 50)


@pytest.mark.parametrize("unit", [1 << 12, 1 << 16], ids=["small", "large"])
@pytest.mark.parametrize("pattern", ["d", "-", "d-", "-d", "d-d-", "-d-d"])
def test_holes_stay_holes(bench: Bench, pattern: str, unit: int) -> None:
    """`pattern`: where there is data and where is none, in units of that many bytes."""
    source = bench.layer("low") / "file"
    with source.open("wb") as file:
        for position, kind in enumerate(pattern):
            if kind == "d":
                file.seek(position * unit)
                file.write(bytes([position + 1]) * unit)
        file.truncate(len(pattern) * unit)
    overlay = bench.overlay("low")
    overlay.chmod(find(overlay, "file"), 0o600)
    copy = bench.layer("upper") / "file"
    assert copy.read_bytes() == source.read_bytes()
    assert copy.stat().st_blocks <= source.stat().st_blocks
