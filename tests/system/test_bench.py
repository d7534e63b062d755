"""The benchmark runs, reports every figure that is asked for, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

ROWS = (
    "walk .* warm|create|copy-up of 200|session reset, changed files: 1$|each worker, sessions: 4"
)


def bench(*arguments: str | Path, path: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.bench.run", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PATH": f"{path}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_rows_are_measured_and_reported(tmp_path: Path) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    work, output = tmp_path / "work", tmp_path / "output"
    work.mkdir()
    done = bench(
        *("--quick", "--rows", ROWS, "--peers", "kernel,sessiond-passthrough"),
        *("--directory", work, "--output", output),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((output / "results.json").read_text())
    assert list(report["peers"]) == ["kernel", "sessiond-passthrough"]
    figures = {
        row["name"]: [len(cell["values"]) for cell in row["cells"].values()]
        for row in report["rows"]
    }
    assert figures == {
        "walk + lstat of 2,000 files, warm": [1, 1],
        "session create": [0, 1],
        "create 300 files": [1, 1],
        "copy-up of 200 files of the lower": [1, 1],
        "session reset, changed files: 1": [0, 1],
        "memory of each worker, sessions: 4": [0, 1],
    }
    for row in report["rows"]:
        for ratios in row["ratios"].values():
            assert (ratios["kernel"] is None) == ("session" in row["name"])
    assert (output / "results.txt").read_text() == done.stdout
    assert list(work.iterdir()) == []
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_a_peer_that_fails_is_reported_and_does_not_end_the_run(tmp_path: Path) -> None:
    program = tmp_path / "fuse-overlayfs"
    program.write_text("#!/bin/sh\necho No such luck.\nexit 1\n")
    program.chmod(0o755)
    work, output = tmp_path / "work", tmp_path / "output"
    work.mkdir()
    done = bench(
        *("--quick", "--rows", "lookup .* warm", "--peers", "fuse-overlayfs,kernel"),
        *("--directory", work, "--output", output),
        path=str(tmp_path),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    (row,) = json.loads((output / "results.json").read_text())["rows"]
    assert row["cells"]["kernel"]["median"] > 0
    failed = row["cells"]["fuse-overlayfs"]
    assert failed["median"] is None
    assert failed["failures"] == ["MountError: fuse-overlayfs does not mount: No such luck."]
    assert failed["failures"][0] in done.stdout
    assert list(work.iterdir()) == []


def test_a_row_that_does_not_exist(tmp_path: Path) -> None:
    done = bench("--rows", "no such row", "--output", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "bench: no row has such a name\n"
