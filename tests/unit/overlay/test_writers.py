"""Files that are written past the overlay while a snapshot is made of them."""

from __future__ import annotations

import os

import pytest

from sessiond.overlay import syscalls
from sessiond.overlay.exchange import Exchange
from sessiond.overlay.overlay import Overlay
from tests.crash.writers import Writers
from tests.unit.overlay.conftest import Bench

pytestmark = pytest.mark.root

NAMES = ("a", "b", "c")


class BriefHalt:
    """Programs that stand still until so many files have been copied, and then write to all."""

    def __init__(self, most: int, files: list[int]) -> None:
        self._most = most
        self._files = files
        self._copied = 0
        self.ended = False

    def holds(self) -> bool:
        self._copied += 1
        if self._copied == self._most:
            self._write()
        return self._copied < self._most

    def end(self) -> None:
        if not self.ended and self._copied < self._most:
            self._write()
        self.ended = True

    def _write(self) -> None:
        """As through a mapping: neither times nor sizes show it."""
        for file in self._files:
            stat = os.stat(file)
            os.pwrite(file, b"later", 0)
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("most", [1, 2, 4])
def test_what_was_copied_when_programs_went_on_too_early_is_not_exact(
    bench: Bench, most: int
) -> None:
    writers = Writers()
    overlay = Overlay(bench.stack("low"), writers)
    files = []
    for name in NAMES:
        (bench.layer("upper") / name).write_bytes(b"first")
        files.append(writers.open(overlay, name))
    halt = BriefHalt(most, files)
    outdated = Exchange(overlay).swap(bench.stack("upper", "low", upper="second"), halt=halt)
    assert outdated.inexact == tuple(b"/" + os.fsencode(name) for name in NAMES[most - 1 :])
    kept = [(bench.layer("upper") / name).read_bytes() for name in NAMES]
    assert kept == ([b"first"] * most + [b"later"] * len(NAMES))[: len(NAMES)]
    assert [(bench.layer("second") / name).read_bytes() for name in NAMES] == [b"later"] * 3
    assert halt.ended
    overlay.close()


def test_programs_go_on_before_the_copies_are_on_disk(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = Writers()
    overlay = Overlay(bench.stack("low"), writers)
    (bench.layer("upper") / "a").write_bytes(b"first")
    halt = BriefHalt(9, [writers.open(overlay, "a")])
    ended: list[bool] = []
    fsync = syscalls.fsync

    def recording_fsync(fd: int, *, data_only: bool = False) -> None:
        ended.append(halt.ended)
        fsync(fd, data_only=data_only)

    monkeypatch.setattr(syscalls, "fsync", recording_fsync)
    Exchange(overlay).swap(bench.stack("upper", "low", upper="second"), halt=halt)
    assert ended
    assert all(ended)
    overlay.close()
