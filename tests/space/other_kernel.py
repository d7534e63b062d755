"""The first process on a kernel in user mode, over this machine's files: runs tests, and ends it.

Arguments: the directory of the kernel's modules, and a file of tests. The kernel adds some.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

_SYS_FINIT_MODULE = 313  # x86-64
_RB_POWER_OFF = 0x4321FEDC

_libc = ctypes.CDLL(None, use_errno=True)


def main(modules: Path, tests: str) -> None:
    """Never return."""
    mounts = {"/proc": b"proc", "/sys": b"sysfs", "/run": b"tmpfs", "/var/tmp": b"tmpfs"}
    for target, kind in mounts.items():
        _libc.mount(kind, target.encode(), kind, ctypes.c_ulong(0), None)
    for name in ("quota_tree", "quota_v2", "fuse", "loop"):
        for module in modules.rglob(f"{name}.ko"):
            with open(module, "rb") as file:
                _libc.syscall(_SYS_FINIT_MODULE, file.fileno(), b"", 0)
    environment = os.environ | {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "TMPDIR": "/var/tmp",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rs", tests],
        cwd=Path(__file__).parents[2],
        env=environment,
        check=False,
    )
    print(f"pytest ended with {done.returncode}.", flush=True)
    _libc.reboot(_RB_POWER_OFF)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
