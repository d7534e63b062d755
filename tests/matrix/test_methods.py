"""What is tried is all that there is."""

from __future__ import annotations

from sessiond.session.model import Operation
from tests.crash import test_rebase_death
from tests.crash.lives import LIVES
from tests.matrix.methods import INTERFACES, METHODS
from tests.matrix.test_meanwhile import JOBS
from tests.unit.session import guest_death

DEATHS = {
    "rebase": test_rebase_death.test_a_session,
    "finish_maintenance": test_rebase_death.test_an_image_is_replaced,
    "create_guest": guest_death.create_guest,
    "remove_guest": guest_death.remove_guest,
    **{life.__name__: life for life in LIVES},
}
"""Who does what changes a disk, and dies in it."""


def test_each_method_is_here() -> None:
    offered = {(one.__name__, name) for one in INTERFACES for name in one.methods}
    assert {(one.interface.__name__, one.name) for one in METHODS} == offered


def test_each_kind_of_job_is_here() -> None:
    assert set(JOBS) == set(Operation)


def test_what_changes_a_disk_is_done_by_managers_that_die() -> None:
    told = {life for entry in METHODS for life in entry.lives}
    assert told <= DEATHS.keys()
