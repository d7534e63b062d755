"""What sessions know of the machine around them, apart from its mounts."""

from __future__ import annotations

from dataclasses import dataclass, field

from sessiond.session.clock import Clock, SystemClock
from sessiond.session.presence import NoPresence, Presence
from sessiond.session.processes import Processes, SystemProcesses


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Each part has a protocol; tests put in others."""

    clock: Clock = field(default_factory=SystemClock)
    presence: Presence = field(default_factory=NoPresence)
    processes: Processes = field(default_factory=SystemProcesses)
