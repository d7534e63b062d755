"""Each operation on a session, by a manager that dies before and after each change that it makes.

Whatever makes the change: the store, the copying of trees, the mounting of storage, in any thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, product

import pytest

from tests.crash import sessions
from tests.crash.lives import LIVES, PROFILES, given
from tests.crash.sessions import Life

IN_TEST = {
    "create_lasting-volatile": 4,
    "snapshot-lasting": 1,
    "restore-lasting": 4,
    "persist-volatile": 4,
    "close-volatile": 4,
    "import_snapshot-lasting": 7,
}
"""What is tried without soaking, too, and one of how many deaths."""


def cases() -> Iterator[object]:
    for life, profile in product(LIVES, PROFILES):
        name = f"{life.__name__}-{profile}"
        chosen = {1: True}
        if name in IN_TEST:
            chosen[IN_TEST[name]] = False
        for every, soak in chosen.items():
            marks = pytest.mark.soak if soak else ()
            yield pytest.param(life, profile, every, id=f"{name}-every-{every}", marks=marks)


@pytest.mark.parametrize(("life", "profile", "every"), list(cases()))
def test_death(
    scratch: str, caplog: pytest.LogCaptureFixture, life: Life, profile: str, every: int
) -> None:
    with sessions.machine(scratch, given(profile, life)) as top:
        before = sessions.recovered(top)
    with sessions.machine(scratch, given(profile, life)) as top:
        sessions.die(top, life)
        after = sessions.recovered(top)
    for point in count(step=every):
        with sessions.machine(scratch, given(profile, life)) as top:
            lived = sessions.die(top, life, die_at=point)
            found = sessions.recovered(top)
        what = f"killed before change {point}, {lived.calls[-1]}"
        assert found in (before, after), what
        said = [one for one in caplog.records if one.name != "sessiond.session.maintenance"]
        assert said == [], what  # who looks for a maintenance is told of its end
        if not lived.died:
            break
