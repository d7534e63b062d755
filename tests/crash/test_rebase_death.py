"""Whoever rebases, or replaces an image, dies at any change: the next one ends it, or undoes it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import trio

from sessiond.overlay.rebase import Conflicts, Target, rebase, tidy
from sessiond.session import maintenance
from sessiond.session.images import digest_of
from sessiond.session.maintenance import MaintenanceRecord
from sessiond.session.model import SessionId, SessionState, Uid
from sessiond.session.mounts import SystemMounts
from sessiond.session.rebase import old_image
from tests.support import fault_points, trees
from tests.support.checker import findings
from tests.support.kernel_overlay import KernelOverlay
from tests.support.mounts import Layers
from tests.support.rebasing import NEW, NEWER, OLD, Machine
from tests.support.trees import Tree


def unchecked() -> None:
    """Nobody stops it."""


@pytest.fixture
def top(scratch: str) -> Iterator[Path]:
    top = Path(scratch, "rebase")
    top.mkdir()
    yield top
    shutil.rmtree(top)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """One with a disk."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    yield Machine(tmp_path)
    mounts = SystemMounts()
    for target in mounts.mounted_below(tmp_path):
        mounts.detach(target)


OLD_IMAGE: Tree = {
    "both": b"image",
    "gone": b"image",
    "hidden": b"image",
    "link": {"a": b"image", "b": trees.Link("link/a"), "c": trees.Link("link/a")},
    "moved": {"x": b"image"},
    "lost": {"x": b"image"},
    "replaced": {"x": b"image"},
    "etc": trees.Dir(entries={"opened": b"image"}),
}
NEW_IMAGE: Tree = {
    "both": NEWER,
    "hidden": NEWER,
    "link": {"b": b"image", "a": trees.Link("link/b"), "c": trees.Link("link/b")},
    "moved": {"x": NEWER, "y": NEWER},
    "replaced": {"x": NEWER},
    "etc": trees.Dir(entries={"opened": NEWER}, mode=0o750, uid=7, xattrs={"user.a": b"1"}),
}


def write(merged: Path) -> None:
    """What a session may have done."""
    (merged / "both").write_bytes(b"mine")
    (merged / "gone").unlink()
    (merged / "hidden").unlink()
    (merged / "link/a").write_bytes(b"mine")
    os.link(merged / "link/a", merged / "own")
    (merged / "moved").rename(merged / "here")
    (merged / "here/own").write_bytes(b"mine")
    (merged / "lost").rename(merged / "left")
    (merged / "left/own").write_bytes(b"mine")
    (merged / "replaced/x").unlink()
    (merged / "replaced").rmdir()
    (merged / "replaced").mkdir()
    os.close(os.open(merged / "etc/opened", os.O_WRONLY))
    (merged / "etc/own").write_bytes(b"mine")


@pytest.mark.parametrize("conflicts", Conflicts)
def test_a_layer(top: Path, conflicts: Conflicts) -> None:
    for name, tree in (("old", OLD_IMAGE), ("new", NEW_IMAGE)):
        (top / name).mkdir()
        trees.build(tree, str(top / name))
    for name in ("layer", "layer/upper", "layer/work", "merged"):
        (top / name).mkdir()
    layers = Layers((str(top / "old"),), str(top / "layer/upper"), str(top / "layer/work"))
    with KernelOverlay().mounted(layers, str(top / "merged")):
        write(top / "merged")

    def do(_: object, target: Target) -> None:
        list(rebase(target, conflicts, apply=True, check=unchecked))
        tidy(target, check=unchecked)

    wanted = None
    for point in count(-1):
        copy = top / "copy"
        subprocess.run(["cp", "-a", top / "layer", copy], check=True)
        upper, work = copy / "upper", copy / "work"
        old, new = (os.fsencode(top / name) for name in ("old", "new"))
        target = Target(os.fsencode(upper), os.fsencode(work), [new], old, 0)
        died = False
        if point >= 0:
            died = fault_points.run(partial(do, target=target), lambda: None, die_at=point).died
        do(None, target)
        # Whether a directory looks untouched is not made sure of.
        found = trees.snapshot(str(upper), recent_ns=0)
        wanted = wanted or found
        trees.assert_same(wanted, found, f"killed before change {point}")
        assert findings(upper, work, [top / "new"]) == []
        subprocess.run(["rm", "-r", copy], check=True)
        if point >= 0 and not died:
            assert point > 10
            break


async def _rebase_at_start(machine: Machine, die: Callable[[], None] | None = None) -> bytes:
    async with machine.manager() as manager:
        if die is not None:
            die()
        session = manager.get("s")
        assert session.state is SessionState.ACTIVE, session.failure
        machine.assert_in_order(session)
        assert os.listdir(machine.layer(1) / "fs/etc") == ["a.sessiond-old"]
        assert (machine.layer(2) / "fs/etc/b").read_text() == "mine"
        assert [one.name for one in session.record.snapshots] == ["one"]
        return (machine.directory / "state/sessions/s/shadowed.jsonl").read_bytes()


def start(machine: Machine) -> None:
    """Be a manager, up to its death just after the start."""
    trio.run(_rebase_at_start, machine, partial(os._exit, 0))


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.soak)])
def test_a_session(machine: Machine, stride: int) -> None:
    top = machine.directory
    machine.pack(OLD)

    async def prepare() -> None:
        async with machine.manager(image_changed="rebase", rebase_conflicts="save") as manager:
            await machine.make_session(manager)

    trio.run(prepare)
    machine.pack(NEW, keep_old=True)
    state = top / "state"
    subprocess.run(["cp", "-a", state, top / "before"], check=True)
    listed = trio.run(_rebase_at_start, machine)
    for point in range(0, 10_000, stride):
        subprocess.run(["rm", "-r", state], check=True)
        subprocess.run(["cp", "-a", top / "before", state], check=True)
        lived = fault_points.run(start, lambda: machine, die_at=point)
        assert trio.run(_rebase_at_start, machine) == listed, f"{point}: {lived.calls[-1]}"
        if not lived.died:
            assert point > 50
            return
    raise AssertionError("it never came to an end")


def fake_image(path: Path, number: int) -> None:
    path.write_bytes(b"hsqs" + bytes(36) + (4096).to_bytes(8, "little") + bytes(4040 + number))


def test_an_image_is_replaced(top: Path) -> None:
    image, new = top / "image", top / ".image.sessiond-new-1"
    for point in count():
        for number, path in enumerate((image, old_image(image), new), 10):
            path.unlink(missing_ok=True)
            fake_image(path, number)
        before, after = digest_of(image), digest_of(new)
        assert before is not None
        record = MaintenanceRecord(
            profile="p",
            message="",
            session=SessionId("maintenance"),
            image=image,
            digest=before,
            boot="1",
            started_by=Uid(0),
            started_at=datetime.now(UTC),
            new=new.name,
        )
        replace = partial(maintenance._replace, image)
        lived = fault_points.run(replace, lambda: new, die_at=point)
        installed = maintenance._is_installed(record)
        assert digest_of(image) == (after if installed else before)
        assert (digest_of(old_image(image)) == before) is installed
        assert not new.exists()
        if not lived.died:
            assert installed
            assert point > 2
            break
