"""The demo tells the truth, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

DEMO = Path(__file__).parents[2] / "demo/run.py"


Demo: TypeAlias = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def demo() -> Iterator[Demo]:
    """Runs it in a place of its own, where it is to leave nothing."""
    with tempfile.TemporaryDirectory(prefix="sessiond-test-", dir="/var/tmp") as place:
        os.chmod(place, 0o711)

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, DEMO, *arguments],
                env=os.environ | {"TMPDIR": place},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=300,
            )

        yield run
        assert os.listdir(place) == []


@pytest.mark.timeout(300)
def test_the_demo(demo: Demo) -> None:
    mounts = Path("/proc/self/mountinfo").read_text()
    done = demo()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("# Everything was as told.\n")
    assert done.stderr == ""
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_the_demo_over_a_missing_image(demo: Demo) -> None:
    done = demo("--image", "/nonexistent")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "This is missing: the image /nonexistent.\n"


def test_the_demo_over_something_that_is_no_root_ends_with_a_reason(
    demo: Demo, tmp_path: Path
) -> None:
    for name in ("etc", "usr"):
        (tmp_path / name).mkdir()
    done = demo("--image", str(tmp_path))
    assert done.returncode == 1
    assert "demo: " in done.stderr
    assert "Traceback" not in done.stderr
