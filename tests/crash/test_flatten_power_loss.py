"""Layers that are merged on a disk whose power goes: the session and its snapshots lose nothing."""

from __future__ import annotations

import os
import random

import pytest

from tests.crash.test_flatten_death import deep, flatten
from tests.crash.test_session_power_loss import Machine
from tests.support.disks import FILE_SYSTEMS
from tests.support.recording_disk import torn

KINDS = [
    pytest.param(kind, marks=() if kind == "ext4" else pytest.mark.soak) for kind in FILE_SYSTEMS
]
SEED = 5


@pytest.mark.parametrize("kind", KINDS)
def test_power_loss(scratch: str, kind: str) -> None:
    directory = f"{scratch}/flatten-{kind}"
    os.mkdir(directory)
    machine = Machine(directory, kind)
    start, _ = machine.run(deep("lasting"), flatten)
    records = machine.disk.records()
    before = machine.after_power_loss([])
    layers = machine.layers
    chance = random.Random(SEED)
    flushed: int | None = None
    for number, record in enumerate([*records, None]):
        if record is not None and not (record.is_flush and record.end > start):
            continue
        # With all that was written by then, and with what may be of it that no flush had followed.
        since = records[flushed:number] if flushed is not None else []
        whole = [one for one in records[:number] if not one.is_flush]
        partly = [*records[: flushed or 0], *torn(since, chance)]
        for written in (whole, partly):
            found = machine.after_power_loss(written)
            assert found == before, f"power lost at {record and record.end}, seed {SEED}"
        flushed = number
    assert machine.layers < layers
