"""The demo tells the truth, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "demo/run.py"


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DEMO, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.timeout(300)
def test_the_demo() -> None:
    before = set(Path("/var/tmp").glob("sessiond-demo-*"))
    mounts = Path("/proc/self/mountinfo").read_text()
    done = demo()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("# Everything was as told.\n")
    assert done.stderr == ""
    assert set(Path("/var/tmp").glob("sessiond-demo-*")) == before
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_the_demo_over_a_missing_image() -> None:
    done = demo("--image", "/nonexistent")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "This is missing: the image /nonexistent.\n"


def test_the_demo_over_something_that_is_no_root_ends_with_a_reason(tmp_path: Path) -> None:
    for name in ("etc", "usr"):
        (tmp_path / name).mkdir()
    before = set(Path("/var/tmp").glob("sessiond-demo-*"))
    done = demo("--image", str(tmp_path))
    assert done.returncode == 1
    assert "demo: " in done.stderr
    assert "Traceback" not in done.stderr
    assert set(Path("/var/tmp").glob("sessiond-demo-*")) == before
