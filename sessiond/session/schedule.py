"""Resets that are to come by themselves: which, and when."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from sessiond.session.clock import Clock, next_time_of_day
from sessiond.session.model import AT_ONCE, ROOT, Manner, ScheduledReset, SessionRecord, Uid


class Why(StrEnum):
    """What brings a reset about; published as the property `NextResetReason`."""

    SCHEDULED = "scheduled"
    """Somebody has asked for it."""
    AFTER = "after"
    """The session has lasted as long as its profile allows."""
    DAILY = "daily"
    """It is the time of day that the profile names."""
    IDLE = "idle"
    """Nobody has used the session for as long as the profile says."""


@dataclass(frozen=True, slots=True)
class Due:
    """A reset that is to come. `why` and `of` tell it from others, however clocks are set."""

    why: Why
    of: object
    at: float
    """When, by `Clock.boottime`; may be over."""
    warning: float
    """Seconds for which it is announced, at least."""
    asked_by: Uid = ROOT
    manner: Manner = AT_ONCE


def due(record: SessionRecord, clock: Clock, idle_since: float | None) -> list[Due]:
    """Return what is to come, as things are now.

    `idle_since` is when the session's user was there last, by `Clock.boottime`; None if they are
    there, or nobody knows. A session that has been reset since then is not reset again.
    """
    now = clock.boottime()
    rules = record.reset_rules
    manner = Manner(terminate=rules.terminate, grace=rules.grace)
    age = _age(record, clock)
    found = []

    def add(why: Why, of: object, at: float) -> None:
        found.append(Due(why, of, at, rules.warning, manner=manner))

    if rules.after is not None:
        add(Why.AFTER, record.began or record.last_reset, now - age + rules.after)
    if rules.daily is not None:
        hour, minute = map(int, rules.daily.split(":"))
        moment = next_time_of_day(hour, minute, clock.now() - timedelta(seconds=age))
        add(Why.DAILY, moment, now + (moment - clock.now()).total_seconds())
    if rules.idle is not None and idle_since is not None and idle_since > now - age:
        add(Why.IDLE, idle_since, idle_since + rules.idle)
    if record.scheduled is not None:
        found += _scheduled(record.scheduled, record, clock, idle_since)
    return found


def watches_idleness(record: SessionRecord) -> bool:
    """Say whether `due` has to know since when the session's user is idle."""
    scheduled = record.scheduled
    return record.reset_rules.idle is not None or (
        scheduled is not None and scheduled.idle is not None
    )


def _age(record: SessionRecord, clock: Clock) -> float:
    """Return how many seconds the session has lasted since it was made or last reset."""
    if record.began is not None:
        return record.began.elapsed(clock)
    began = record.last_reset or record.created_at
    return max(0.0, (clock.now() - began).total_seconds())


def _scheduled(
    asked: ScheduledReset, record: SessionRecord, clock: Clock, idle_since: float | None
) -> list[Due]:
    now = clock.boottime()
    ahead = record.reset_rules.warning if asked.warning is None else asked.warning
    if asked.at is not None:
        at = now + (asked.at - clock.now()).total_seconds()
        ahead = min(ahead, max(0.0, (asked.at - asked.asked.wall).total_seconds()))
    elif asked.after is not None:
        at = now - asked.asked.elapsed(clock) + asked.after
        ahead = min(ahead, asked.after)
    elif asked.idle is not None and idle_since is not None:
        at = idle_since + asked.idle
    else:
        return []
    return [Due(Why.SCHEDULED, asked.asked, at, ahead, asked.by, asked.manner)]
