"""The commands of sessionctl that speak to the daemon; each prints what it has to tell."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial

import trio

from sessiond.bus.client import (
    ArchiveKind,
    ChangeSummary,
    Client,
    Event,
    JobInfo,
    PendingFile,
    Session,
    SessionInfo,
    SnapshotInfo,
)
from sessiond.cli import differences
from sessiond.cli.archives import read_archive, write_archive
from sessiond.cli.arguments import Arguments
from sessiond.cli.output import (
    Json,
    padded,
    print_facts,
    print_json,
    print_line,
    print_table,
    size,
    used_of,
    when,
)
from sessiond.cli.progress import carry_out
from sessiond.cli.terms import (
    FILE_TYPES,
    JOB_STATES,
    OPERATIONS,
    OUTCOMES,
    RESET_REASONS,
    SESSION_STATES,
    SPACE_LEVELS,
    STORAGES,
)
from sessiond.cli.top import show_sessions
from sessiond.errors import AuthorizationRequired, Failed, NotAuthorized
from sessiond.words import _, ngettext

Command = Callable[[Client, Arguments], Awaitable[int | None]]
"""Returns the exit code, if that is not for failures alone to say."""


async def list_sessions(client: Client, asked: Arguments) -> None:
    """Print all sessions."""
    sessions = await client.sessions()
    if asked.json:
        print_json([_session_json(session) for session in sessions])
        return
    print_table(
        (
            _("ID"),
            _("USER"),
            _("PROFILE"),
            _("STORAGE"),
            _("STATE"),
            _("USED"),
            _("MOUNT POINT"),
        ),
        [
            (
                s.id,
                s.user,
                s.profile,
                STORAGES[s.storage],
                SESSION_STATES[s.state],
                _used(s),
                s.mount_point,
            )
            for s in sessions
        ],
    )


async def status(client: Client, asked: Arguments) -> None:
    """Print all about one session; how it differs from its image only to those who may ask."""
    session = await client.session(asked.session)
    info = await session.info()
    snapshots = await session.snapshots()
    job = await session.last_job()
    changes = None
    pending: list[PendingFile] = []
    if info.state != "failed":  # then it is not mounted
        with suppress(NotAuthorized, AuthorizationRequired):
            changes = await session.changes(interactive=False)
            if info.pending:
                pending = await session.pending_files(interactive=False)
    if asked.json:
        told = _session_json(info)
        told["last_job"] = None if job is None else _job_json(job)
        told["snapshots"] = [_snapshot_json(snapshot) for snapshot in snapshots]
        told["pending_files"] = [dataclasses.asdict(file) for file in pending]
        told["changes"] = None if changes is None else _changes_json(changes)
        print_json(told)
        return
    print_facts(_facts(info, snapshots, job, changes, pending))


def _facts(
    info: SessionInfo,
    snapshots: Sequence[SnapshotInfo],
    job: JobInfo | None,
    changes: ChangeSummary | None,
    pending: Sequence[PendingFile],
) -> list[tuple[str, str]]:
    state = SESSION_STATES[info.state]
    level = f", {SPACE_LEVELS[info.space_level]}" if info.space_level != "normal" else ""
    facts = [
        (_("Session"), info.id),
        (_("User"), f"{info.user} ({info.uid})"),
        (_("Profile"), info.profile),
        (_("Image"), info.image),
        (_("Mount point"), info.mount_point),
        (_("Storage"), STORAGES[info.storage]),
        (_("State"), f"{state}: {info.failure}" if info.failure else state),
        (_("Used"), _used(info) + level),
        (_("Inodes"), _inodes(info)),
        (_("Created"), when(info.created_at)),
        (_("Last reset"), when(info.last_reset)),
        (_("Kept"), ", ".join(info.keep) or _("nothing")),
        (_("Snapshots"), ", ".join(snapshot.name for snapshot in snapshots) or _("none")),
    ]
    if info.next_reset_reason:
        reason = RESET_REASONS[info.next_reset_reason]
        facts.append((_("Next reset"), f"{when(info.next_reset)} ({reason})"))
    facts += [(_("Held back by"), f"{one.who}: {one.why}") for one in info.inhibitors]
    if job is not None:
        outcome = JOB_STATES[job.state]
        if job.error_message:
            outcome += f": {job.error_message}"
        facts.append((_("Last job"), f"{OPERATIONS[job.operation]} {outcome}"))
    if info.pending:
        told = ngettext(
            "what is written to {number} file that is open",
            "what is written to {number} files that are open",
            info.pending,
        )
        facts.append((_("In RAM still"), told.format(number=info.pending)))
    facts += [("", _pending_line(file)) for file in pending]
    if changes is not None:
        facts.append((_("Changes"), differences.counts(changes)))
    return facts


def _inodes(info: SessionInfo) -> str:
    if not info.inodes_limit:
        return str(info.inodes_used)
    return _("{used} of {limit}").format(used=info.inodes_used, limit=info.inodes_limit)


async def create(client: Client, asked: Arguments) -> None:
    """Make a session."""
    session = await client.create(asked.user, asked.profile, session_id=asked.id)
    info = await session.info()
    if asked.json:
        print_json(_session_json(info))
    else:
        sentence = _("Session {id} of {user} is mounted at {mount_point}.")
        print_line(sentence.format(id=info.id, user=info.user, mount_point=info.mount_point))


async def reset(client: Client, asked: Arguments) -> None:
    """Drop all changes of a session."""
    session = await client.session(asked.session)
    started = session.reset(**_manner(asked), **_kept(asked))
    await carry_out(started, _("Resetting {session}").format(session=asked.session))
    await _print_ended(session, asked)


async def schedule_reset(client: Client, asked: Arguments) -> None:
    """Have a session reset at another time."""
    session = await client.session(asked.session)
    times = {"in_": asked.in_, "idle": asked.idle, "warning": asked.warning}
    given = {name: value for name, value in times.items() if value is not None}
    await session.schedule_reset(asked.at, **given, **_manner(asked), **_kept(asked))


async def cancel_reset(client: Client, asked: Arguments) -> None:
    """Cancel what was scheduled."""
    session = await client.session(asked.session)
    await session.cancel_scheduled_reset()


async def inhibit(client: Client, asked: Arguments) -> int:
    """Hold back scheduled resets while a command runs; end as it does."""
    session = await client.session(asked.session)
    async with session.inhibit(asked.program[0], asked.why):
        try:
            done = await trio.run_process(asked.program, check=False, stdin=None)
        except OSError as error:
            sentence = _("{program} cannot be run: {reason}.")
            raise Failed(
                sentence.format(program=asked.program[0], reason=error.strerror)
            ) from error
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


async def conflicts(client: Client, asked: Arguments) -> None:
    """Print the programs that use a session."""
    session = await client.session(asked.session)
    programs = await session.conflicts()
    if asked.json:
        print_json([one._asdict() for one in programs])
        return
    rows = [(one.name, " ".join(map(str, one.pids)), str(one.uid), one.unit) for one in programs]
    print_table((_("PROGRAM"), _("PIDS"), _("UID"), _("UNIT")), rows)


async def snapshot(client: Client, asked: Arguments) -> None:
    """Keep the present state of a session."""
    session = await client.session(asked.session)
    taken = await session.snapshot(
        asked.snapshot, description=asked.description or "", pinned=bool(asked.pin)
    )
    if asked.json:
        print_json(_snapshot_json(await taken.info()))


async def snapshots(client: Client, asked: Arguments) -> None:
    """Print the snapshots of a session."""
    session = await client.session(asked.session)
    found = await session.snapshots()
    if asked.json:
        print_json([_snapshot_json(one) for one in found])
        return
    rows = [
        (
            one.name,
            when(one.created_at),
            size(one.size) if one.size_valid else _("counting"),
            size(one.exclusive) if one.size_valid else "",
            _kind(one),
            one.description,
        )
        for one in found
    ]
    print_table(
        (_("NAME"), _("CREATED"), _("SIZE"), _("GIVES BACK"), _("KIND"), _("DESCRIPTION")), rows
    )


def _kind(snapshot: SnapshotInfo) -> str:
    kinds = ((_("automatic"), snapshot.automatic), (_("pinned"), snapshot.pinned))
    return ", ".join(kind for kind, is_so in kinds if is_so)


async def edit_snapshot(client: Client, asked: Arguments) -> None:
    """Change what is noted of a snapshot; the name last, by which it is found."""
    snapshot = (await client.session(asked.session)).snapshot_named(asked.snapshot)
    if asked.description is not None:
        await snapshot.describe(asked.description)
    if asked.pin is not None:
        await snapshot.pin(asked.pin)
    if asked.name is not None:
        await snapshot.rename(asked.name)


async def restore(client: Client, asked: Arguments) -> None:
    """Bring a session back to a snapshot."""
    session = await client.session(asked.session)
    title = _("Restoring {session} to {snapshot}").format(
        session=asked.session, snapshot=asked.snapshot
    )
    await carry_out(session.restore(asked.snapshot, undo=asked.undo, **_manner(asked)), title)
    await _print_ended(session, asked)


async def delete_snapshot(client: Client, asked: Arguments) -> None:
    """Delete a snapshot."""
    session = await client.session(asked.session)
    await session.snapshot_named(asked.snapshot).delete()


async def export(client: Client, asked: Arguments) -> None:
    """Write a snapshot to a file."""
    session = await client.session(asked.session)
    title = _("Exporting {snapshot} of {session}").format(
        snapshot=asked.snapshot, session=asked.session
    )
    kind = ArchiveKind.SQUASHFS if asked.file.suffix == ".squashfs" else ArchiveKind.OCI
    if asked.format is not None:
        kind = ArchiveKind(asked.format)
    export_to = partial(session.snapshot_named(asked.snapshot).export, kind=kind)
    await write_archive(export_to, asked.file, title)


async def import_snapshot(client: Client, asked: Arguments) -> None:
    """Make a snapshot of a file."""
    session = await client.session(asked.session)
    title = _("Importing {snapshot} into {session}").format(
        snapshot=asked.snapshot, session=asked.session
    )
    add = partial(session.import_snapshot, asked.snapshot, description=asked.description or "")
    await read_archive(add, asked.file, title)


async def wait(client: Client, asked: Arguments) -> None:
    """Wait until a session is mounted, and nothing is being done to it."""
    session = await client.session(asked.session)
    await session.wait()


async def persist(client: Client, asked: Arguments) -> None:
    """Move a session to disk."""
    session = await client.session(asked.session)
    title = _("Moving {session} to disk").format(session=asked.session)
    await carry_out(session.persist(verify=asked.verify), title)
    if not (await session.info()).pending:
        return
    print_line(
        _(
            "All is on disk but what programs write to these files, which follows every few "
            "seconds, and when they are closed:"
        )
    )
    for file in await session.pending_files():
        print_line(_pending_line(file))


async def cancel(client: Client, asked: Arguments) -> None:
    """Cancel what is being done to a session."""
    session = await client.session(asked.session)
    await session.cancel()


async def maintenance(client: Client, asked: Arguments) -> None:
    """Begin or end the maintenance of an image, or print whether there is one."""
    match asked.step:
        case "begin":
            assert asked.maintained is not None
            session = await client.begin_maintenance(
                asked.maintained, asked.message, session_id=asked.id
            )
            info = await session.info()
            if asked.json:
                print_json(_session_json(info))
            else:
                sentence = _(
                    "Session {id} is mounted at {mount_point}; no others are made until "
                    "'sessionctl maintenance finish' or 'cancel'."
                )
                print_line(sentence.format(id=info.id, mount_point=info.mount_point))
        case "finish":
            await carry_out(client.finish_maintenance(), _("Making the new image"))
        case "cancel":
            await client.cancel_maintenance()
        case _:
            await _maintenance_status(client, asked)


async def _maintenance_status(client: Client, asked: Arguments) -> None:
    info = await client.info()
    if asked.json:
        told = {
            "profile": info.maintenance,
            "session": info.maintenance_session,
            "message": info.maintenance_message,
        }
        print_json(told if info.maintenance else None)
    elif info.maintenance:
        print_facts(
            [
                (_("Profile"), info.maintenance),
                (_("Session"), info.maintenance_session),
                (_("Message"), info.maintenance_message),
            ]
        )
    else:
        print_line(_("No maintenance is going on."))


async def guest(client: Client, asked: Arguments) -> None:
    """Make or remove a guest, or print who is one."""
    match asked.step:
        case "add":
            name, uid = await client.create_guest()
            if asked.json:
                print_json({"name": name, "uid": uid})
            else:
                print_line(name)  # alone: scripts read it
        case "remove":
            assert asked.guest is not None
            await client.remove_guest(asked.guest)
        case _:
            guests = (await client.info()).guests
            if asked.json:
                print_json(list(guests))
            else:
                for name in guests:
                    print_line(name)


async def rebase(client: Client, asked: Arguments) -> None:
    """Put a session over another image."""
    session = await client.session(asked.session)
    started = session.rebase(conflicts=asked.conflicts, remount=asked.remount)
    await carry_out(started, _("Rebasing {session}").format(session=asked.session))


async def shadowed(client: Client, asked: Arguments) -> None:
    """Print what both a session and its image have changed, and what became or becomes of it."""
    session = await client.session(asked.session)
    async with session.shadowed() as files:
        async for one in files:
            if asked.json:
                print_json(dataclasses.asdict(one))
                continue
            where = [*([_("now")] if one.now else []), *one.snapshots]
            path = one.path
            if one.saved_as:
                path = _("{path} as {saved_as}").format(path=one.path, saved_as=one.saved_as)
            outcome = padded(OUTCOMES[one.outcome], OUTCOMES.width)
            kind = padded(FILE_TYPES[one.type], FILE_TYPES.width)
            print_line(f"{outcome}  {kind}  {path}  ({', '.join(where)})")


async def commit(client: Client, asked: Arguments) -> None:
    """Save files and directories of a session for later ones."""
    session = await client.session(asked.session)
    title = _("Committing files of {session}").format(session=asked.session)
    await carry_out(session.commit(asked.paths), title)


async def uncommit(client: Client, asked: Arguments) -> None:
    """Take commits back."""
    session = await client.session(asked.session)
    await session.uncommit(asked.paths, delete=asked.delete)


async def committed(client: Client, asked: Arguments) -> None:
    """Print what was committed."""
    session = await client.session(asked.session)
    files = await session.committed()
    if asked.json:
        print_json([dataclasses.asdict(file) for file in files])
    else:
        print_table((_("PATH"), _("SIZE")), [(file.path, size(file.bytes)) for file in files])


async def keep(client: Client, asked: Arguments) -> None:
    """Set the rules for what outlives resets."""
    session = await client.session(asked.session)
    await session.set_keep(asked.rules)


async def close(client: Client, asked: Arguments) -> None:
    """End a session."""
    session = await client.session(asked.session)
    await session.close()


async def diff(client: Client, asked: Arguments) -> None:
    """Print how a session differs."""
    session = await client.session(asked.session)
    if asked.directories is not None:
        depth = differences.ALL_LEVELS if asked.depth is None else asked.depth
        changes = await session.changes(
            start=asked.start, end=asked.end, directories=asked.directories, depth=depth
        )
        differences.print_directories(changes, as_json=asked.json)
        return
    async with session.diff(start=asked.start, end=asked.end, content=asked.content) as found:
        if asked.json:
            await differences.print_as_json(found)
        elif asked.content:
            await differences.print_content(found)
        elif asked.as_list:
            await differences.print_list(found)
        else:
            await differences.print_tree(
                found, differences.LEVELS if asked.depth is None else asked.depth
            )


async def monitor(client: Client, asked: Arguments) -> None:
    """Print what happens, until interrupted or the daemon ends."""
    async with client.events() as events:
        async for event in events:
            now = datetime.now().astimezone()
            if asked.json:
                print_json(_event_json(event, now))
            else:
                print_line(f"{now:%H:%M:%S}  {event.session or '-'}  {_event_line(event)}")
            sys.stdout.flush()  # into a pipe too, each event is told when it happens


async def top(client: Client, asked: Arguments) -> int | None:
    """Show the sessions, live."""
    return await show_sessions(client)


COMMANDS: dict[str, Command] = {
    "list": list_sessions,
    "status": status,
    "create": create,
    "reset": reset,
    "schedule-reset": schedule_reset,
    "cancel-reset": cancel_reset,
    "inhibit": inhibit,
    "conflicts": conflicts,
    "snapshot": snapshot,
    "snapshots": snapshots,
    "restore": restore,
    "edit-snapshot": edit_snapshot,
    "delete-snapshot": delete_snapshot,
    "export": export,
    "import": import_snapshot,
    "wait": wait,
    "persist": persist,
    "maintenance": maintenance,
    "guest": guest,
    "rebase": rebase,
    "shadowed": shadowed,
    "commit": commit,
    "uncommit": uncommit,
    "committed": committed,
    "keep": keep,
    "diff": diff,
    "cancel": cancel,
    "close": close,
    "monitor": monitor,
    "top": top,
}


def _pending_line(file: PendingFile) -> str:
    programs = ", ".join(file.programs) or _("by whom cannot be seen")
    return f"{file.path}  ({programs})"


def _manner(asked: Arguments) -> dict[str, bool | float | str]:
    """Return the options of a reset or restore."""
    options: dict[str, bool | float | str] = {}
    if asked.terminate:
        os.chdir("/")  # a program that works in the session is ended, and this is none
        options |= {"terminate": True, "grace": asked.grace}
    if asked.snapshot_as is not None:
        options["snapshot_first"] = asked.snapshot_as
    elif asked.snapshot_first:
        options["snapshot_first"] = True
    return options


def _kept(asked: Arguments) -> dict[str, list[str]]:
    """Return the option of a reset that says what stays."""
    # A shell completes the names of directories with a slash.
    kept = [path.rstrip("/") or path for path in asked.kept]
    return {"keep": kept} if kept else {}


async def _print_ended(session: Session, asked: Arguments) -> None:
    """Say what was asked to end."""
    job = await session.last_job() if asked.terminate else None
    for one in () if job is None else job.conflicts:
        pids = ", ".join(map(str, one.pids))
        sentence = _("It was in use by {program} ({pids}) of uid {uid}.")
        print_line(sentence.format(program=one.name, pids=pids, uid=one.uid))


def _used(session: SessionInfo) -> str:
    return used_of(session.bytes_used, session.bytes_limit)


def _session_json(session: SessionInfo) -> dict[str, Json]:
    return session.model_dump(mode="json", exclude={"snapshots", "last_job"})


def _changes_json(changes: ChangeSummary) -> dict[str, Json]:
    largest = [file._asdict() for file in changes.largest]
    told = dataclasses.asdict(changes) | {"largest": largest}
    del told["directories"]  # nobody has asked for any
    return told


def _job_json(job: JobInfo) -> dict[str, Json]:
    return job.model_dump(mode="json", exclude={"session"})


def _snapshot_json(snapshot: SnapshotInfo) -> dict[str, Json]:
    return snapshot.model_dump(mode="json", exclude={"parent"})


def _event_json(event: Event, now: datetime) -> dict[str, Json]:
    return {
        "time": now.isoformat(),
        "session": event.session,
        "path": event.path,
        "interface": event.interface,
        "member": event.member,
        "arguments": [_plain(argument) for argument in event.arguments],
    }


def _event_line(event: Event) -> str:
    if event.member == "PropertiesChanged":
        changed = event.arguments[1]
        assert isinstance(changed, dict)
        return "  ".join(f"{name}={json.dumps(_plain(value))}" for name, value in changed.items())
    return f"{event.member}  " + "  ".join(json.dumps(_plain(one)) for one in event.arguments)


def _plain(value: object) -> Json:
    """Return a value from a message as JSON can tell it."""
    match value:
        case str() | int() | float():
            return value
        case list() | tuple():
            return [_plain(one) for one in value]
        case dict():
            return {str(key): _plain(one) for key, one in value.items()}
        case _:
            return repr(value)
