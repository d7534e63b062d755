"""The command line of sessionctl."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from datetime import datetime, time, timedelta
from pathlib import Path

from sessiond import __version__
from sessiond.cli.exit_codes import ExitCode
from sessiond.cli.output import broken
from sessiond.cli.terms import exit_code_meaning
from sessiond.config import DEFAULT_FILE, DURATION, seconds
from sessiond.words import _


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
    depth: int | None
    directories: int | None
    file: Path
    format: str | None
    """Of an archive."""
    user: str
    profile: str
    id: str | None
    paths: list[str]
    kept: list[str]
    """Paths that a reset leaves as they are."""
    delete: bool
    rules: list[str]
    program: list[str]
    step: str
    """Of a maintenance, or what is to be done about guests."""
    guest: str | None
    maintained: str | None
    """The profile whose image that is about."""
    message: str
    conflicts: str | None
    remount: bool
    terminate: bool
    grace: int
    snapshot_first: bool
    snapshot_as: str | None
    at: datetime | None
    in_: float | None
    idle: float | None
    warning: float | None
    why: str
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
    if parsed.command not in ("run", "inhibit"):
        unknown += program
    elif unknown or not program:
        usage = f"sessionctl {parsed.command} SESSION -- COMMAND"
        parser.error(_("write '--' before the command: {usage}").format(usage=usage))
    if unknown:
        parser.error(_("unrecognized arguments: {arguments}").format(arguments=" ".join(unknown)))
    if parsed.command == "maintenance" and (parsed.step == "begin") is (parsed.maintained is None):
        parser.error(_("a profile is given to 'maintenance begin', and only to that"))
    if parsed.command == "guest" and (parsed.step == "remove") is (parsed.guest is None):
        parser.error(_("a name is given to 'guest remove', and only to that"))
    if parsed.command == "diff" and parsed.depth and (parsed.as_list or parsed.content):
        parser.error(_("--depth is for directories: it does not go with --list and --content"))
    if parsed.command == "check" and (wrong := _wrong_with_check(parsed)):
        parser.error(wrong)
    return parsed


def _wrong_with_check(parsed: Arguments) -> str | None:
    """Say what does not go together."""
    layers = (parsed.upper, parsed.work, parsed.lower)
    if any(one is not None for one in layers):
        if None in layers:
            return _("--upper, --work and --lower go together")
        if parsed.checked is not None or parsed.state_directory is not None:
            return _("with --upper, no session can be given and no state directory")
    elif parsed.userxattr:
        return _("--userxattr goes with --upper")
    return None


def _moment(text: str) -> datetime:
    """Return a time as the machine's time zone has it; one without a date is the next such."""
    now = datetime.now().astimezone()
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        at = datetime.combine(now.date(), time.fromisoformat(text)).astimezone()
        return at if at > now else at + timedelta(days=1)


def _duration(text: str) -> float:
    if not re.fullmatch(DURATION, text):
        raise argparse.ArgumentTypeError(
            _("{text} is no duration like 90s, 10min, 2h or 1d").format(text=repr(text))
        )
    return seconds(text)


class _Formatter(argparse.HelpFormatter):
    """Breaks lines by the columns that characters take: those of some languages are wide."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return broken(" ".join(text.split()), width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()  # what is below the options is a table
        return "\n".join(indent + part for line in lines for part in broken(line, width))


def _exit_codes() -> str:
    lines = (f"  {code.value:2}  {exit_code_meaning(code)}" for code in ExitCode)
    return "\n".join([_("exit codes:"), *lines])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sessionctl",
        description=_("Look at, reset, snapshot, restore and persist the sessions of sessiond."),
        epilog=_exit_codes(),
        formatter_class=_Formatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        help=_("show the version and exit"),
        version=f"sessionctl {__version__}",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    # Those that tell something take --json; of the others, the exit code says all.
    telling = argparse.ArgumentParser(add_help=False)
    telling.add_argument("--json", action="store_true", help=_("print JSON, for programs"))
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("session", metavar="SESSION", help=_("id of the session"))
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("snapshot", metavar="SNAPSHOT", help=_("name of the snapshot"))

    def command(name: str, says: str, *takes: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sentence = _("{statement}.").format(statement=says)
        return commands.add_parser(
            name, help=says, description=sentence, parents=takes, formatter_class=_Formatter
        )

    command("list", _("List all sessions"), telling)
    command("status", _("Show all about one session"), telling, one)

    create = command("create", _("Make a session and mount it"), telling)
    create.add_argument("user", metavar="USER", help=_("name of the user that it belongs to"))
    create.add_argument("profile", metavar="PROFILE", help=_("profile from the configuration"))
    create.add_argument(
        "--id", help=_("id of the new session; made from the user's name if not given")
    )

    switch = argparse.ArgumentParser(add_help=False)
    switch.add_argument(
        "--terminate", action="store_true", help=_("end the programs that use the session first")
    )
    switch.add_argument(
        "--grace",
        type=int,
        default=10,
        metavar="SECONDS",
        help=_(
            "with --terminate: how long they have, before they are killed (default: %(default)s)"
        ),
    )
    switch.add_argument(
        "--snapshot-first",
        action="store_true",
        help=_("keep what there is, under a name of its time"),
    )
    switch.add_argument("--snapshot-as", metavar="NAME", help=_("the same, under this name"))

    partly = argparse.ArgumentParser(add_help=False)
    partly.add_argument(
        "--keep",
        dest="kept",
        action="append",
        default=[],
        metavar="PATH",
        help=_("leave what is at this path as it is; can be given several times"),
    )
    command("reset", _("Drop all changes: the session shows its image again"), one, switch, partly)
    schedule = command(
        "schedule-reset", _("Have a session reset at another time"), one, switch, partly
    )
    times = schedule.add_mutually_exclusive_group(required=True)
    times.add_argument(
        "--at", type=_moment, metavar="TIME", help=_("like 18:30 or 2026-01-31T18:30")
    )
    times.add_argument("--in", dest="in_", type=_duration, metavar="TIME", help=_("like 90s or 2h"))
    times.add_argument(
        "--idle", type=_duration, metavar="TIME", help=_("once its user has not been there so long")
    )
    schedule.add_argument(
        "--warning", type=_duration, metavar="TIME", help=_("announce it so long before")
    )
    command("cancel-reset", _("Cancel a reset that was scheduled"), one)
    inhibit = command("inhibit", _("Hold back scheduled resets while a command runs"), one)
    inhibit.usage = "sessionctl inhibit [-h] [--why TEXT] SESSION -- COMMAND [ARGUMENT ...]"
    inhibit.add_argument("--why", default="", metavar="TEXT", help=_("shown to others"))

    command("conflicts", _("List the programs that use a session"), telling, one)
    snapshot = command("snapshot", _("Keep the present state of a session"), telling, one, named)
    snapshot.add_argument(
        "--description", default="", metavar="TEXT", help=_("what it is good for")
    )
    snapshot.add_argument("--pin", action="store_true", help=_("keep it, whatever the rules say"))
    command("snapshots", _("List the snapshots of a session"), telling, one)
    restore = command(
        "restore", _("Go back to a snapshot; what is replaced is kept"), one, named, switch
    )
    restore.add_argument(
        "--no-undo", dest="undo", action="store_false", help=_("give up what is replaced")
    )
    edit = command("edit-snapshot", _("Rename, describe, pin or release a snapshot"), one, named)
    edit.add_argument("--name", metavar="NAME", help=_("a new name"))
    edit.add_argument("--description", metavar="TEXT", help=_("a new description"))
    edit.add_argument(
        "--pin",
        action=argparse.BooleanOptionalAction,
        help=_("keep it, whatever the rules say; or leave it to them again"),
    )
    command("delete-snapshot", _("Delete a snapshot"), one, named)
    archive = argparse.ArgumentParser(add_help=False)
    archive.add_argument("file", metavar="FILE", type=Path, help=_("a file, or - for a pipe"))
    export = command(
        "export",
        _("Write a snapshot to a file: an OCI layer (tar), or a squashfs"),
        one,
        named,
        archive,
    )
    export.add_argument(
        "--format",
        choices=("oci", "squashfs"),
        help=_("of the file; if not given, squashfs if its name ends so, else oci"),
    )
    add = command("import", _("Make a snapshot of such a file"), one, named, archive)
    add.add_argument("--description", default="", metavar="TEXT", help=_("what it is good for"))
    persist = command("persist", _("Move a session to disk, so that it survives a reboot"), one)
    persist.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help=_("do not read back what was written"),
    )
    rebase = command("rebase", _("Put a session over the image that there is now"), one)
    rebase.add_argument(
        "--conflicts",
        choices=("keep", "drop", "save"),
        help=_(
            "keep what both have changed as the session has it, drop that, or save it beside the "
            "image's (as its profile says if not given)"
        ),
    )
    rebase.add_argument(
        "--remount",
        action="store_true",
        help=_("also if it is in use: programs lose what they have open in it"),
    )
    command("shadowed", _("List what both a session and its image have changed"), telling, one)
    commit = command("commit", _("Save files and directories for later sessions of the user"), one)
    commit.add_argument(
        "paths", metavar="PATH", nargs="+", help=_("absolute, as the session's programs see it")
    )
    uncommit = command(
        "uncommit", _("Have committed files be the image's after the next reset"), one
    )
    uncommit.add_argument("paths", metavar="PATH", nargs="+", help=_("as they were committed"))
    uncommit.add_argument(
        "--delete", action="store_true", help=_("delete what is kept there, at the next reset")
    )
    command("committed", _("List what was committed, with sizes"), telling, one)
    keep = command("keep", _("Set the rules for what outlives resets; for root"), one)
    keep.add_argument(
        "rules", metavar="RULE", nargs="*", help=_("path, or glob; none: nothing more")
    )
    diff = command("diff", _("List what differs from the image, or from a snapshot"), telling, one)
    diff.add_argument(
        "--from",
        dest="start",
        default="",
        metavar="SNAPSHOT",
        help=_("compare with this, not the image"),
    )
    diff.add_argument(
        "--to",
        dest="end",
        default="",
        metavar="SNAPSHOT",
        help=_("compare this, not the present state"),
    )
    shown = diff.add_mutually_exclusive_group()
    shown.add_argument(
        "--list",
        dest="as_list",
        action="store_true",
        help=_("print a line for each path that differs"),
    )
    shown.add_argument(
        "--content", action="store_true", help=_("print how the text of files differs")
    )
    shown.add_argument(
        "--directories",
        type=_directories,
        metavar="COUNT",
        help=_("print in which directories most has changed, that many, at most 100"),
    )
    diff.add_argument(
        "--depth",
        type=_levels,
        metavar="LEVELS",
        help=_("show directories down to this level (default: 3; all with --directories)"),
    )
    command("wait", _("Wait until a session is mounted, and nothing is being done to it"), one)
    command("cancel", _("Cancel the job that runs on a session"), one)
    command("close", _("Unmount a session and drop its changes"), one)

    maintenance = command("maintenance", _("Make a new image in a session of root's"), telling)
    maintenance.usage = (
        "sessionctl maintenance begin [--message TEXT] [--id ID] [--json] PROFILE\n"
        "       sessionctl maintenance finish|cancel|status [--json]"
    )
    maintenance.add_argument("step", choices=("begin", "finish", "cancel", "status"))
    maintenance.add_argument(
        "maintained", metavar="PROFILE", nargs="?", help=_("the profile whose image it is about")
    )
    maintenance.add_argument(
        "--message", default="", metavar="TEXT", help=_("what sessions are told, and who wants one")
    )
    maintenance.add_argument("--id", help=_("id of the session"))

    guest = command("guest", _("Make or remove a user without a password, or list them"), telling)
    guest.usage = "sessionctl guest add|list [--json]\n       sessionctl guest remove [--json] NAME"
    guest.add_argument("step", choices=("add", "remove", "list"))
    guest.add_argument("guest", metavar="NAME", nargs="?", help=_("the guest that is to go"))

    run = command("run", _("Run a command in a session's root, as its user"), one)
    run.usage = "sessionctl run [-h] SESSION -- COMMAND [ARGUMENT ...]"
    command("shell", _("Start the user's shell in a session's root"), one)
    _add_check(command("check", _("Look for damage in sessions that are not in use"), telling))
    command("monitor", _("Print what happens to sessions, until interrupted"), telling)
    command("top", _("Show the sessions and how full they are, live"))
    return parser


def _levels(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(_("levels are a number, 1 or more"))
    return int(text)


def _directories(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(_("a number from 1 to 100 is needed"))
    return int(text)


def _add_check(check: argparse.ArgumentParser) -> None:
    check.usage = (
        "sessionctl check [--repair] [--json] [--config FILE | --state-directory DIRECTORY] "
        "[SESSION]\n       sessionctl check [--repair] [--json] [--userxattr] "
        "--upper DIRECTORY --work DIRECTORY --lower DIRECTORY[:DIRECTORY...]"
    )
    check.add_argument("checked", metavar="SESSION", nargs="?", help=_("check only this one"))
    check.add_argument("--repair", action="store_true", help=_("mend what can be without risk"))
    where = check.add_mutually_exclusive_group()
    where.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        default=DEFAULT_FILE,
        help=_("the daemon's configuration, which says where sessions are (default: %(default)s)"),
    )
    where.add_argument(
        "--state-directory",
        type=Path,
        metavar="DIRECTORY",
        help=_("check the persistent sessions in it, of another machine's disk for example"),
    )
    layers = check.add_argument_group(_("an upper of any overlay instead of sessions"))
    layers.add_argument("--upper", type=Path, metavar="DIRECTORY", help=_("the upper"))
    layers.add_argument("--work", type=Path, metavar="DIRECTORY", help=_("its workdir"))
    layers.add_argument(
        "--lower",
        metavar="DIRECTORY[:DIRECTORY...]",
        help=_("the lowers, as in overlayfs's option lowerdir="),
    )
    layers.add_argument(
        "--userxattr", action="store_true", help=_("it was written with the mount option userxattr")
    )
