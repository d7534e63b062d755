"""Changes to what outlives resets, by a process that dies in them: all is as before or as after."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path

import pytest

from sessiond.keep_rules import KeepRules, rule_for
from sessiond.overlay.commit import Commit
from sessiond.overlay.directory import NewObject
from sessiond.overlay.exchange import Exchange
from sessiond.overlay.keep import Keep
from sessiond.overlay.layer import Layer
from sessiond.overlay.overlay import Overlay
from sessiond.overlay.retain import Retain
from sessiond.overlay.stack import Stack
from sessiond.overlay.syscalls import RENAME_EXCHANGE
from tests.crash.operations import place
from tests.support import fault_points
from tests.support.core_views import contents, find

RULES = ("/home/*/docs", "/home/*/.rc", "/home/*/.new")
View = dict[str, bytes | None]
"""Contents by path, of directories None."""


def make(scratch: str) -> Path:
    """Make an image, and empty layers."""
    top = Path(tempfile.mkdtemp(dir=scratch))
    home = top / "image/home/u"
    (home / "docs/sub").mkdir(parents=True)
    for name in (".rc", "other", "docs/letter"):
        (home / name).write_text(f"of the image: {name}")
    for name in ("upper", "work", "kept", "kept-work"):
        (top / name).mkdir()
    return top


def serve(top: Path, *rules: str) -> Overlay:
    upper, work, kept, kept_work = (
        os.fsencode(top / name) for name in ("upper", "work", "kept", "kept-work")
    )
    session = Stack.open([os.fsencode(top / "image")], upper, work)
    kept_stack = Stack.open_over(session.lowers[-1], kept, kept_work, session.options)
    overlay = Overlay(session, keep=Keep(kept_stack, session, KeepRules(rules)))
    Exchange(overlay).find_ways()
    return overlay


@contextmanager
def served(top: Path, *rules: str) -> Iterator[Overlay]:
    overlay = serve(top, *rules)
    try:
        yield overlay
    finally:
        overlay.close()


def view(top: Path, *rules: str) -> View:
    with served(top, *rules) as overlay:
        found: View = {}
        pending = [""]
        while pending:
            path = pending.pop()
            node = find(overlay, path)
            found[path] = None if node.is_directory else contents(overlay, node)
            if node.is_directory:
                pending += [f"{path}/{os.fsdecode(name)}" for name in overlay.names(node)]
        return found


def write(overlay: Overlay, path: str, text: bytes) -> None:
    node, _ = overlay.create_file(*place(overlay, path), NewObject(0o100644, 0, 0))
    overlay.write(node, text, 0)
    overlay.release_file(node)


def prepare(overlay: Overlay) -> None:
    write(overlay, "home/u/written", b"written")
    overlay.create(*place(overlay, "home/new"), NewObject(0o040755, 0, 0))


def rename(old: str, new: str, flags: int = 0) -> Callable[[Overlay], object]:
    return lambda overlay: overlay.rename(place(overlay, old), place(overlay, new), flags)


OPERATIONS: dict[str, Callable[[Overlay], object]] = {
    "first of a user": lambda overlay: write(overlay, "home/new/.rc", b""),
    "unlink": lambda overlay: overlay.unlink(*place(overlay, "home/u/.rc")),
    "copy-up": lambda overlay: overlay.chmod(find(overlay, "home/u/docs/letter"), 0o600),
    "within": rename("home/u/docs/letter", "home/u/docs/sub/letter"),
    "root": rename("home/u/.rc", "home/u/.new"),
    "exchange": rename("home/u/.rc", "home/u/docs/letter", RENAME_EXCHANGE),
    "written over": rename("home/u/written", "home/u/.rc"),
    "image over": rename("home/u/other", "home/u/.rc"),
    "in": rename("home/u/written", "home/u/docs/letter"),
    "into a new home": rename("home/u/other", "home/new/.rc"),
    "out": rename("home/u/docs/letter", "home/u/letter"),
    "out over": rename("home/u/.rc", "home/u/other"),
}
ACROSS = {"written over", "image over", "in", "into a new home", "out", "out over"}


IN_TEST = {"first of a user", "written over", "out over"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in IN_TEST else pytest.mark.soak) for n in OPERATIONS],
)
def test_operations(scratch: str, name: str) -> None:
    operation = OPERATIONS[name]
    for point in count():
        top = make(scratch)
        with served(top, *RULES) as overlay:
            prepare(overlay)
        before = view(top, *RULES)
        lived = fault_points.run(operation, lambda top=top: serve(top, *RULES), die_at=point)  # type: ignore[misc]
        found = view(top, *RULES)
        with served(top, *RULES) as overlay:
            # Over the border, both names may be left: done again, it is finished.
            if found == before or (name in ACROSS and before.keys() <= found.keys()):
                operation(overlay)
        after = view(top, *RULES)
        if point == 0:
            wanted = after
        assert after == wanted, f"killed before change {point}, {lived.calls[-1]}"
        for work in ("work", "kept-work"):
            assert os.listdir(top / work / "work") == []
        if not lived.died:
            break


def test_a_way_where_something_was_kept(scratch: str) -> None:
    """What no rule names any more is there still, by one name or the other."""

    def make_way(overlay: Overlay) -> None:
        Exchange(overlay).make_way(b"home/u/written/in")

    for point in count():
        top = make(scratch)
        kept = top / "kept/home/u"
        with served(top, "/home/u/written") as overlay:
            prepare(overlay)
        with served(top) as overlay:
            overlay.create(*place(overlay, "home/u/written"), NewObject(0o040755, 0, 0))
        before = view(top)
        lived = fault_points.run(make_way, lambda top=top: serve(top), die_at=point)  # type: ignore[misc]
        what = f"killed before change {point}, {lived.calls[-1]}"
        assert view(top) == before, what
        with served(top) as overlay:
            make_way(overlay)
        assert (kept / "written").is_dir(), what
        assert (kept / "written.sessiond-old-1").read_bytes() == b"written", what
        assert sorted(os.listdir(kept)) == ["written", "written.sessiond-old-1"], what
        if not lived.died:
            break


def test_what_one_reset_retains(scratch: str) -> None:
    """Until it is served, the upper that comes next has no effect on the present one."""
    path = b"home/u"

    def retain(overlay: Overlay, upper: Path) -> None:
        target = Layer.open(os.fsencode(upper), writable=True)
        Retain(overlay.view.stack.copy(), target, KeepRules(), [path], lambda: False).run()

    for point in count():
        top = make(scratch)
        for name in ("next", "next-work"):
            (top / name).mkdir()
        with served(top) as overlay:
            prepare(overlay)
            overlay.unlink(*place(overlay, "home/u/other"))
            overlay.rename(place(overlay, "home/u/docs/sub"), place(overlay, "home/u/sub"))
        before = view(top)
        lived = fault_points.run(
            lambda overlay, top=top: retain(overlay, top / "next"),  # type: ignore[misc]
            lambda top=top: serve(top),  # type: ignore[misc]
            die_at=point,
        )
        assert view(top) == before, f"killed before change {point}, {lived.calls[-1]}"
        if not lived.died:
            break
    for now, next_one in (("upper", "next"), ("work", "next-work")):
        (top / now).rename(top / f"former-{now}")
        (top / next_one).rename(top / now)
    assert view(top) == {name: data for name, data in before.items() if name != "/home/new"}


def test_commit(scratch: str) -> None:
    """The rules do not name the path yet, so nothing is seen; the next one finishes it."""
    path = b"home/u"

    def meanwhile(overlay: Overlay) -> None:
        with suppress(FileExistsError):
            write(overlay, "home/u/docs/meanwhile", b"")

    def commit(overlay: Overlay) -> None:
        assert overlay.view.keep is not None
        watch = overlay.view.touched.watch()
        Exchange(overlay).make_way(path)
        with closing(
            Commit(overlay.view.stack.copy(), overlay.view.keep, [path], lambda: False)
        ) as work:
            work.copy()
            meanwhile(overlay)
            work.renew(overlay.view.stack.copy(), watch.take(), watch.take_identities(), last=True)
            work.publish()

    for point in count():
        top = make(scratch)
        with served(top) as overlay:
            prepare(overlay)
            overlay.unlink(*place(overlay, "home/u/other"))
            overlay.rename(place(overlay, "home/u/docs/sub"), place(overlay, "home/u/sub"))
        before = view(top)
        after = {**before, "/home/u/docs/meanwhile": b""}
        lived = fault_points.run(commit, lambda top=top: serve(top), die_at=point)  # type: ignore[misc]
        what = f"killed before change {point}, {lived.calls[-1]}"
        found = view(top)
        assert found in (before, after), what
        with served(top) as overlay:
            commit(overlay)
        assert view(top, rule_for(path)) == after, what
        assert os.listdir(top / "kept-work/work") == []
        if not lived.died:
            break
