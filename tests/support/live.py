"""A live system: Debian 13 with the packages of `make deb`, as a live CD has it.

Its root is a squashfs, which QEMU starts by way of live-boot(7), and systemd-nspawn(1) by itself.
All is made once for each state of the packages, and kept below ``build/``.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support import debian
from tests.support.machine import CHECKOUT
from tests.support.virtual_machine import SMALL_INITRD, System

USER, PASSWORD = "alice", "secret"
"""Who may log in."""

_RELEASE = "trixie"
_DIRECTORY = CHECKOUT / "build/boot"
_BUILT = CHECKOUT / "build/deb"
_MEBIBYTE = 1 << 20
_STATE_SIZE = "1G"
"""Of the disk for /var/lib/sessiond; it has holes."""

_PACKAGES = ",".join(
    [
        *("systemd-sysv", "udev", "kmod", "dbus", "dbus-bin", "login", "passwd", "procps", "mount"),
        *(
            "libpam-systemd",
            "libpam-runtime",
            "libnss-systemd",
            "polkitd",
            "pkexec",
            "gettext-base",
        ),
        *("linux-image-cloud-amd64", "live-boot", "live-boot-initramfs-tools", "initramfs-tools"),
        *("python3-dbus-next", "python3-pydantic", "python3-pyfuse3", "python3-rich"),
        *("python3-trio", "e2fsprogs", "fuse3", "libfuse3-4", "squashfs-tools"),
    ]
)
_OPTIONS = (
    "--aptopt=APT::Install-Recommends false",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    f"--essential-hook={SMALL_INITRD}",
)

_INSTALL = f"""
mount -t proc proc /proc
export DEBIAN_FRONTEND=noninteractive
dpkg --install /srv/sessiond_*.deb
rm /srv/*.deb
useradd --create-home --shell /bin/sh {USER}
echo '{USER}:{PASSWORD}' | chpasswd
systemctl enable --quiet var-lib-sessiond.mount
# What systemd does at a first start is no matter here, and takes long where all is emulated.
touch /etc/.updated /var/.updated
"""
_CONFIGURATION = """\
# The root of each of these is what this machine was started from.
[profile.live]
image = "/run/live/medium/live/filesystem.squashfs"
size = "64M"
[profile.lasting]
image = "/run/live/medium/live/filesystem.squashfs"
storage = "persistent"
keep = ["/home/*/Documents"]
[session.kiosk]
user = "root"
profile = "live"

[profile.home]
image = "/home/{user}"
mount_point = "/home/{user}"
size = "16M"
[login.people]
profile = "home"
"""
_STATE_MOUNT = """\
[Unit]
ConditionVirtualization=!container
[Mount]
What=/dev/disk/by-label/sessiond
Where=/var/lib/sessiond
Type=ext4
[Install]
WantedBy=local-fs.target
"""
_FILES = {
    "etc/hostname": "live\n",
    "etc/sessiond/sessiond.conf.d/live.toml": _CONFIGURATION,
    "etc/systemd/system/var-lib-sessiond.mount": _STATE_MOUNT,
}


@dataclass(frozen=True)
class LiveSystem:
    root: Path
    """A squashfs."""
    system: System
    """For QEMU: that root on a medium, and a disk for what outlives a start."""


def live_system(*, make: bool = True) -> LiveSystem | None:
    """Return it, made of what `make deb` has built; without `make`, None if it is not there.

    Raises `NoArchive`.
    """
    packages = sorted(_BUILT.glob("sessiond_*.deb"))
    if not packages and not make:
        return None
    assert len(packages) == 1, f"'make deb' puts one package of the daemon into {_BUILT}"
    base_key = _key([_PACKAGES, *_OPTIONS])
    key = _key([base_key, _INSTALL, *_FILES.values(), packages[0].read_bytes()])
    base = _DIRECTORY / f"base-{base_key}.tar"
    medium = _DIRECTORY / f"live-{key}.medium"
    disk = medium.with_suffix(".disk")
    if not medium.exists():
        if not make:
            return None
        _DIRECTORY.mkdir(parents=True, exist_ok=True)
        debian.made_once(base, _make_base)
        for old in _DIRECTORY.glob("live-*"):
            old.unlink()
        debian.made_once(medium, lambda part: _make_medium(base, packages[0], medium, part))
    options = "boot=live nopersistence"
    return LiveSystem(
        medium.with_suffix(".squashfs"), System(disk, options, medium, sees_checkout=False)
    )


def _key(parts: list[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


def _make_base(part: Path) -> None:
    archive = part.with_suffix(".tar.tar")  # whose name says its format
    debian.install(archive, _PACKAGES, *_OPTIONS, release=_RELEASE)
    archive.rename(part)


def _make_medium(base: Path, package: Path, medium: Path, part: Path) -> None:
    """Write the medium to `part`, and what else is beside `medium`."""
    work = medium.with_suffix(".work")
    shutil.rmtree(work, ignore_errors=True)
    root, squashfs = work / "root", medium.with_suffix(".squashfs")
    root.mkdir(parents=True)
    (work / "medium/live").mkdir(parents=True)
    try:
        _run("tar", "--extract", "--file", base, "--directory", root)
        shutil.copy(package, root / "srv")
        for name, contents in _FILES.items():
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(contents)
        _run("unshare", "--mount", "chroot", root, "/bin/sh", "-euc", _INSTALL)
        for name, suffix in (("vmlinuz", ".vmlinuz"), ("initrd.img", ".initrd")):
            (found,) = (root / "boot").glob(f"{name}-*")
            shutil.move(found, medium.with_suffix(suffix))
        # Where all is emulated, other compressions take longer to read than the disk.
        squashfs.unlink(missing_ok=True)
        _run("mksquashfs", root, squashfs, "-quiet", "-no-progress", "-exports", "-comp", "lz4")
        inside = work / "medium/live/filesystem.squashfs"
        inside.hardlink_to(squashfs)
        size = f"{squashfs.stat().st_size // _MEBIBYTE * 11 // 10 + 16}M"
        _run("mke2fs", "-q", "-t", "ext4", "-d", work / "medium", part, size)
        disk = medium.with_suffix(".disk")
        disk.unlink(missing_ok=True)
        _run("mke2fs", "-q", "-t", "ext4", "-L", "sessiond", disk, _STATE_SIZE)
    finally:
        shutil.rmtree(work)


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
