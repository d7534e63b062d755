"""What sessions know of the machine around them, apart from its mounts."""

from __future__ import annotations

from dataclasses import dataclass, field

from sessiond.session.belongings import Belongings, SystemBelongings
from sessiond.session.clock import Clock, SystemClock
from sessiond.session.presence import NoPresence, Presence
from sessiond.session.processes import Processes, SystemProcesses
from sessiond.session.user_records import SystemUserRecords, UserRecords


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Each part has a protocol; tests put in others."""

    clock: Clock = field(default_factory=SystemClock)
    presence: Presence = field(default_factory=NoPresence)
    processes: Processes = field(default_factory=SystemProcesses)
    user_records: UserRecords = field(default_factory=SystemUserRecords)
    belongings: Belongings = field(default_factory=SystemBelongings)
