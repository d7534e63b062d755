"""`sessiond`, the daemon: the only module that sees all the others, and puts them together."""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import trio

import sessiond
from sessiond.bus.service import serve
from sessiond.config import DEFAULT_FILE, Config, load
from sessiond.errors import ConfigError, Failed, SessiondError
from sessiond.fuse.mounter import FuseMounter
from sessiond.fuse.spawner import Spawner
from sessiond.session.manager import Manager, open_manager

log = logging.getLogger(__name__)

_EXIT_FAILURE = 1
_EXIT_CONFIGURATION = 2

_PRIORITIES = {
    logging.CRITICAL: 2,
    logging.ERROR: 3,
    logging.WARNING: 4,
    logging.INFO: 6,
    logging.DEBUG: 7,
}
"""Those of syslog, as the journal takes them at the beginning of a line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon; return its exit status: 0, 1 after a failure, 2 for a bad configuration."""
    options = _parse(arguments)
    _log_to_stderr()
    status = 0
    try:
        config = load(options.config, options.config_directory)
        if options.check:
            print(f"{options.config}: the configuration is valid.")
        else:
            _run_alone(config, options)
    except* ConfigError as group:
        _say(group)
        status = _EXIT_CONFIGURATION
    except* SessiondError as group:
        _say(group)
        status = status or _EXIT_FAILURE
    return status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sessiond", description="Serve resettable root file systems to user sessions."
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        default=DEFAULT_FILE,
        help="the configuration (default: %(default)s)",
    )
    parser.add_argument(
        "--config-directory",
        type=Path,
        metavar="DIRECTORY",
        help="more of it, *.toml (default: the file's name with .conf.d for .toml)",
    )
    parser.add_argument("--check", action="store_true", help="only check the configuration")
    parser.add_argument("--version", action="version", version=f"sessiond {sessiond.__version__}")
    return parser.parse_args(arguments)


def _say(group: BaseExceptionGroup[SessiondError]) -> None:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            _say(error)
        else:
            for sentence in str(error).splitlines():
                log.critical("%s", sentence)


# Before trio


def _run_alone(config: Config, options: argparse.Namespace) -> None:
    _require_machine()
    with _lock(config.daemon.runtime_directory):
        spawner = Spawner.start()
        try:
            trio.run(_run, config, options, spawner)
        finally:
            spawner.close()


def _require_machine() -> None:
    """Raise `Failed` where nothing could be mounted."""
    if os.geteuid() != 0:
        raise Failed(
            "sessiond mounts file systems, so it has to run as root; 'systemctl start sessiond' "
            "does that."
        )
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise Failed(
            f"/dev/fuse cannot be opened: {error.strerror}. Load the kernel module with 'modprobe "
            "fuse', and give this machine or container access to the device."
        ) from None


def _lock(runtime: Path) -> BinaryIO:
    """Keep a second daemon from unmounting what the first has mounted; closing ends that.

    Raises `Failed`.
    """
    try:
        runtime.mkdir(mode=0o711, parents=True, exist_ok=True)
        # For root alone: whoever can read it could lock it, and keep the daemon from starting.
        lock = os.open(runtime / "lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        file = open(lock, "wb")  # noqa: SIM115 -- the caller closes it
        try:
            # A lock of this process: unlike one by flock(2), no worker keeps it alive.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            file.close()
            raise
    except BlockingIOError:
        raise Failed(f"Another sessiond uses {runtime} already; stop that first.") from None
    except OSError as error:
        raise Failed(f"{runtime} cannot be used: {error.strerror}.") from error
    return file


# Within trio


async def _run(config: Config, options: argparse.Namespace, spawner: Spawner) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            wanted, reloads = trio.open_memory_channel[None](1)
            nursery.start_soon(_obey, signals, wanted, nursery.cancel_scope)
            mounter = FuseMounter(spawner)
            async with (
                open_manager(config, mounter, features=mounter.features) as manager,
                trio.open_nursery() as serving,
            ):
                await manager.start()
                await serving.start(serve, manager)
                _notify("READY=1")
                async for _ in reloads:
                    await _reload(manager, options)


async def _obey(
    signals: AsyncIterator[int],
    wanted: trio.MemorySendChannel[None],
    everything: trio.CancelScope,
) -> None:
    async for number in signals:
        if number == signal.SIGHUP:
            with suppress(trio.WouldBlock):  # a reload is about to begin anyway
                wanted.send_nowait(None)
        else:
            log.info("Ending, because of %s.", signal.Signals(number).name)
            _notify("STOPPING=1")
            everything.cancel()


async def _reload(manager: Manager, options: argparse.Namespace) -> None:
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    _notify(f"RELOADING=1\nMONOTONIC_USEC={now}")
    try:
        await manager.reload(load(options.config, options.config_directory))
    except ConfigError as error:
        log.error("%s The configuration is kept as it was.", error)  # noqa: TRY400
    else:
        log.info("The configuration is read again.")
    _notify("READY=1")


# systemd


def _notify(state: str) -> None:
    """Tell systemd; see sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
    except OSError as error:
        log.warning("systemd could not be told %s: %s", state.split("=")[0], error)


class _JournalFormatter(logging.Formatter):
    """Each line with its priority, as the journal reads it from stderr; see sd-daemon(3)."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return prefix + super().format(record).replace("\n", f"\n{prefix}")


def _log_to_stderr() -> None:
    stream = os.fstat(sys.stderr.fileno())
    to_journal = os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _JournalFormatter() if to_journal else logging.Formatter("sessiond: %(message)s")
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


if __name__ == "__main__":
    sys.exit(main())
