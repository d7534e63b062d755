"""The commands of sessionctl that speak to the daemon; each prints what it has to tell."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime

from sessiond.bus.client import (
    ChangeSummary,
    Client,
    Event,
    JobInfo,
    PendingFile,
    SessionInfo,
    SnapshotInfo,
)
from sessiond.cli import differences
from sessiond.cli.arguments import Arguments
from sessiond.cli.output import (
    Json,
    print_facts,
    print_json,
    print_line,
    print_table,
    size,
    used_of,
    when,
)
from sessiond.cli.progress import carry_out
from sessiond.errors import AuthorizationRequired, NotAuthorized

Command = Callable[[Client, Arguments], Awaitable[None]]


async def list_sessions(client: Client, asked: Arguments) -> None:
    """Print all sessions."""
    sessions = await client.sessions()
    if asked.json:
        print_json([_session_json(session) for session in sessions])
        return
    print_table(
        ("ID", "USER", "PROFILE", "STORAGE", "STATE", "USED", "MOUNT POINT"),
        [(s.id, s.user, s.profile, s.storage, s.state, _used(s), s.mount_point) for s in sessions],
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
    facts = [
        ("Session", info.id),
        ("User", f"{info.user} ({info.uid})"),
        ("Profile", info.profile),
        ("Image", info.image),
        ("Mount point", info.mount_point),
        ("Storage", info.storage),
        ("State", f"{info.state}: {info.failure}" if info.failure else info.state),
        ("Used", _used(info) + f", {info.space_level}" * (info.space_level != "normal")),
        ("Inodes", f"{info.inodes_used}" + (f" of {info.inodes_limit}" * (info.inodes_limit > 0))),
        ("Created", when(info.created_at)),
        ("Last reset", when(info.last_reset)),
        ("Kept", ", ".join(info.keep) or "nothing"),
        ("Snapshots", ", ".join(snapshot.name for snapshot in snapshots) or "none"),
    ]
    if job is not None:
        outcome = f"{job.state}: {job.error_message}" if job.error_message else job.state
        facts.append(("Last job", f"{job.operation} {outcome}"))
    if info.pending:
        facts.append(("In RAM still", f"what is written to {info.pending} files that are open"))
    facts += [("", _pending_line(file)) for file in pending]
    if changes is not None:
        facts.append(("Changes", differences.counts(changes)))
    print_facts(facts)


async def create(client: Client, asked: Arguments) -> None:
    """Make a session."""
    session = await client.create(asked.user, asked.profile, session_id=asked.id)
    info = await session.info()
    if asked.json:
        print_json(_session_json(info))
    else:
        print_line(f"Session {info.id} of {info.user} is mounted at {info.mount_point}.")


async def reset(client: Client, asked: Arguments) -> None:
    """Drop all changes of a session."""
    session = await client.session(asked.session)
    await carry_out(session.reset(), f"Resetting {asked.session}")


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
            size(one.size) if one.size_valid else "counting",
            size(one.exclusive) if one.size_valid else "",
            _kind(one),
            one.description,
        )
        for one in found
    ]
    print_table(("NAME", "CREATED", "SIZE", "GIVES BACK", "KIND", "DESCRIPTION"), rows)


def _kind(snapshot: SnapshotInfo) -> str:
    kinds = (("automatic", snapshot.automatic), ("pinned", snapshot.pinned))
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
    title = f"Restoring {asked.session} to {asked.snapshot}"
    await carry_out(session.restore(asked.snapshot, undo=asked.undo), title)


async def delete_snapshot(client: Client, asked: Arguments) -> None:
    """Delete a snapshot."""
    session = await client.session(asked.session)
    await session.snapshot_named(asked.snapshot).delete()


async def persist(client: Client, asked: Arguments) -> None:
    """Move a session to disk."""
    session = await client.session(asked.session)
    await carry_out(session.persist(verify=asked.verify), f"Moving {asked.session} to disk")
    if not (await session.info()).pending:
        return
    print_line(
        "All is on disk but what programs write to these files, which follows every few seconds, "
        "and when they are closed:"
    )
    for file in await session.pending_files():
        print_line(_pending_line(file))


async def cancel(client: Client, asked: Arguments) -> None:
    """Cancel what is being done to a session."""
    session = await client.session(asked.session)
    await session.cancel()


async def commit(client: Client, asked: Arguments) -> None:
    """Save files and directories of a session for later ones."""
    session = await client.session(asked.session)
    await carry_out(session.commit(asked.paths), f"Committing files of {asked.session}")


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
    async with session.diff(start=asked.start, end=asked.end, content=asked.content) as found:
        if asked.json:
            await differences.print_as_json(found)
        elif asked.content:
            await differences.print_content(found)
        elif asked.as_list:
            await differences.print_list(found)
        else:
            await differences.print_tree(found, asked.depth)


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


COMMANDS: dict[str, Command] = {
    "list": list_sessions,
    "status": status,
    "create": create,
    "reset": reset,
    "snapshot": snapshot,
    "snapshots": snapshots,
    "restore": restore,
    "edit-snapshot": edit_snapshot,
    "delete-snapshot": delete_snapshot,
    "persist": persist,
    "commit": commit,
    "keep": keep,
    "diff": diff,
    "cancel": cancel,
    "close": close,
    "monitor": monitor,
}


def _pending_line(file: PendingFile) -> str:
    return f"{file.path}  ({', '.join(file.programs) or 'by whom cannot be seen'})"


def _used(session: SessionInfo) -> str:
    return used_of(session.bytes_used, session.bytes_limit)


def _session_json(session: SessionInfo) -> dict[str, Json]:
    return session.model_dump(mode="json", exclude={"snapshots", "last_job"})


def _changes_json(changes: ChangeSummary) -> dict[str, Json]:
    largest = [file._asdict() for file in changes.largest]
    return dataclasses.asdict(changes) | {"largest": largest}


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
