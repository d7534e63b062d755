"""Builds `sessiond.fuse._kernel_io`; everything else is in pyproject.toml."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCE = Path("sessiond/fuse/kernel_io")


def fuse3(option: str) -> list[str]:
    """Return what the compiler has to be told to use libfuse."""
    command = ["pkg-config", option, "fuse3"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


def extensions() -> list[Extension]:
    """Return the extension, or nothing where libfuse's headers are missing."""
    if (
        shutil.which("pkg-config") is None
        or subprocess.run(["pkg-config", "--exists", "fuse3 >= 3.14"], check=False).returncode
    ):
        print("libfuse 3.14 is not there to build with: sessiond will be slower", file=sys.stderr)
        return []
    return [
        Extension(
            "sessiond.fuse._kernel_io",
            sources=[str(path) for path in sorted(SOURCE.glob("*.c"))],
            depends=[str(path) for path in sorted(SOURCE.glob("*.h"))],
            extra_compile_args=[
                "-D_FILE_OFFSET_BITS=64",
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
                "-Wno-unused-parameter",
                *fuse3("--cflags"),
            ],
            extra_link_args=fuse3("--libs"),
            optional=True,
        )
    ]


setup(ext_modules=extensions())
