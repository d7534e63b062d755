"""Builds `sessiond.fuse._kernel_io` and the translations; everything else is in pyproject.toml."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_py import build_py

SOURCE = Path("sessiond/fuse/kernel_io")
LOCALE = Path("sessiond/locale")


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


class Catalogues(Command):
    """Compiles `locale/LANG.po` to where gettext looks for it, in the source tree."""

    description = "compile the translations"
    user_options: ClassVar = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        if shutil.which("msgfmt") is None:
            print("gettext is not there to build with: all is in English", file=sys.stderr)
            return
        for source in sorted(LOCALE.glob("*.po")):
            target = LOCALE / source.stem / "LC_MESSAGES" / "sessiond.mo"
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["msgfmt", "--check-format", "-o", str(target), str(source)], check=True)


class BuildWithCatalogues(build_py):
    """Takes the translations along as the package's data."""

    def run(self):
        self.run_command("catalogues")
        self.data_files = self._get_data_files()  # listed before they were compiled
        super().run()


setup(
    cmdclass={"catalogues": Catalogues, "build_py": BuildWithCatalogues},
    ext_modules=extensions(),
)
