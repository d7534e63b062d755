"""``python -m tests.bench.run``: compare sessiond with other overlays, row by row, and report.

Meant for mount and process namespaces of its own, as `make bench` runs it: then nothing stays
behind, whatever happens.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tests.bench import applications, sessions, workloads
from tests.bench.materials import Materials
from tests.bench.peers import PEERS, Peer, Sessiond
from tests.bench.report import Cell, Report, quantity
from tests.bench.rows import QUICK, Scale, SkippedError, Unit
from tests.support.mounts import detach

REPOSITORY = Path(__file__).parents[2]

ROUNDS = 3

DEFAULT_PEERS = (
    "kernel",
    "fuse-overlayfs",
    "unionfs-fuse",
    "mergerfs",
    "sessiond-passthrough",
    "sessiond-cached",
)

# Where matplotlib is: a package of Debian's.
_PYTHON_WITH_MATPLOTLIB = "/usr/bin/python3"


class Row(Protocol):
    """One kind of work."""

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> Unit: ...

    def prepare(self, materials: Materials) -> None:
        """Make what it works on; raises `SkippedError` where that cannot be."""

    def measure(self, peer: Peer, materials: Materials) -> float:
        """Do the work once, and return the figure.

        Raises `SkippedError` if the peer cannot do it by its nature, and whatever goes wrong.
        """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0 if every figure that was asked for is there."""
    options = _parse(arguments)
    if os.geteuid() != 0:
        print("bench: mounting takes root", file=sys.stderr)
        return 2
    # As Ctrl-C, which trio handles as well.
    signal.signal(signal.SIGTERM, lambda _number, _frame: signal.raise_signal(signal.SIGINT))
    scale = QUICK if options.quick else Scale()
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    chosen = [row for row in all_rows(scale) if options.rows.search(row.name)]
    if not chosen:
        print("bench: no row has such a name", file=sys.stderr)
        return 2
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    interrupted = False
    try:
        with _temporary_directory(options.directory) as directory:
            materials = Materials(directory, output / "cache", scale)
            report = _new_report(directory, options.peers)
            _run(chosen, options.peers, rounds, materials, report, output / "results.json")
    except* KeyboardInterrupt:  # trio wraps it in groups
        interrupted = True
    if interrupted:
        print("bench: interrupted", file=sys.stderr)
        return 130
    text = report.text()
    print(text, end="")
    (output / "results.txt").write_text(text)
    _plot(output)
    return 1 if report.failed else 0


def all_rows(scale: Scale) -> list[Row]:
    """Return every row, for so much work."""
    return [*workloads.rows(scale), *applications.rows(scale), *sessions.rows(scale)]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="Compare sessiond with its peers.")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"default: {ROUNDS}; with --quick 1"
    )
    parser.add_argument(
        "--rows",
        type=_parse_expression,
        metavar="REGEX",
        default=re.compile(""),
        help="only rows in whose names this is found",
    )
    parser.add_argument(
        "--peers",
        type=_parse_peers,
        metavar="NAME[,NAME...]",
        default=",".join(DEFAULT_PEERS),
        help=f"of {', '.join(PEERS)} (default: %(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument(
        "--directory",
        type=Path,
        default="/var/tmp",
        help="where the layers are made: a disk (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIRECTORY",
        default=REPOSITORY / "build/bench",
        help="for results.txt, results.json and plot.png (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def _parse_expression(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"no regular expression: {error}") from None


def _parse_peers(names: str) -> list[Peer]:
    try:
        return [PEERS[name] for name in names.split(",")]
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"no peer is called {error}") from None


def _run(
    rows: Sequence[Row],
    peers: Sequence[Peer],
    rounds: int,
    materials: Materials,
    report: Report,
    results: Path,
) -> None:
    """Run all rounds; the results are on disk after each."""
    _say("Making what the rows work on.")
    ready = [row for row in rows if _prepare(row, materials, report.add_row(row.name, row.unit))]
    for number in range(rounds):
        for place, row in enumerate(ready):
            cells = report.rows[row.name]
            # Whoever comes first finds another machine than whoever comes last.
            first = (number + place) % len(peers)
            figures = {
                peer.name: _measure(row, peer, materials, cells[peer.name])
                for peer in (*peers[first:], *peers[:first])
            }
            _say(f"{number + 1}/{rounds}  {row.name}: {_progress(report, row.unit, figures)}")
        report.write_json(results)


def _prepare(row: Row, materials: Materials, cells: Mapping[str, Cell]) -> bool:
    """Make what a row works on; return whether it can be run, and else tell all its cells why."""
    try:
        row.prepare(materials)
    except SkippedError as reason:
        for cell in cells.values():
            cell.skipped = str(reason)
    except Exception as error:
        for cell in cells.values():
            cell.failures.append(_described(error))
    else:
        return True
    return False


def _measure(row: Row, peer: Peer, materials: Materials, cell: Cell) -> float | None:
    """Add a figure to a cell, and return it. Nothing that goes wrong there ends the run."""
    if cell.skipped:
        return None
    try:
        figure = row.measure(peer, materials)
    except SkippedError as reason:
        cell.skipped = str(reason)
        return None
    except Exception as error:
        cell.failures.append(_described(error))
        return None
    cell.values.append(figure)
    return figure


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _progress(report: Report, unit: Unit, figures: Mapping[str, float | None]) -> str:
    return ", ".join(
        f"{peer} {quantity(figure, unit)}"
        for peer in report.peers
        if (figure := figures[peer]) is not None
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _new_report(directory: Path, peers: Sequence[Peer]) -> Report:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    kind = subprocess.run(
        ["stat", "--file-system", "--format=%T", directory],
        capture_output=True,
        text=True,
        check=True,
    )
    machine = {
        "kernel": platform.release(),
        "system": platform.freedesktop_os_release()["PRETTY_NAME"],
        "processors": str(os.cpu_count()),
        "memory": quantity(memory, Unit.BYTES),
        "file system": kind.stdout.strip(),
    }
    return Report(
        machine=machine,
        peers={peer.name: peer.version() for peer in peers},
        own=[peer.name for peer in peers if isinstance(peer, Sessiond)],
    )


def _plot(output: Path) -> None:
    """Draw the plot; the figures are there without it."""
    script = Path(__file__).with_name("plot.py")
    done = subprocess.run(
        [_PYTHON_WITH_MATPLOTLIB, script, output / "results.json", output / "plot.png"],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        _say(f"There is no plot: {done.stderr.strip()}")


@contextmanager
def _temporary_directory(parent: Path) -> Iterator[Path]:
    """Yield a new directory; remove it, but never through a mount."""
    directory = Path(tempfile.mkdtemp(prefix="sessiond-bench-", dir=parent))
    directory.chmod(0o755)
    # ext4 does not use the number of an inode again for a minute after its removal, and looks for
    # another one by one. So each view has to have a part of the disk of its own, or the removal of
    # one upper would make all creation in the next some ten times slower. Others do not do that.
    subprocess.run(["chattr", "+T", directory], capture_output=True, check=False)
    try:
        yield directory
    finally:
        for mount_point in reversed(_mounts_below(directory)):
            detach(mount_point)
        shutil.rmtree(directory)


def _mounts_below(directory: Path) -> list[str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        points = [line.split(" ")[4] for line in table]
    return [point for point in points if Path(point).is_relative_to(directory)]


if __name__ == "__main__":
    sys.exit(main())
