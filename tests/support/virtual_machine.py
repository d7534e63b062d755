"""A machine of a test's own with a kernel of its own: Debian, started by QEMU.

It starts as a machine does: kernel, initial RAM disk, systemd. It is spoken to by the root shell
that systemd has on a serial port, and by its console, which is another. What it writes to its disk
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
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from tests.support import debian
from tests.support.machine import CHECKOUT, SOURCE, CannotBoot, install_project

BOUND = 300.0
"""Seconds within which the machine boots, or obeys a command, or else the test fails."""

_PACKAGES = ",".join(
    [
        *("systemd-sysv", "udev", "kmod", "dbus", "polkitd", "libpam-systemd", "procps", "python3"),
        *("fuse3", "libseccomp2", "cryptsetup-bin", "squashfs-tools", "erofs-utils", "e2fsprogs"),
        *("xfsprogs", "acl", "attr"),
    ]
)
SMALL_INITRD = """
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
echo MODULES=list >"$1/etc/initramfs-tools/conf.d/modules"
printf '%s\\n' virtio_pci virtio_blk ext4 crc32c >"$1/usr/share/initramfs-tools/modules.d/machine"
"""
"""Where all is emulated, to unpack one with all modules takes longer than the rest of the start."""
_DISK_SIZE = "8G"
"""Of the file; it has holes."""
_MEMORY = "3G"
_KERNEL_OPTIONS = "console=ttyS0 loglevel=6 panic=1"
_SYSTEMD_OPTIONS = "systemd.debug_shell=ttyS1 systemd.firstboot=no"


class Startable(Protocol):
    """What a machine is started from. It has a root shell on the second serial port."""

    sign_of_life: tuple[bytes, float]
    """What its first serial port says early, and within how many seconds where KVM works.

    A nested KVM may hang for ever.
    """

    def prepare(self, directory: Path) -> str:
        """Make what belongs to one machine, which may write to `disk` in that directory.

        Return the command to run there whenever it has started.
        """

    def qemu_options(self, directory: Path) -> list[str]:
        """Return the options that are not for every machine."""


@dataclass(frozen=True)
class System:
    """A disk that QEMU starts by itself; kernel and initial RAM disk are beside it."""

    disk: Path
    """Each machine writes to a copy of its own."""
    options: str = "root=/dev/vda rw"
    """For the kernel: where the root file system is."""
    medium: Path | None = None
    """The disk before that, which is read-only, and has all that it takes: a live CD's."""
    sees_checkout: bool = True
    """This checkout is at `SOURCE` (read-only, 9p), and can be installed."""
    sign_of_life = (b"Key type ", 20.0)
    """The kernel has processors, memory, and a clock that goes."""

    @property
    def kernel(self) -> Path:
        return self.disk.with_suffix(".vmlinuz")

    @property
    def initrd(self) -> Path:
        return self.disk.with_suffix(".initrd")

    def prepare(self, directory: Path) -> str:
        """Copy the disk; see `Startable`."""
        disk = directory / "disk"
        subprocess.run(["cp", "--sparse=always", "--reflink=auto", self.disk, disk], check=True)
        if not self.sees_checkout:
            return "true"
        install_project(directory / "installed")
        return f"mkdir -p {SOURCE} && mount -t 9p -o {_SHARED} sessiond {SOURCE}"

    def qemu_options(self, directory: Path) -> list[str]:
        """Return those for the kernel and the disks, which firmware never sees."""
        options = ["-kernel", str(self.kernel), "-initrd", str(self.initrd)]
        options += ["-append", f"{self.options} {_KERNEL_OPTIONS} {_SYSTEMD_OPTIONS}"]
        if self.medium is not None:
            options += ["-drive", f"file={self.medium},format=raw,if=virtio,readonly=on"]
        options += ["-drive", f"file={directory / 'disk'},format=raw,if=virtio"]
        if self.sees_checkout:
            for tag, path in (("sessiond", CHECKOUT), ("installed", directory / "installed")):
                share = f"local,id={tag},mount_tag={tag},path={path},security_model=none"
                options += ["-virtfs", f"{share},readonly=on"]
        return options


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
            f"--essential-hook={SMALL_INITRD}",
        )
        made = System(disk)
        for name, target in (("vmlinuz", made.kernel), ("initrd.img", made.initrd)):
            (found,) = (root / "boot").glob(f"{name}-*")
            shutil.copyfile(found, target)
        make = ["mke2fs", "-q", "-t", "ext4", "-d", root, disk, _DISK_SIZE]
        subprocess.run(make, check=True, capture_output=True)
    finally:
        shutil.rmtree(root)


class Shell:
    """A shell on a serial line of a machine's."""

    def __init__(self, line: Path, console: Path) -> None:
        """`line` is a socket; `console` is a file that says what went wrong if the line is cut."""
        self._console = console
        self._said = b""
        self._cut = False
        self._changed = threading.Condition()
        self._line = socket.socket(socket.AF_UNIX)
        self._line.connect(str(line))
        # All the time: what is not read holds the machine up.
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def close(self) -> None:
        with suppress(OSError):  # it is cut
            self._line.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._line.close()

    def _read(self) -> None:
        while True:
            try:
                chunk = self._line.recv(1 << 16)
            except ConnectionError:
                chunk = b""
            with self._changed:
                self._said += chunk
                self._cut = not chunk
                self._changed.notify()
                if self._cut:
                    return

    def log_in(self, user: str, password: str) -> None:
        """Wait for the prompt, and log in there."""
        self.until(rb"login: $", BOUND)
        self.send(user)
        self.until(rb"Password: ", BOUND)
        self.send(password)
        self.take_over(rb"\$ ")

    def take_over(self, prompt: bytes) -> None:
        """Once the shell prompts, have it do so no more."""
        self.until(prompt, BOUND)
        self.send("stty -echo -onlcr; exec env PS1= PS2= sh")
        self.send("printf '%s%s\\n' rea dy")
        self.until(rb"ready\n", BOUND)

    def run(self, command: str, *, code: int = 0, bound: float = BOUND, show: bool = False) -> str:
        """Run a shell command; it has to end with `code`. Return what it printed.

        It has `bound` seconds for that. With `show`, what it prints is printed here at once.
        """
        said, ended = self.attempt(command, bound, show=show)
        assert ended == code, (command, ended, said)
        return said

    def attempt(self, command: str, bound: float = BOUND, *, show: bool = False) -> tuple[str, int]:
        """Run a shell command; return what it printed, and its status."""
        inner = f"sh -euc {shlex.quote(command)} </dev/null; printf '\\n{_ENDED} %d\\n' $?"
        self.send(f"{{ {inner}; }} 2>&1 | cat")
        text = self.until(rb"\n" + _ENDED.encode() + rb" \d+\n", bound, show=show)
        said, _, ended = text.rpartition(f"\n{_ENDED} ")
        return said, int(ended)

    def send(self, line: str) -> None:
        assert max(map(len, line.encode().split(b"\n"))) < 4000, "more than a terminal takes"
        self._line.sendall(line.encode() + b"\n")

    def until(self, pattern: bytes, bound: float, *, show: bool = False) -> str:
        """Return what was said up to the end of `pattern`."""
        deadline = time.monotonic() + bound
        shown = 0
        with self._changed:
            while True:
                found = re.search(pattern, self._said)
                if show:
                    new = self._said[shown : found.end() if found else None]
                    print(new.decode(errors="replace"), end="", flush=True)
                    shown += len(new)
                if found is not None:
                    break
                assert not self._cut, self._console.read_text(errors="replace")
                left = deadline - time.monotonic()
                assert left > 0, (f"not within {bound} seconds: {pattern!r}", self._said)
                self._changed.wait(left)
            text, self._said = self._said[: found.end()], self._said[found.end() :]
        return text.decode(errors="replace")


class VirtualMachine:
    """One that runs."""

    console: Shell
    """Where the machine says what it does, and then asks who is there."""

    def __init__(
        self, start: Callable[[], subprocess.Popen[bytes]], directory: Path, prepare: str
    ) -> None:
        """`start` starts its process, which has `console`, `terminal` and `shell` in `directory`.

        `prepare` is the command to run there whenever it has started.
        """
        self._start = start
        self._directory = directory
        self._prepare = prepare
        self._switch_on()

    def run(self, command: str, *, code: int = 0, bound: float = BOUND, show: bool = False) -> str:
        """Run a shell command there as root: see `Shell.run`."""
        return self._shell.run(command, code=code, bound=bound, show=show)

    def wait(self, command: str) -> None:
        """Return once a shell command succeeds; each attempt takes its time."""
        deadline = time.monotonic() + BOUND
        while self._shell.attempt(command)[1] != 0:
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
        self._disconnect()
        self._process.kill()
        self._process.wait()

    def power_off(self) -> None:
        """Shut it down, and start it anew once it has switched itself off."""
        self._shell.send("systemctl poweroff")
        self._process.wait(BOUND)
        self._disconnect()
        self._switch_on()

    def soft_reboot(self) -> None:
        """Have it restart all but its kernel."""
        self._shell.send("systemctl soft-reboot")
        self.console.until(rb"Soft-rebooting", BOUND)
        self._wait_ready()

    def _disconnect(self) -> None:
        for shell in self._shells:
            shell.close()

    def _switch_on(self) -> None:
        self._process = self._start()
        self._shells: list[Shell] = []
        try:
            for name in ("shell", "terminal"):
                self._shells.append(Shell(self._directory / name, self._directory / "console"))
            self._shell, self.console = self._shells
            self._wait_ready()
        except BaseException:
            self.switch_off()
            raise

    def _wait_ready(self) -> None:
        self._shell.send("")  # it may have prompted when nobody was there: it does so again
        self._shell.take_over(rb"# ")  # nothing is listened to before that
        # Whether all of Debian's own units can run here is no matter.
        self.run("systemctl is-system-running --wait || true")
        self.run(self._prepare)


_ENDED = "The command ended with"
_SHARED = "trans=virtio,version=9p2000.L,cache=loose,ro"


@contextmanager
def booted(system: Startable, directory: Path) -> Iterator[VirtualMachine]:
    """Start a machine; what belongs to it is in `directory`. Raises `CannotBoot`."""
    prepare = system.prepare(directory)
    accelerators = _accelerators(system.sign_of_life[1])
    print(f"A machine is started; its console is {directory / 'console'}.")
    try:
        start = partial(_start, system, directory, accelerators)
        machine = VirtualMachine(start, directory, prepare)
        try:
            yield machine
        finally:
            machine.switch_off()
    finally:
        (directory / "disk").unlink(missing_ok=True)


def _start(
    system: Startable, directory: Path, accelerators: list[tuple[list[str], float]]
) -> subprocess.Popen[bytes]:
    """Start QEMU; return once there is a sign of life. What fails is not tried again."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None or platform.machine() != "x86_64":
        raise CannotBoot("It takes an x86-64 machine, and Debian's package qemu-system-x86.")
    console, shell, said = (directory / name for name in ("console", "shell", "qemu"))
    command = [qemu, "-machine", "q35", "-smp", "2", "-m", _MEMORY, "-nodefaults"]
    command += ["-no-user-config", "-display", "none", "-device", "virtio-rng-pci"]
    terminal = f"socket,id=console,path={directory / 'terminal'},server=on,wait=off"
    command += ["-chardev", f"{terminal},logfile={console}", "-serial", "chardev:console"]
    command += ["-serial", f"unix:{shell},server=on,wait=off"]
    command += system.qemu_options(directory)
    while accelerators:
        options, bound = accelerators[0]
        console.unlink(missing_ok=True)
        with open(said, "wb") as log:
            process = subprocess.Popen(
                [*command, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + bound
        while process.poll() is None and time.monotonic() < deadline:
            if console.exists() and system.sign_of_life[0] in console.read_bytes():
                return process
            time.sleep(0.1)
        process.kill()
        process.wait()
        del accelerators[0]
    raise CannotBoot(said.read_text(errors="replace"))


def _accelerators(kvm_bound: float) -> list[tuple[list[str], float]]:
    """Return the options for what makes it quick, and for how long nothing may be said then."""
    # With AVX as QEMU 7.2 emulates it, llvmpipe, which draws where there is no GPU, crashes.
    emulated = (["-accel", "tcg,thread=multi", "-cpu", "max,avx=off,avx2=off"], BOUND)
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return [(["-accel", "kvm", "-cpu", "host"], kvm_bound), emulated]
    return [emulated]
