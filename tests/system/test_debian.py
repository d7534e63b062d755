"""A session over a squashfs image of a real Debian root, as a live CD has it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import trees
from tests.support.daemon import MANAGER, Daemon

CONTROL = """\
Package: sessiond-example
Version: 1
Architecture: all
Maintainer: Nobody <nobody@localhost>
Description: something to install
"""

POSTINST = """\
#!/bin/sh
set -e
echo installed >/var/lib/sessiond-example
ln -s /usr/share/sessiond-example/words /etc/alternatives/words
chown 1:1 /usr/share/sessiond-example/words
"""


@contextmanager
def mounted(image: Path, directory: Path) -> Iterator[Path]:
    """The image, mounted by the kernel alone."""
    directory.mkdir()
    subprocess.run(["mount", "-o", "loop,ro", image, directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def build_package(directory: Path) -> Path:
    """Build a Debian package that does what packages do."""
    tree = directory / "sessiond-example"
    tree.mkdir()
    trees.build(
        {
            "DEBIAN": {
                "control": CONTROL.encode(),
                "postinst": trees.File(content=POSTINST.encode(), mode=0o755),
            },
            "usr": {
                "bin": {
                    "sessiond-example": trees.File(content=b"#!/bin/sh\necho works\n", mode=0o4755)
                },
                "share": {"sessiond-example": {"words": b"some words\n" * 1000}},
            },
        },
        str(tree),
    )
    package = directory / "sessiond-example.deb"
    subprocess.run(["dpkg-deb", "--build", tree, package], check=True, capture_output=True)
    return package


def test_a_package_is_installed_and_a_reset_leaves_nothing_of_it(
    idle_daemon: Daemon, debian: Path, tmp_path: Path
) -> None:
    with open(idle_daemon.configuration, "a") as configuration:
        configuration.write(f'[profile.debian]\nimage = "{debian}"\nsize = "256M"\n')
    idle_daemon.start()
    arguments = ("CreateSession", "ssa{sv}", "root", "debian", "1", "id", "s", "live")
    idle_daemon.busctl("call", *MANAGER, *arguments)
    root = idle_daemon.root("live")
    with mounted(debian, tmp_path / "image") as image:
        pristine = trees.snapshot(str(image))
    trees.assert_same(pristine, trees.snapshot(str(root)), "the session is not its image")

    (root / "root/example.deb").write_bytes(build_package(tmp_path).read_bytes())
    idle_daemon.run("live", "dpkg --install /root/example.deb")
    assert idle_daemon.run("live", "sessiond-example") == "works\n"
    idle_daemon.run("live", "dpkg --force-remove-essential --force-depends --purge diffutils")
    idle_daemon.sessionctl("run", "live", "--", "cmp", code=127)
    differences = idle_daemon.differences("live")
    assert differences["/var/lib/sessiond-example"] == "added"
    assert differences["/usr/bin/cmp"] == "deleted"
    assert differences["/var/lib/dpkg/status"] == "contents"

    with subprocess.Popen(["cat"], cwd=root / "var/lib", stdin=subprocess.PIPE) as bystander:
        idle_daemon.busctl("call", *MANAGER, "ResetSession", "sa{sv}", "live", "0")
        idle_daemon.wait_idle("live")
        trees.assert_same(pristine, trees.snapshot(str(root)), "the session is not its image")
        assert bystander.poll() is None
        assert os.path.samefile(f"/proc/{bystander.pid}/cwd", root / "var/lib")
