"""The command line of sessionctl."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sessiond import __version__
from sessiond.cli.exit_codes import ExitCode
from sessiond.config import DEFAULT_FILE

_EXIT_CODES = "exit codes:\n" + "\n".join(
    f"  {code.value:2}  {code.name.lower().replace('_', ' ')}" for code in ExitCode
)


class Arguments(argparse.Namespace):
    """What was asked for; each command sets those that it takes."""

    command: str
    json: bool = False
    session: str
    snapshot: str
    description: str | None
    name: str | None
    """New name of a snapshot."""
    pin: bool | None
    undo: bool
    start: str
    """Snapshot to compare with; empty for the image."""
    end: str
    """Snapshot to be compared; empty for the state now."""
    as_list: bool
    content: bool
    depth: int
    user: str
    profile: str
    id: str | None
    paths: list[str]
    rules: list[str]
    program: list[str]
    checked: str | None
    """The only session to be checked."""
    repair: bool
    config: Path
    state_directory: Path | None
    upper: Path | None
    work: Path | None
    lower: str | None
    userxattr: bool
    verify: bool


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
    if parsed.command == "check" and (wrong := _wrong_with_check(parsed)):
        parser.error(wrong)
    return parsed


def _wrong_with_check(parsed: Arguments) -> str | None:
    """Say what does not go together."""
    layers = (parsed.upper, parsed.work, parsed.lower)
    if any(one is not None for one in layers):
        if None in layers:
            return "--upper, --work and --lower go together"
        if parsed.checked is not None or parsed.state_directory is not None:
            return "with --upper, no session can be given and no state directory"
    elif parsed.userxattr:
        return "--userxattr goes with --upper"
    return None


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
    snapshot.add_argument("--pin", action="store_true", help="keep it, whatever the rules say")
    command("snapshots", "List the snapshots of a session", telling, one)
    restore = command("restore", "Go back to a snapshot; what is replaced is kept", one, named)
    restore.add_argument(
        "--no-undo", dest="undo", action="store_false", help="give up what is replaced"
    )
    edit = command("edit-snapshot", "Rename, describe, pin or release a snapshot", one, named)
    edit.add_argument("--name", metavar="NAME", help="a new name")
    edit.add_argument("--description", metavar="TEXT", help="a new description")
    edit.add_argument(
        "--pin",
        action=argparse.BooleanOptionalAction,
        help="keep it, whatever the rules say; or leave it to them again",
    )
    command("delete-snapshot", "Delete a snapshot", one, named)
    persist = command("persist", "Move a session to disk, so that it survives a reboot", one)
    persist.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not read back what was written",
    )
    commit = command("commit", "Save files and directories for later sessions of the user", one)
    commit.add_argument(
        "paths", metavar="PATH", nargs="+", help="absolute, as the session's programs see it"
    )
    keep = command("keep", "Set the rules for what outlives resets; for root", one)
    keep.add_argument("rules", metavar="RULE", nargs="*", help="path, or glob; none: nothing more")
    diff = command("diff", "List what differs from the image, or from a snapshot", telling, one)
    diff.add_argument(
        "--from",
        dest="start",
        default="",
        metavar="SNAPSHOT",
        help="compare with this, not the image",
    )
    diff.add_argument(
        "--to",
        dest="end",
        default="",
        metavar="SNAPSHOT",
        help="compare this, not the present state",
    )
    shown = diff.add_mutually_exclusive_group()
    shown.add_argument(
        "--list",
        dest="as_list",
        action="store_true",
        help="print a line for each path that differs",
    )
    shown.add_argument("--content", action="store_true", help="print how the text of files differs")
    shown.add_argument(
        "--depth",
        type=_levels,
        default=3,
        metavar="LEVELS",
        help="show directories down to this level (default: %(default)s)",
    )
    command("cancel", "Cancel the job that runs on a session", one)
    command("close", "Unmount a session and drop its changes", one)

    run = command("run", "Run a command in a session's root, as its user", one)
    run.usage = "sessionctl run [-h] SESSION -- COMMAND [ARGUMENT ...]"
    command("shell", "Start the user's shell in a session's root", one)
    _add_check(command("check", "Look for damage in sessions that are not in use", telling))
    command("monitor", "Print what happens to sessions, until interrupted", telling)
    return parser


def _levels(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("levels are a number, 1 or more")
    return int(text)


def _add_check(check: argparse.ArgumentParser) -> None:
    check.usage = (
        "sessionctl check [--repair] [--json] [--config FILE | --state-directory DIRECTORY] "
        "[SESSION]\n       sessionctl check [--repair] [--json] [--userxattr] "
        "--upper DIRECTORY --work DIRECTORY --lower DIRECTORY[:DIRECTORY...]"
    )
    check.add_argument("checked", metavar="SESSION", nargs="?", help="check only this one")
    check.add_argument("--repair", action="store_true", help="mend what can be without risk")
    where = check.add_mutually_exclusive_group()
    where.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        default=DEFAULT_FILE,
        help="the daemon's configuration, which says where sessions are (default: %(default)s)",
    )
    where.add_argument(
        "--state-directory",
        type=Path,
        metavar="DIRECTORY",
        help="check the persistent sessions in it, of another machine's disk for example",
    )
    layers = check.add_argument_group("an upper of any overlay instead of sessions")
    layers.add_argument("--upper", type=Path, metavar="DIRECTORY", help="the upper")
    layers.add_argument("--work", type=Path, metavar="DIRECTORY", help="its workdir")
    layers.add_argument(
        "--lower",
        metavar="DIRECTORY[:DIRECTORY...]",
        help="the lowers, as in overlayfs's option lowerdir=",
    )
    layers.add_argument(
        "--userxattr", action="store_true", help="it was written with the mount option userxattr"
    )
