"""Resets a session when it is time, after a warning, unless somebody holds it back.

Who has no root's rights holds it for `ResetRules.inhibit` seconds at most, counted from when the
reset was due, whatever they do meanwhile.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import trio

from sessiond.errors import InvalidOption, NoSuchSession, NotAuthorized, SessiondError
from sessiond.session import schedule
from sessiond.session.clock import Instant
from sessiond.session.inhibitors import Inhibitors
from sessiond.session.model import (
    AT_ONCE,
    ROOT,
    SECONDS_LIMIT,
    Manner,
    ScheduledReset,
    SessionState,
    Uid,
)
from sessiond.session.schedule import Due, Why

if TYPE_CHECKING:
    from sessiond.session.session import Session

log = logging.getLogger(__name__)

_LOOK_SECONDS = 15.0
"""How often it is looked, at least: clocks can be set, the machine suspended, and users idle."""
_RETRY_SECONDS = 60.0
"""After a reset that has failed."""
_SHORTEST_SECONDS = 0.01
_STARTING_SECONDS = 1.0
_JITTER = 1.0
"""Seconds by which a time may change before anyone is told."""


@dataclass
class _Countdown:
    """What is known of one that is due."""

    first_seen: float
    announced: float | None = None
    """When it is to be, once that has been announced."""

    def plan(self, due: Due, now: float, inhibitors: Inhibitors, limit: float) -> float:
        """Return when it is to be as things are now, by `Clock.boottime`; maybe never."""
        # A warning comes before the end of the time for which it may be held back.
        deadline = max(due.at + limit, self.first_seen + due.warning)
        if inhibitors.any_of_root:
            self.announced = None
            return math.inf
        if inhibitors.all and now < deadline - due.warning:
            self.announced = None
            return deadline
        if self.announced is None or self.announced < due.at - _JITTER:
            self.announced = None
            if now < due.at - due.warning:
                return due.at
            self.announced = max(due.at, now + due.warning)
        return self.announced


class ResetTimer:
    """Of one session. Attributes are read-only for others."""

    def __init__(self, session: Session) -> None:
        self.next_reset: datetime | None = None
        """When the session is reset, as things are now."""
        self.reason: Why | None = None
        self.inhibitors = Inhibitors(self._inhibitors_changed)
        self._session = session
        self._clock = session.services.surroundings.clock
        self._countdowns: dict[tuple[Why, object], _Countdown] = {}
        self._changed = trio.Event()
        self._idle: tuple[object, float] | None = None
        self._complaint = ""
        self._not_before = -math.inf

    def look(self) -> None:
        """Have it look at the session's record again."""
        self._changed.set()

    def _inhibitors_changed(self) -> None:
        self._session.tell_changed()
        self.look()

    async def schedule(
        self,
        by: Uid,
        *,
        at: datetime | None = None,
        after: float | None = None,
        idle: float | None = None,
        warning: float | None = None,
        manner: Manner = AT_ONCE,
    ) -> None:
        """Have the session reset `at` a time, `after` seconds, or once its user is `idle` so long.

        In place of what was scheduled before. Raises `InvalidOption`, `NotAuthorized` where that
        was root's, `NotSupported` where nobody knows of idle users, and what `Session.schedule`
        raises.
        """
        if [at, after, idle].count(None) != 2:
            raise InvalidOption("One time is needed: an 'at' that is not 0, or 'in', or 'idle'.")
        now = self._clock.now()
        if at is not None and not now < at < now + timedelta(seconds=SECONDS_LIMIT):
            raise InvalidOption(f"{at:%Y-%m-%d %H:%M:%S %Z} is over, or too far away.")
        if idle is not None:
            await self._session.services.surroundings.presence.attendance(self._session.uid)
        self._require_own(by)
        asked = Instant.now(self._clock)
        await self._session.schedule(
            ScheduledReset(
                by=by, asked=asked, at=at, after=after, idle=idle, warning=warning, manner=manner
            )
        )

    async def cancel(self, by: Uid) -> None:
        """Forget what was scheduled, if anything was; what the profile says goes on to count.

        Raises `NotAuthorized` where that was root's, and what `Session.schedule` raises.
        """
        self._require_own(by)
        if self._session.record.scheduled is not None:
            await self._session.schedule(None)

    def _require_own(self, uid: Uid) -> None:
        scheduled = self._session.record.scheduled
        if scheduled is not None and scheduled.by == ROOT != uid:
            raise NotAuthorized(
                f"Root has scheduled a reset of session {self._session.id}, and only root may "
                "cancel it or schedule another in its place."
            )

    async def run(self) -> None:
        """Reset the session when it is time, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.inhibitors.watch)
            while True:
                self._changed = trio.Event()
                try:
                    pause = await self._look()
                except Exception:
                    # What people work in is worth more than that it is reset in time.
                    log.exception("The timer of session %s failed", self._session.id)
                    pause = _RETRY_SECONDS
                with trio.move_on_after(pause):
                    await self._changed.wait()

    async def _look(self) -> float:
        """Do what there is to be done now; return after how many seconds to look again."""
        session = self._session
        if session.state is SessionState.STARTING:
            return _STARTING_SECONDS
        idle_since = None
        if schedule.watches_idleness(session.record):
            idle_since = await self._idle_since()
        dues = schedule.due(session.record, self._clock, idle_since)
        now = self._clock.boottime()
        known, self._countdowns = self._countdowns, {}
        plans: list[tuple[float, Due]] = []
        for due in dues:
            countdown = known.get((due.why, due.of)) or _Countdown(now)
            self._countdowns[due.why, due.of] = countdown
            was = countdown.announced
            limit = session.record.reset_rules.inhibit
            plans.append((countdown.plan(due, now, self.inhibitors, limit), due))
            if countdown.announced not in {None, was}:
                self._announce(countdown.announced, due)
        if not plans:
            self._publish(None, None)
            return _LOOK_SECONDS if schedule.watches_idleness(session.record) else math.inf
        when, due = min(plans, key=lambda plan: plan[0])
        self._publish(when, due)
        if now < max(when, self._not_before):
            events = [due.at - due.warning for _, due in plans] + [when, self._not_before]
            pauses = [_LOOK_SECONDS, *(event - now for event in events if event > now)]
            return max(min(pauses), _SHORTEST_SECONDS)
        await self._reset(due)
        return 0.0

    async def _idle_since(self) -> float | None:
        """Return when the session's user was there last, by `Clock.boottime`."""
        presence = self._session.services.surroundings.presence
        try:
            found = await presence.attendance(self._session.uid)
        except SessiondError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error(  # noqa: TRY400
                    "Whether the user of session %s is idle cannot be found out: %s",
                    self._session.id,
                    error,
                )
            return None
        self._complaint = ""
        if found.logged_in and found.idle_since is None:
            self._idle = None
            return None
        # The machine may be suspended before the next look: then the two clocks differ more.
        if self._idle is None or self._idle[0] != found:
            now = self._clock.boottime()
            ago = 0.0 if found.idle_since is None else self._clock.monotonic() - found.idle_since
            self._idle = found, now - ago
        return self._idle[1]

    def _announce(self, when: float | None, due: Due) -> None:
        assert when is not None
        moment = self._moment(when)
        log.info("Session %s is reset at %s: %s.", self._session.id, moment, due.why)
        self._session.tell_reset_scheduled(moment, due.why)

    def _publish(self, when: float | None, due: Due | None) -> None:
        moment = None if when is None or when == math.inf else self._moment(when)
        reason = None if due is None else due.why
        before = self.next_reset
        if (moment is None) == (before is None) and reason == self.reason:
            if moment is None or before is None:
                return
            if abs((moment - before).total_seconds()) <= _JITTER:
                return
        self.next_reset, self.reason = moment, reason
        self._session.tell_changed()

    def _moment(self, when: float) -> datetime:
        seconds = when - self._clock.boottime()
        return self._clock.now() + timedelta(seconds=seconds)

    async def _reset(self, due: Due) -> None:
        try:
            await self._session.reset_when_idle(due)
        except NoSuchSession:
            await trio.sleep_forever()  # it is being closed, and this task cancelled
        except SessiondError as error:
            log.error("Session %s is not reset: %s", self._session.id, error)  # noqa: TRY400
            self._not_before = self._clock.boottime() + _RETRY_SECONDS
