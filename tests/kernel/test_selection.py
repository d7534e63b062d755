"""Tests that this machine's kernel may be too new for, or lack something for, on Debian's own."""

from __future__ import annotations

import pytest

from tests.fuse.conftest import NO_SUCH_DATA_PATH
from tests.support.machine import PYTHON, SOURCE
from tests.support.virtual_machine import VirtualMachine

SELECTION = {
    # Project quotas, and dm-verity, which kernels may be built without.
    "tests/space/test_quota.py": None,
    "tests/system/test_verity.py": None,
    # Debian 12 has neither FUSE passthrough nor what lets the kernel forget all names at once.
    "tests/fuse/test_swap.py": NO_SUCH_DATA_PATH,
    "tests/fuse/test_data_paths.py": NO_SUCH_DATA_PATH,
}
"""Files of tests, and why some of these may be skipped."""
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
    reason = SELECTION[file]
    assert not [line for line in skipped if reason is None or reason not in line]
