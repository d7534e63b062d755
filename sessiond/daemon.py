"""`sessiond`, the daemon: the only module that sees all the others, and puts them together."""

from __future__ import annotations

import argparse
import faulthandler
import fcntl
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import trio

import sessiond
from sessiond.bus.logind import LogindPresence
from sessiond.bus.service import serve
from sessiond.config import DEFAULT_FILE, Config, DaemonTable, load
from sessiond.errors import ConfigError, Failed, SessiondError
from sessiond.fuse.mounter import FuseMounter
from sessiond.fuse.spawner import Spawner
from sessiond.journal import log_to_journal_or_stderr
from sessiond.session.halting import Halting
from sessiond.session.logins import find_rule
from sessiond.session.manager import Manager, open_manager
from sessiond.session.metrics import Metrics, remove_metrics, write_metrics
from sessiond.session.model import Uid
from sessiond.session.surroundings import Surroundings
from sessiond.systemd import Systemd

log = logging.getLogger(__name__)

_EXIT_FAILURE = 1
_EXIT_CONFIGURATION = 2

_LEAVE = signal.SIGUSR1
"""Asks to end and leave the sessions to the next instance; the unit's RestartKillSignal=."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, _LEAVE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon; return its exit status: 0, 1 after a failure, 2 for a bad configuration."""
    options = _parser().parse_args(arguments)
    log_to_journal_or_stderr()
    # What hangs when the watchdog's SIGABRT comes, or what crashes, says where.
    faulthandler.enable()
    status = 0
    try:
        config = load(options.config, options.config_directory)
        if options.check:
            print(f"{options.config}: the configuration is valid.")
        elif options.otherwise is not None:
            print(_otherwise(config, options.otherwise))
        else:
            _run_alone(config, options)
    except* ConfigError as group:
        _say(group)
        status = _EXIT_CONFIGURATION
        if not options.check and options.otherwise is None:
            # Who is to correct it may be among those whom the daemon before this one has stopped.
            Halting(DaemonTable().runtime_directory).end_left()
    except* SessiondError as group:
        _say(group)
        status = status or _EXIT_FAILURE
    return status


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument(
        "--otherwise",
        type=int,
        metavar="UID",
        help="only print what a login without the daemon comes to: 'none' where it needs no "
        "session, 'refuse' or 'unprotected'",
    )
    parser.add_argument("--version", action="version", version=f"sessiond {sessiond.__version__}")
    return parser


def _otherwise(config: Config, uid: int) -> str:
    found = find_rule(config.login, Uid(uid))
    return "none" if found is None or found[2].profile is None else found[2].otherwise


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
        systemd = Systemd(os.environ)
        spawner = Spawner.start(systemd.descriptors.inherited.values())
        try:
            trio.run(_run, config, options, spawner, systemd)
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


async def _run(
    config: Config, options: argparse.Namespace, spawner: Spawner, systemd: Systemd
) -> None:
    with trio.open_signal_receiver(*_SIGNALS) as signals:
        sockets = config.daemon.runtime_directory.resolve() / "workers"
        mounter = FuseMounter(spawner, sockets, systemd.descriptors)
        # Whatever ends this other than a signal, the sessions are left as they are: neither a fault
        # here nor a bus that fails is a reason to end what people work in.
        async with (
            trio.open_nursery() as background,
            open_manager(
                config,
                mounter,
                surroundings=Surroundings(presence=LogindPresence()),
                features=mounter.features,
            ) as manager,
        ):
            background.start_soon(systemd.feed_watchdog)
            metrics = Metrics(manager)
            if config.daemon.metrics is not None:
                background.start_soon(write_metrics, metrics, config.daemon.metrics)
            number = await _serve(manager, metrics, signals, options, systemd)
            name, count = signal.Signals(number).name, len(manager.sessions)
            if number == _LEAVE:
                log.info("Ending, because of %s; %d sessions are left mounted.", name, count)
                systemd.stopping(f"Leaving {count} sessions to the next instance.")
                await manager.leave()
            else:
                log.info("Ending, because of %s, and with it %d sessions.", name, count)
                systemd.stopping(f"Ending {count} sessions.")
                await manager.shut_down()
            background.cancel_scope.cancel()
        if config.daemon.metrics is not None and number != _LEAVE:
            remove_metrics(config.daemon.metrics)


async def _serve(
    manager: Manager,
    metrics: Metrics,
    signals: AsyncIterator[int],
    options: argparse.Namespace,
    systemd: Systemd,
) -> int:
    """Serve until a signal asks for an end; return which."""
    async with trio.open_nursery() as serving:
        wanted, reloads = trio.open_memory_channel[None](1)
        serving.start_soon(_start, manager, metrics, reloads, options, systemd)
        async for number in signals:
            if number != signal.SIGHUP:
                serving.cancel_scope.cancel()
                return number
            with suppress(trio.WouldBlock):  # a reload is about to begin anyway
                wanted.send_nowait(None)
    raise AssertionError("the stream of signals has no end")


async def _start(
    manager: Manager,
    metrics: Metrics,
    reloads: AsyncIterator[None],
    options: argparse.Namespace,
    systemd: Systemd,
) -> None:
    async with trio.open_nursery() as nursery:
        await manager.start()
        await nursery.start(partial(serve, manager, answered=metrics.request_answered))
        systemd.ready(f"{len(manager.sessions)} sessions were mounted at start.")
        async for _ in reloads:
            systemd.reloading()
            systemd.ready(await _reload(manager, options))


async def _reload(manager: Manager, options: argparse.Namespace) -> str:
    """Read the configuration again; return what is to be said of that."""
    try:
        await manager.reload(load(options.config, options.config_directory))
    except ConfigError as error:
        log.error("%s The configuration is kept as it was.", error)  # noqa: TRY400
        return "The configuration has a mistake, and is kept as it was."
    log.info("The configuration is read again.")
    return "The configuration is read again."


if __name__ == "__main__":
    sys.exit(main())
