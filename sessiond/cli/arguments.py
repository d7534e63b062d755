"""The command line of sessionctl."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sessiond import __version__
from sessiond.cli.exit_codes import ExitCode

_EXIT_CODES = "exit codes:\n" + "\n".join(
    f"  {code.value:2}  {code.name.lower().replace('_', ' ')}" for code in ExitCode
)


class Arguments(argparse.Namespace):
    """What was asked for; each command sets those that it takes."""

    command: str
    json: bool = False
    session: str
    snapshot: str
    description: str
    user: str
    profile: str
    id: str | None
    program: list[str]


def parse(arguments: Sequence[str] | None) -> Arguments:
    """Return the parsed command line; exits with code 2 and a hint when it is malformed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What follows the first "--" is another program's: argparse would take a second "--" out of it.
    own, program = given, []
    if "--" in given:
        split = given.index("--")
        own, program = given[:split], given[split + 1 :]
    parser = _parser()
    parsed, unknown = parser.parse_known_args(own, namespace=Arguments(program=program))
    if parsed.command != "run":
        unknown += program
    elif unknown or not program:
        parser.error("write '--' before the command: sessionctl run SESSION -- COMMAND")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sessionctl",
        description="Look at, reset, snapshot, restore and persist the sessions of sessiond.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sessionctl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    # Those that tell something take --json; of the others, the exit code says all.
    telling = argparse.ArgumentParser(add_help=False)
    telling.add_argument("--json", action="store_true", help="print JSON, for programs")
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("session", metavar="SESSION", help="id of the session")
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("snapshot", metavar="SNAPSHOT", help="name of the snapshot")

    def command(name: str, says: str, *takes: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=says, description=f"{says}.", parents=takes)

    command("list", "List all sessions", telling)
    command("status", "Show all about one session", telling, one)

    create = command("create", "Make a session and mount it", telling)
    create.add_argument("user", metavar="USER", help="name of the user that it belongs to")
    create.add_argument("profile", metavar="PROFILE", help="profile from the configuration")
    create.add_argument(
        "--id", help="id of the new session; made from the user's name if not given"
    )

    command("reset", "Drop all changes: the session shows its image again", one)
    snapshot = command("snapshot", "Keep the present state of a session", telling, one, named)
    snapshot.add_argument("--description", default="", metavar="TEXT", help="what it is good for")
    command("snapshots", "List the snapshots of a session", telling, one)
    command("restore", "Go back to a snapshot", one, named)
    command("delete-snapshot", "Delete a snapshot", one, named)
    command("persist", "Move a session to disk, so that it survives a reboot", one)
    command("diff", "List what differs from the image", telling, one)
    command("close", "Unmount a session and drop its changes", one)

    run = command("run", "Run a command in a session's root, as its user", one)
    run.usage = "sessionctl run [-h] SESSION -- COMMAND [ARGUMENT ...]"
    command("shell", "Start the user's shell in a session's root", one)
    command("monitor", "Print what happens to sessions, until interrupted", telling)
    return parser
