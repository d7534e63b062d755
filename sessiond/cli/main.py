"""sessionctl: the command line of sessiond."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from io import TextIOWrapper
from typing import NoReturn

import trio

from sessiond.bus import client
from sessiond.bus.client import SessionInfo
from sessiond.cli.agent import password_agent
from sessiond.cli.arguments import Arguments, parse
from sessiond.cli.check import check
from sessiond.cli.commands import COMMANDS
from sessiond.cli.enter import COMMAND_NOT_EXECUTABLE, COMMAND_NOT_FOUND, Account, enter
from sessiond.cli.exit_codes import ExitCode, exit_code
from sessiond.cli.output import printable
from sessiond.cli.terminal import run_apart
from sessiond.cli.terms import SESSION_STATES
from sessiond.errors import Failed, NotAuthorized, SessiondError
from sessiond.words import _, translate_libraries

_LOOK_ONLY = frozenset({"list", "monitor", "snapshots", "status", "top", "wait"})
"""Commands for which nobody has to give a password."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what `arguments`, by default the command line, ask for; return the exit code."""
    if isinstance(sys.stdout, TextIOWrapper):
        # What the locale's encoding does not have is escaped, as what a terminal would act on is.
        sys.stdout.reconfigure(errors="backslashreplace")
    translate_libraries()
    asked = parse(arguments)
    try:
        if asked.command in ("run", "shell"):
            return _run_inside(asked)
        if asked.command == "check":
            return check(asked)
        with nullcontext() if asked.command in _LOOK_ONLY else password_agent():
            code = trio.run(_command, asked)
        sys.stdout.flush()
    except SessiondError as error:
        return _report(error)
    except BrokenPipeError:
        # The reader of the output, such as head(1), has seen enough. Nothing is left to be flushed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return code or ExitCode.OK


async def _command(asked: Arguments) -> int | None:
    async with client.connect(interactive=asked.command not in _LOOK_ONLY) as sessiond:
        return await COMMANDS[asked.command](sessiond, asked)


def _run_inside(asked: Arguments) -> int:
    if os.geteuid() != 0:
        raise NotAuthorized(_("Entering a session's root takes root: use sudo or su."))
    info = trio.run(_look_up, asked.session)
    if info.state not in ("active", "busy"):
        sentence = _("Session {id} cannot be entered, it is {state}.")
        sentence = sentence.format(id=info.id, state=SESSION_STATES[info.state])
        raise Failed(f"{sentence} {info.failure}")
    account = Account.of(info.uid)
    if asked.command == "shell":
        program, arguments = account.shell, [f"-{os.path.basename(account.shell)}"]
    else:
        program, arguments = asked.program[0], asked.program

    def child() -> NoReturn:
        code: int = ExitCode.FAILED
        try:
            enter(info.mount_point, account, program, arguments)
        except SessiondError as error:
            code = _report(error)
        except OSError as error:
            sentence = _("{program} cannot be run in the session: {reason}.")
            _complain(sentence.format(program=program, reason=error.strerror))
            missing = isinstance(error, FileNotFoundError)
            code = COMMAND_NOT_FOUND if missing else COMMAND_NOT_EXECUTABLE
        except BaseException:  # the fork must never go on as a second sessionctl
            traceback.print_exc()
        finally:
            os._exit(code)

    return run_apart(child, terminal_owner=account.uid)


async def _look_up(session: str) -> SessionInfo:
    async with client.connect() as sessiond:
        return await (await sessiond.session(session)).info()


def _report(error: SessiondError) -> ExitCode:
    _complain(str(error))
    return exit_code(error)


def _complain(sentence: str) -> None:
    print(f"sessionctl: {printable(sentence)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
