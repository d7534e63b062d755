"""Operations whose permission takes its time: the world may be another one after it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import pytest

from sessiond.bus.audit import Attempt
from sessiond.bus.operations import Operations
from sessiond.bus.polkit import Verdict
from sessiond.errors import NoSuchSession, NotAuthorized
from tests.bus.fake_manager import FakeManager

OWNER = 65534


class SlowCaller:
    """The owner, of whom polkit is asked; `meanwhile` happens before it says `verdict`."""

    attempt: Attempt | None = None

    def __init__(self, verdict: Verdict, meanwhile: Callable[[], Awaitable[None]]) -> None:
        self.verdict = verdict
        self.meanwhile = meanwhile
        self.asked: dict[str, Mapping[str, str]] = {}

    async def uid(self) -> int:
        return OWNER

    async def ask_polkit(self, action: str, details: Mapping[str, str]) -> Verdict:
        self.asked[action] = details
        await self.meanwhile()
        return self.verdict

    def start_soon(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        raise AssertionError


async def test_permission_is_for_one_session_not_for_the_next_of_its_name(
    manager: FakeManager,
) -> None:
    async def another_takes_its_place() -> None:
        await manager.close("live")
        manager.add("live", "root", 0)

    operations = Operations(manager, str)
    caller = SlowCaller(Verdict.YES, another_takes_its_place)
    with pytest.raises(NoSuchSession):
        await operations.close(caller, manager.get("live"), {})
    assert manager.get("live").user == "root"
    assert caller.asked == {
        "org.sessiond.overlay1.close-own": {"session": "live", "user": "nobody", "profile": "live"}
    }


@pytest.mark.parametrize("verdict", [Verdict.NO, Verdict.UNKNOWN])
async def test_what_is_no_yes_is_a_no(manager: FakeManager, verdict: Verdict) -> None:
    async def nothing() -> None:
        pass

    with pytest.raises(NotAuthorized, match="reset-own"):
        await Operations(manager, str).reset(SlowCaller(verdict, nothing), manager.get("live"), {})
    assert not manager.jobs
