"""Records and notes of jobs as a failing disk, or a person with an editor, leaves them."""

from __future__ import annotations

import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sessiond.bus import wire
from sessiond.bus.service import Service
from sessiond.session.model import (
    ImageSource,
    JobRecord,
    LayerNumber,
    Operation,
    SessionId,
    SessionRecord,
    SnapshotName,
    SnapshotRecord,
    SnapshotRules,
    StorageKind,
    Uid,
)
from tests.support.fuzzing import damaged, fuzz, json_values, mistaken
from tests.support.sessions import UID, USER, World

_MOMENT = datetime(2024, 5, 6, tzinfo=UTC)
_JOB = JobRecord(
    number=7,
    operation=Operation.RESET,
    started_by=Uid(UID),
    storage=StorageKind.PERSISTENT,
    upper=LayerNumber(1),
    finished=True,
    error="NoSpace",
    message="It was full.",
)


def _record(session: str, directory: Path) -> SessionRecord:
    return SessionRecord(
        id=SessionId(session),
        user=USER,
        uid=Uid(UID),
        profile="lasting",
        source=ImageSource(path=directory / "image"),
        image="directory-0",
        mount_point=directory / f"mount-point-of-{session}",
        nosuid=False,
        nodev=False,
        storage=StorageKind.PERSISTENT,
        created_at=_MOMENT,
        snapshot_rules=SnapshotRules(count=3, daily=2, max_bytes=1 << 30, every=3600),
        next_layer=LayerNumber(4),
        upper=LayerNumber(3),
        layers=(LayerNumber(2),),
        snapshots=(
            SnapshotRecord(
                name=SnapshotName("first"),
                description="the first",
                created_at=_MOMENT,
                layers=(LayerNumber(2),),
            ),
        ),
    )


# Without slashes, of which a place outside the test's directory could be made.
_VALUES = json_values(
    st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), max_size=12)
    | st.sampled_from(
        [
            "/dev/null/a\0b",
            "/dev/null/" + "x" * 300,
            "tmpfs",
            "0001-01-01T00:00:00+23:59",
            "9999-12-31T23:59:59-23:59",
            "1e400",
        ]
    )
)


def _store(directory: Path, record: bytes | None, job: bytes) -> World:
    """Make a machine with a good session, and one with that `record`, and a note of that `job`."""
    world = World(directory)
    for session in ("bad", "good"):
        for layer in (2, 3):
            for name in ("fs", "work"):
                (world.disk(session) / "layers" / str(layer) / name).mkdir(parents=True)
        (world.runtime / "sessions" / session).mkdir(parents=True)
        text = _record(session, directory).model_dump_json().encode()
        if session == "bad" and record is not None:
            text = record
        (world.disk(session) / "session.json").write_bytes(text)
    (world.runtime / "sessions" / "bad" / "job.json").write_bytes(job)
    return world


async def _is_served(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Start a daemon there: whatever became of the bad session, the good one is served."""
    caplog.clear()
    async with world.manager() as manager:
        assert manager.get("good").state == "active"
        wire.pack(
            "a{oa{sa{sv}}}", [Service(manager, lambda operation, outcome: None).tree.managed()]
        )
    faults = [entry for entry in caplog.records if entry.exc_info is not None]
    assert faults == []


_DIRECTORY = Path("/DIRECTORY")
"""Stands in the inputs for the directory of the test, of which nothing is known then."""
_RECORD = _record("bad", _DIRECTORY).model_dump_json().encode()
_NOTE = _JOB.model_dump_json().encode()


def _with(valid: bytes, **values: object) -> bytes:
    return json.dumps({**json.loads(valid), **values}).encode()


@given(
    st.binary(max_size=40) | damaged(_RECORD) | mistaken(_RECORD, _VALUES),
)
@example(_with(_RECORD, mount_point="/dev/null/a\0b"))
@example(_with(_RECORD, source={"path": "/dev/null/a\0b"}))
@example(_with(_RECORD, source={"path": "/DIRECTORY/image", "verity_root_hash": "\0"}))
@example(_with(_RECORD, created_at="1969-12-31T23:59:59Z"))
@example(_with(_RECORD, last_reset="0001-01-01T00:00:00+23:59"))
@example(_with(_RECORD, quota={"bytes": 2**80, "inodes": -1}))
@example(_with(_RECORD, next_layer=10**400))
@example(b"[" * 100_000)
@fuzz(40)
async def test_any_record_leaves_other_sessions_alone(
    caplog: pytest.LogCaptureFixture, record: bytes
) -> None:
    with tempfile.TemporaryDirectory() as name:
        text = record.replace(bytes(_DIRECTORY), name.encode())
        await _is_served(_store(Path(name), text, _NOTE), caplog)


@given(st.binary(max_size=40) | damaged(_NOTE) | mistaken(_NOTE, _VALUES))
@example(_with(_NOTE, number=10**4000))
@example(_with(_NOTE, error="SessiondError", message="\0"))
@example(_with(_NOTE, operation="persist", finished=False))
@fuzz(30)
async def test_any_note_of_a_job_leaves_its_session_alone(
    caplog: pytest.LogCaptureFixture, job: bytes
) -> None:
    with tempfile.TemporaryDirectory() as name:
        await _is_served(_store(Path(name), None, job), caplog)
