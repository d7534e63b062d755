"""Tests that this machine's kernel may be too new for, or lack something for, on Debian's own."""

from __future__ import annotations

import pytest

from tests.support.machine import PYTHON, SOURCE
from tests.support.virtual_machine import VirtualMachine

SELECTION = {
    # Project quotas, and dm-verity, which kernels may be built without: nothing may be skipped.
    "tests/space/test_quota.py": 0,
    "tests/system/test_verity.py": 0,
    # Debian 12 has neither FUSE passthrough nor what lets the kernel forget all names at once.
    "tests/fuse/test_swap.py": 0,
    "tests/fuse/test_data_paths.py": 0,
}
"""Files of tests, and how many of them may be skipped."""
BOUND = 1200.0
"""Seconds for each file, where all is emulated."""


@pytest.mark.timeout(BOUND + 600)
@pytest.mark.parametrize("file", SELECTION)
def test_on_debians_kernel(machine: VirtualMachine, file: str) -> None:
    environment = "HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis"
    options = "-v --color=no --durations=5 --timeout=600 -p no:cacheprovider --numprocesses=2"
    command = f"cd {SOURCE} && {environment} {PYTHON} -m pytest {options} {file}"
    said = machine.run(command, bound=BOUND, show=True)
    skipped = [line for line in said.splitlines() if line.startswith("SKIPPED")]
    assert len(skipped) <= SELECTION[file], skipped
