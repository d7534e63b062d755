"""A machine of a test's own with a kernel of its own: Debian, started by QEMU.

It starts as a machine does: kernel, initial RAM disk, systemd. It is spoken to by the root shell
that systemd has on a serial port, sees this checkout read-only (9p), and what it writes to its disk
outlives its reboots, but not the machine. Without KVM all is emulated, which takes ten times as
long.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support import debian
from tests.support.machine import CHECKOUT, SOURCE, CannotBoot, install_project

BOUND = 300.0
"""Seconds within which the machine boots, or obeys a command, or else the test fails."""

_KVM_BOUND = 20.0
"""Seconds within which a kernel says something where KVM works; a nested one may hang for ever."""

_PACKAGES = ",".join(
    [
        *("systemd-sysv", "udev", "kmod", "dbus", "polkitd", "libpam-systemd", "procps", "python3"),
        *("fuse3", "libseccomp2", "cryptsetup-bin", "squashfs-tools", "erofs-utils", "e2fsprogs"),
        *("xfsprogs", "acl", "attr"),
    ]
)
_SMALL_INITRD = """
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
echo MODULES=list >"$1/etc/initramfs-tools/conf.d/modules"
printf '%s\\n' virtio_pci virtio_blk ext4 crc32c >"$1/usr/share/initramfs-tools/modules.d/machine"
"""
"""Where all is emulated, to unpack one with all modules takes longer than the rest of the start."""
_DISK_SIZE = "8G"
"""Of the file; it has holes."""
_MEMORY = "3G"
_KERNEL_OPTIONS = "root=/dev/vda rw console=ttyS0 loglevel=6 panic=1"
_SYSTEMD_OPTIONS = "systemd.debug_shell=ttyS1 systemd.firstboot=no"


@dataclass(frozen=True)
class System:
    """What a machine is started from: three files side by side."""

    disk: Path
    """Its root file system."""

    @property
    def kernel(self) -> Path:
        return self.disk.with_suffix(".vmlinuz")

    @property
    def initrd(self) -> Path:
        return self.disk.with_suffix(".initrd")


def debian_disk(directory: Path) -> System:
    """Return this machine's release of Debian with its kernel; made once, and kept in `directory`.

    Raises `NoArchive`.
    """
    return System(debian.made_once(directory / f"{debian.suite()}-kernel.ext4", _make_disk))


def _make_disk(disk: Path) -> None:
    root = disk.with_suffix(".root")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    try:
        architecture = subprocess.check_output(["dpkg", "--print-architecture"], text=True).strip()
        debian.install(
            root,
            f"{_PACKAGES},linux-image-{architecture}",
            "--aptopt=APT::Install-Recommends false",
            f"--essential-hook={_SMALL_INITRD}",
        )
        made = System(disk)
        for name, target in (("vmlinuz", made.kernel), ("initrd.img", made.initrd)):
            (found,) = (root / "boot").glob(f"{name}-*")
            shutil.copyfile(found, target)
        make = ["mke2fs", "-q", "-t", "ext4", "-d", root, disk, _DISK_SIZE]
        subprocess.run(make, check=True, capture_output=True)
    finally:
        shutil.rmtree(root)


class VirtualMachine:
    """One that runs, with this checkout at `SOURCE`."""

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]], directory: Path) -> None:
        """`start` starts its process, which has `console` and `shell` in `directory`."""
        self._start = start
        self._directory = directory
        self._switch_on()

    def run(self, command: str, *, code: int = 0, bound: float = BOUND, show: bool = False) -> str:
        """Run a shell command there as root; it has to end with `code`. Return what it printed.

        It has `bound` seconds for that. With `show`, what it prints is printed here at once.
        """
        said, ended = self._run(command, bound, show=show)
        assert ended == code, (command, ended, said)
        return said

    def _run(self, command: str, bound: float, *, show: bool = False) -> tuple[str, int]:
        inner = f"sh -euc {shlex.quote(command)} </dev/null; printf '\\n{_ENDED} %d\\n' $?"
        self._send(f"{{ {inner}; }} 2>&1 | cat")
        text = self._until(rb"\n" + _ENDED.encode() + rb" \d+\n", bound, show=show)
        said, _, ended = text.rpartition(f"\n{_ENDED} ")
        return said, int(ended)

    def wait(self, command: str) -> None:
        """Return once a shell command succeeds; each attempt takes its time."""
        deadline = time.monotonic() + BOUND
        while self._run(command, BOUND)[1] != 0:
            assert time.monotonic() < deadline, f"it does not come about: {command}"

    def install(self) -> None:
        """Install sessiond from this checkout, not enabled."""
        self.run(
            f"mkdir -p /mnt/installed && mount -t 9p -o {_SHARED} installed /mnt/installed"
            " && cp -r /mnt/installed/. / && umount /mnt/installed && sync"
            " && systemctl daemon-reload && systemctl reload dbus"
        )

    def cut_power(self) -> None:
        """Start it anew: nothing ends first, and nothing more is written to its disk."""
        self.switch_off()
        self._switch_on()

    def switch_off(self) -> None:
        """End it, at once."""
        self._shell.close()
        self._process.kill()
        self._process.wait()

    def _switch_on(self) -> None:
        self._process = self._start()
        self._shell = socket.socket(socket.AF_UNIX)
        self._said = b""
        try:
            self._shell.connect(str(self._directory / "shell"))
            self._wait_ready()
        except BaseException:
            self.switch_off()
            raise

    def _wait_ready(self) -> None:
        self._until(rb"# ", BOUND)  # nothing is listened to before the shell prompts
        self._send("stty -echo -onlcr; exec env PS1= PS2= sh")
        self._send("printf '%s%s\\n' rea dy")
        self._until(rb"ready\n", BOUND)
        # Whether all of Debian's own units can run here is no matter.
        self.run("systemctl is-system-running --wait || true")
        self.run(f"mkdir -p {SOURCE} && mount -t 9p -o {_SHARED} sessiond {SOURCE}")

    def _send(self, line: str) -> None:
        assert max(map(len, line.encode().splitlines())) < 4000, "more than a terminal takes"
        self._shell.sendall(line.encode() + b"\n")

    def _until(self, pattern: bytes, bound: float, *, show: bool = False) -> str:
        """Return what was said up to the end of `pattern`."""
        deadline = time.monotonic() + bound
        while (found := re.search(pattern, self._said)) is None:
            left = deadline - time.monotonic()
            assert left > 0, (f"not within {bound} seconds: {pattern!r}", self._said)
            self._shell.settimeout(left)
            with suppress(TimeoutError):
                chunk = self._shell.recv(1 << 16)
                assert chunk, (self._directory / "console").read_text(errors="replace")
                self._said += chunk
                if show:
                    sys.stdout.write(chunk.decode(errors="replace"))
                    sys.stdout.flush()
        text, self._said = self._said[: found.end()], self._said[found.end() :]
        return text.decode(errors="replace")


_ENDED = "The command ended with"
_SHARED = "trans=virtio,version=9p2000.L,cache=loose,ro"


@contextmanager
def booted(system: System, directory: Path) -> Iterator[VirtualMachine]:
    """Start a machine; what belongs to it is in `directory`. Raises `CannotBoot`."""
    install_project(directory / "installed")
    disk = directory / "disk"
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", system.disk, disk], check=True)
    accelerators = _accelerators()
    print(f"A machine is started; its console is {directory / 'console'}.")
    try:
        machine = VirtualMachine(lambda: _start(system, directory, accelerators), directory)
        try:
            yield machine
        finally:
            machine.switch_off()
    finally:
        disk.unlink()


def _start(
    system: System, directory: Path, accelerators: list[tuple[list[str], float]]
) -> subprocess.Popen[bytes]:
    """Start QEMU; return once the kernel has said something. What fails is not tried again."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None or platform.machine() != "x86_64":
        raise CannotBoot("It takes an x86-64 machine, and Debian's package qemu-system-x86.")
    console, shell, said = (directory / name for name in ("console", "shell", "qemu"))
    command = [qemu, "-machine", "q35", "-smp", "2", "-m", _MEMORY, "-nodefaults"]
    command += ["-no-user-config", "-display", "none", "-device", "virtio-rng-pci"]
    command += ["-kernel", str(system.kernel), "-initrd", str(system.initrd)]
    command += ["-append", f"{_KERNEL_OPTIONS} {_SYSTEMD_OPTIONS}"]
    command += ["-drive", f"file={directory / 'disk'},format=raw,if=virtio"]
    command += ["-serial", f"file:{console}", "-serial", f"unix:{shell},server=on,wait=off"]
    for tag, path in (("sessiond", CHECKOUT), ("installed", directory / "installed")):
        share = f"local,id={tag},mount_tag={tag},path={path},security_model=none,readonly=on"
        command += ["-virtfs", share]
    while accelerators:
        options, bound = accelerators[0]
        console.unlink(missing_ok=True)
        with open(said, "wb") as log:
            process = subprocess.Popen(
                [*command, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + bound
        while process.poll() is None and time.monotonic() < deadline:
            if console.exists() and b"Linux version" in console.read_bytes():
                return process
            time.sleep(0.1)
        process.kill()
        process.wait()
        del accelerators[0]
    raise CannotBoot(said.read_text(errors="replace"))


def _accelerators() -> list[tuple[list[str], float]]:
    """Return the options for what makes it quick, and how long the kernel may keep silent then."""
    emulated = (["-accel", "tcg,thread=multi", "-cpu", "max"], BOUND)
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return [(["-accel", "kvm", "-cpu", "host"], _KVM_BOUND), emulated]
    return [emulated]
