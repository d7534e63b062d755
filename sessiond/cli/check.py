"""``sessionctl check``: looks at what is on disk, without the daemon."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from sessiond import config
from sessiond.cli.arguments import Arguments
from sessiond.cli.exit_codes import ExitCode
from sessiond.cli.output import Json, listed, print_line
from sessiond.cli.terms import SEVERITIES
from sessiond.errors import InvalidOption, NotAuthorized
from sessiond.session.check import Found, Report, Severity, Target, check_layers, parse_lowers
from sessiond.session.check_store import Scope, check_store, prepare_process
from sessiond.words import _, ngettext

_SHOWN = 10
"""Paths that are shown to people of each kind of finding in a layer."""


def check(asked: Arguments) -> ExitCode:
    """Check, and print what is found. Raises what a check does, and `ConfigError`."""
    if os.geteuid() != 0 and not asked.userxattr:
        raise NotAuthorized(_("Reading layers takes root: use sudo or su."))
    with _json() if asked.json else _text() as report:
        if asked.upper is not None:
            check_layers(_target(asked), report, repair=asked.repair)
        else:
            scope = _scope(asked)
            prepare_process()
            trio.run(check_store, scope, report)
    if report.left:
        return ExitCode.DAMAGED
    return ExitCode.REPAIRED if report.mended else ExitCode.OK


def _target(asked: Arguments) -> Target:
    assert asked.upper is not None
    assert asked.work is not None
    assert asked.lower is not None
    try:
        lowers, data = parse_lowers(asked.lower)
    except ValueError as error:
        raise InvalidOption(f"--lower {error}.") from None
    upper, work = os.fsencode(asked.upper), os.fsencode(asked.work)
    return Target(upper, work, lowers, data, user_xattrs=asked.userxattr)


def _scope(asked: Arguments) -> Scope:
    if asked.state_directory is not None:
        return Scope(asked.state_directory.resolve(), None, asked.checked, asked.repair)
    daemon = config.load(asked.config).daemon
    state, runtime = daemon.state_directory.resolve(), daemon.runtime_directory.resolve()
    return Scope(state, runtime, asked.checked, asked.repair)


@contextmanager
def _json() -> Iterator[Report]:
    """Print one document, finding by finding: there may be as many as files."""
    separator = itertools.chain([""], itertools.repeat(", "))

    def tell(found: Found) -> None:
        print(next(separator), json.dumps(_as_json(found)), sep="", end="")

    report = Report(tell)
    complete = False
    print('{"findings": [', end="")
    try:
        yield report
        complete = True
    finally:
        summary = {
            "complete": complete,
            "sessions": report.sessions,
            "layers": report.layers,
            "errors": report.counts[Severity.ERROR],
            "warnings": report.counts[Severity.WARNING],
            "notes": report.counts[Severity.NOTE],
            "repaired": report.repaired,
        }
        print("], ", json.dumps(summary)[1:], sep="")


def _as_json(found: Found) -> dict[str, Json]:
    about = found.kind.description
    return {
        "kind": about.id,
        "severity": about.severity,
        "session": found.session,
        "layer": found.layer,
        "place": found.place,
        "path": os.fsdecode(found.path),
        "number": found.number,
        "meaning": about.meaning,
        "detail": found.detail,
        "repairable": bool(about.repair),
        "repaired": found.repaired,
    }


@contextmanager
def _text() -> Iterator[Report]:
    """Print for people: layer by layer, the findings of a kind together."""
    groups = _Groups()
    report = Report(groups.add)
    try:
        yield report
    finally:
        groups.flush()
    print_line(_summary(report))


def _summary(report: Report) -> str:
    errors, warnings, notes = (
        report.counts[severity] for severity in (Severity.ERROR, Severity.WARNING, Severity.NOTE)
    )
    found = [
        (errors, ngettext("{number} error", "{number} errors", errors)),
        (warnings, ngettext("{number} warning", "{number} warnings", warnings)),
        (notes, ngettext("{number} note", "{number} notes", notes)),
        (report.repaired, ngettext("{number} repaired", "{number} repaired", report.repaired)),
    ]
    counts = listed(text.format(number=number) for number, text in found if number)
    layers = ngettext("{number} layer", "{number} layers", report.layers)
    checked = [layers.format(number=report.layers)]
    if report.sessions:
        sessions = ngettext("{number} session", "{number} sessions", report.sessions)
        checked.insert(0, sessions.format(number=report.sessions))
    what = listed(checked)
    sentence = _("Checked {what}: {counts}.") if counts else _("Checked {what}: nothing was found.")
    return sentence.format(what=what, counts=counts)


@dataclass
class _Group:
    """Findings of one kind."""

    number: int = 0
    first: list[Found] = field(default_factory=list)


class _Groups:
    """Findings of one layer, or of the store, as far as they are shown."""

    def __init__(self) -> None:
        self._of: tuple[str | None, int | None] = (None, None)
        self._groups: dict[tuple[str, bool], _Group] = {}

    def add(self, found: Found) -> None:
        """Take one; print those of the last layer when the next begins."""
        of = (found.session, found.layer)
        if of != self._of:
            self.flush()
            self._of = of
        group = self._groups.setdefault((found.kind.id, found.repaired), _Group())
        group.number += found.number
        if len(group.first) < _SHOWN:
            group.first.append(found)

    def flush(self) -> None:
        """Print what is there."""
        if not self._groups:
            return
        session, layer = self._of
        if session is not None:
            place = _("Session {id}") if layer is None else _("Session {id}, layer {layer}")
            print_line(place.format(id=session, layer=layer))
        order = list(Severity)
        for group in sorted(
            self._groups.values(), key=lambda group: order.index(group.first[0].kind.severity)
        ):
            _print_group(group)
        sys.stdout.flush()
        self._groups.clear()


def _print_group(group: _Group) -> None:
    about, repaired = group.first[0].kind.description, group.first[0].repaired
    print_line(f"  {SEVERITIES[about.severity]}: {about.id}")
    for found in group.first:
        place = "" if found.place == "store" else f"{found.place}: "
        path = os.fsdecode(found.path)
        if found.number > 1:
            path = _("{path} and {number} more").format(path=path, number=found.number - 1)
        detail = f"  ({found.detail})" if found.detail else ""
        print_line(f"    {place}{path}{detail}")
    left = group.number - sum(found.number for found in group.first)
    if left:
        print_line("    " + _("and {number} more").format(number=left))
    print_line(f"    {_(about.meaning)}{_of_repair(about.repair, repaired=repaired)}")


def _of_repair(done: str, *, repaired: bool) -> str:
    if not done:
        return ""
    sentence = _("It was {repaired}.") if repaired else _("With --repair it is {repaired}.")
    return " " + sentence.format(repaired=_(done))
