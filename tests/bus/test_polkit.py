"""Who may do what, decided by a real polkitd. There is no logind: nobody has a local session."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from sessiond.bus import connection, names, service
from sessiond.bus import polkit as polkit_module
from sessiond.bus.polkit import QUESTIONS_OF_USER
from sessiond.bus.transport import ADDRESS_VARIABLE
from sessiond.bus.wire import Message, Variant
from sessiond.errors import NotAuthorized
from tests.bus.fake_manager import FakeManager
from tests.bus.test_authorisation import (
    OWNER,
    OWNERS_OPERATIONS,
    POLICY,
    ROOTS_OPERATIONS,
    SESSION,
    STRANGER,
    Call,
    call,
)
from tests.support.bus import start_private_bus
from tests.support.polkit import BUS_POLICY, start_polkit, translated_policy
from tests.support.waiting import BOUND, until

pytestmark = pytest.mark.root

CHECKOUT = Path(__file__).parents[2]
RESET: Call = (SESSION, names.SESSION, "Reset", ("a{sv}", "0"))
PERSIST: Call = (SESSION, names.SESSION, "Persist", ("a{sv}", "0"))
CHANGES: Call = (SESSION, names.SESSION, "Changes", ("a{sv}", "0"))

HARMLESS = {
    "Changes",
    "Committed",
    "Conflicts",
    "Inhibit",
    "OpenDiff",
    "OpenShadowed",
    "PendingFiles",
}
"""What takes no password of owners, wherever they are."""

Start = Callable[[str], None]


@pytest.fixture
def polkit(bus_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Call it with rules to have polkit on a bus like the system's."""
    if os.geteuid() != 0:
        pytest.skip("polkitd takes root")
    with ExitStack() as stack:
        policies = [POLICY, BUS_POLICY]
        address = stack.enter_context(start_private_bus(bus_directory, policy_files=policies))
        monkeypatch.setenv(ADDRESS_VARIABLE, address)

        def start(rules: str) -> None:
            stack.enter_context(start_polkit(bus_directory, address, rules=rules))

        yield start


def test_polkit_speaks_the_language_of_who_asks(
    bus_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = translated_policy(tmp_path)
    with (
        start_private_bus(bus_directory, policy_files=[POLICY, BUS_POLICY]) as address,
        start_polkit(bus_directory, address, policy=policy),
    ):
        ask = ["busctl", "call", "org.freedesktop.PolicyKit1"]
        authority = "org.freedesktop.PolicyKit1.Authority"
        path = authority.rpartition(".")[0].replace(".", "/")
        for locale, expected in (
            ("de_DE.UTF-8", "Die eigene Sitzung auf ihr Abbild zurücksetzen"),
            ("", "Reset one's own session to its image"),
        ):
            done = subprocess.run(
                [*ask, f"/{path}/Authority", authority, "EnumerateActions", "s", locale],
                env={**os.environ, ADDRESS_VARIABLE: address},
                stdout=subprocess.PIPE,
                check=True,
            )
            assert expected.encode() in _unquoted(done.stdout)


def _unquoted(told: bytes) -> bytes:
    """Return what busctl has printed without its escapes."""
    return told.decode("unicode_escape").encode("latin-1")


@pytest.fixture
async def guarded(polkit: Start, manager: FakeManager, nursery: trio.Nursery) -> FakeManager:
    """A session with a snapshot, served on that bus."""
    await manager.sessions["live"].snapshots.make("fresh")
    await nursery.start(service.serve, manager)
    return manager


@pytest.mark.parametrize("uid", [OWNER, STRANGER])
async def test_from_elsewhere_it_takes_a_password(
    uid: int, polkit: Start, guarded: FakeManager
) -> None:
    polkit("")
    for operation in OWNERS_OPERATIONS + ROOTS_OPERATIONS:
        code, said = await call(uid, *operation)
        if uid == OWNER and operation[2] in HARMLESS:
            assert code == 0, said
        else:
            assert code != 0, operation
            assert f"As uid {uid} you may" in said, said
            assert "after authentication only" in said
    assert not guarded.jobs
    assert list(guarded.sessions["live"].snapshots) == ["fresh"]


async def test_root_may_all_whatever_polkit_says(polkit: Start, guarded: FakeManager) -> None:
    polkit("polkit.addRule(function(action, subject) { return polkit.Result.NO; });")
    guarded.jobs_finish_at_once = True
    code, said = await call(0, *RESET)
    assert code == 0, said


RULES = """
polkit.addRule(function(action, subject) {
    if (action.id == "org.sessiond.overlay1.reset-other" && subject.user == "daemon"
        && action.lookup("session") == "live" && action.lookup("user") == "nobody"
        && action.lookup("profile") == "live") return polkit.Result.YES;
    if (action.id == "org.sessiond.overlay1.create" && subject.user == "daemon"
        && action.lookup("user") == "nobody" && action.lookup("profile") == "live")
        return polkit.Result.YES;
    if (action.id == "org.sessiond.overlay1.persist-own") return polkit.Result.NO;
});
"""


async def test_rules_decide_by_session_user_and_profile(
    polkit: Start, guarded: FakeManager
) -> None:
    polkit(RULES)
    guarded.jobs_finish_at_once = True
    code, said = await call(STRANGER, *RESET)
    assert code == 0, said
    code, said = await call(STRANGER, *ROOTS_OPERATIONS[0])
    assert code == 0, said
    assert list(guarded.sessions) == ["live", "nobody-1"]
    for uid, operation in ((OWNER, RESET), (STRANGER, CHANGES), (OWNER, ROOTS_OPERATIONS[0])):
        code, said = await call(uid, *operation)
        assert code != 0
        assert "after authentication only" in said
    code, said = await call(OWNER, *PERSIST)
    assert code != 0
    assert "polkit refuses org.sessiond.overlay1.persist-own" in said
    assert len(guarded.jobs) == 1


async def test_the_documented_rules_do_what_they_say(polkit: Start, guarded: FakeManager) -> None:
    rules = (CHECKOUT / "docs/dbus.md").read_text().partition("```js")[2].partition("```")[0]
    polkit(
        rules.replace('"guest"', '"nobody"').replace('"kiosk"', '"live"').replace("staff", "bin")
    )
    guarded.jobs_finish_at_once = True
    code, said = await call(OWNER, *RESET)
    assert code == 0, said
    code, said = await call(OWNER, *PERSIST)
    assert "polkit refuses org.sessiond.overlay1.persist-own" in said
    code, said = await call(pwd.getpwnam("bin").pw_uid, *RESET)
    assert code == 0, said
    code, said = await call(STRANGER, *RESET)
    assert "after authentication only" in said


async def test_without_an_answer_nobody_may(
    polkit: Start, guarded: FakeManager, bus_directory: Path
) -> None:
    polkit("")
    for file in (bus_directory / "actions").iterdir():
        file.unlink()

    # polkit sees by inotify that there are no actions any more.
    said = "after authentication"
    while "after authentication" in said:
        code, said = await call(OWNER, *RESET)
    assert code != 0
    assert "polkit does not answer for org.sessiond.overlay1.reset-own" in said
    assert not guarded.jobs


AGENT = """
import json, os, sys, trio
from sessiond.bus import names
from sessiond.bus.connection import connect
from sessiond.bus.wire import BusError, Variant

AUTHORITY = (
    "org.freedesktop.PolicyKit1",
    "/org/freedesktop/PolicyKit1/Authority",
    "org.freedesktop.PolicyKit1.Authority",
)

def say(**what):
    print(json.dumps(what), flush=True)

async def reset(caller):
    try:
        await caller.call(names.BUS, sys.argv[1], names.SESSION, "Reset", "a{sv}", {},
                          interactive=True)
        say(done=True)
    except BusError as error:
        say(error=error.name, text=error.text)

async def main():
    answered = trio.Event()
    command = ""

    async def handle(connection, message):
        if message.member == "CancelAuthentication":
            say(withdrawn=message.values()[0])
            answered.set()
            return "", ()
        action, text, icon, details, cookie, identities = message.values()
        say(action=action, text=text, icon=icon, cookie=cookie)
        await answered.wait()
        if command == "dismiss":
            raise BusError("org.freedesktop.PolicyKit1.Error.Cancelled", "dismissed")
        return "", ()

    async with connect(handler=handle) as agent:
        # The fields of /proc/PID/stat after the name, which is in parentheses.
        started = int(open("/proc/self/stat").read().rpartition(")")[2].split()[19])
        process = {
            "pid": Variant("u", os.getpid()),
            "start-time": Variant("t", started),
            "uid": Variant("i", os.getuid()),
        }
        await agent.call(*AUTHORITY, "RegisterAuthenticationAgent", "(sa{sv})ss",
                         ("unix-process", process), "C", "/agent")
        async with connect() as caller, trio.open_nursery() as nursery:
            for _ in range(int(sys.argv[2])):
                nursery.start_soon(reset, caller)
            command = (await trio.to_thread.run_sync(sys.stdin.readline)).strip()
            if command == "leave":
                nursery.cancel_scope.cancel()
            else:
                answered.set()
        await trio.to_thread.run_sync(sys.stdin.readline)

trio.run(main)
"""


class Desktop:
    """A process of OWNER with an authentication agent, which has asked for resets."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._said = b""

    async def said(self) -> dict[str, object]:
        """Return what it tells next."""
        assert self._process.stdout is not None
        with trio.fail_after(BOUND):
            while b"\n" not in self._said:
                part = await self._process.stdout.receive_some()
                assert part, "it has ended"
                self._said += part
        line, _, self._said = self._said.partition(b"\n")
        told = json.loads(line)
        assert isinstance(told, dict)
        return told

    async def do(self, command: str) -> None:
        """Have its user ``answer`` or ``dismiss`` the question, or its program ``leave``."""
        assert self._process.stdin is not None
        await self._process.stdin.send_all(command.encode() + b"\n")


@asynccontextmanager
async def desktop(resets: int = 1) -> AsyncIterator[Desktop]:
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", AGENT, SESSION, str(resets)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        user=OWNER,
        group=OWNER,
        extra_groups=[],
        cwd=CHECKOUT,
    )
    try:
        yield Desktop(process)
    finally:
        process.kill()
        await process.wait()


async def authenticate(cookie: object) -> None:
    """Say to polkit, as its helper does after a look at the password, that all is well."""
    identity = ("unix-user", {"uid": Variant("u", OWNER)})
    async with connection.connect() as helper:
        await helper.call(
            "org.freedesktop.PolicyKit1",
            "/org/freedesktop/PolicyKit1/Authority",
            "org.freedesktop.PolicyKit1.Authority",
            "AuthenticationAgentResponse2",
            "us(sa{sv})",
            OWNER,
            cookie,
            identity,
        )


async def test_a_password_is_asked_for_if_the_caller_allows(
    polkit: Start, guarded: FakeManager
) -> None:
    polkit("")
    async with desktop() as owner:
        asked = await owner.said()
        assert asked["action"] == "org.sessiond.overlay1.reset-own"
        assert asked["text"] == "Authentication is required to reset the session live."
        assert asked["icon"] == "view-refresh"
        assert not guarded.jobs
        await authenticate(asked["cookie"])
        await owner.do("answer")
        assert await owner.said() == {"done": True}
    assert [job.started_by for job in guarded.jobs] == [OWNER]


async def test_a_question_may_be_dismissed(polkit: Start, guarded: FakeManager) -> None:
    polkit("")
    async with desktop() as owner:
        await owner.said()
        await owner.do("dismiss")
        said = await owner.said()
        assert said["error"] == names.ERRORS[NotAuthorized]
    assert not guarded.jobs


async def test_a_question_is_withdrawn_when_the_caller_leaves(
    polkit: Start, guarded: FakeManager
) -> None:
    polkit("")
    async with desktop() as owner:
        asked = await owner.said()
        await owner.do("leave")
        assert await owner.said() == {"withdrawn": asked["cookie"]}
    assert not guarded.jobs


async def test_nobody_is_asked_many_questions_at_once(polkit: Start, guarded: FakeManager) -> None:
    polkit("")
    async with desktop(QUESTIONS_OF_USER + 1) as owner:
        refused = await owner.said()
        while "error" not in refused:  # the questions come by another way
            refused = await owner.said()
        assert refused["error"] == names.LIMITS_EXCEEDED


# A fallback is what is used when the desktop has no agent; without logind, polkit finds none.
PKTTYAGENT = """#!/bin/sh
case "$*" in *" --fallback") exec /usr/bin/pkttyagent "$1" "$2" "$3" "$4";; esac
"""


async def test_sessionctl_asks_at_its_terminal(
    polkit: Start, guarded: FakeManager, bus_directory: Path
) -> None:
    polkit("")
    agent = bus_directory / "pkttyagent"
    agent.write_text(PKTTYAGENT)
    agent.chmod(0o755)
    terminal, inside = os.openpty()
    sessionctl = [sys.executable, "-m", "sessiond.cli.main", "reset", "live"]
    process = await trio.lowlevel.open_process(
        ["setsid", "--ctty", "--wait", *sessionctl],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        user=OWNER,
        group=OWNER,
        extra_groups=[],
        cwd=CHECKOUT,
        env=os.environ | {"PATH": f"{bus_directory}:{os.environ['PATH']}"},
    )
    os.close(inside)
    shown = b""
    async with trio.lowlevel.FdStream(terminal) as stream:
        with trio.fail_after(BOUND):
            while b"Authenticating as: nobody" not in shown:
                shown += await stream.receive_some()
            await stream.send_all(b"\x03")  # Ctrl-C
            assert await process.wait() == 128 + signal.SIGINT, shown
    assert b"Authentication is required to reset the session live." in shown
    assert not guarded.jobs


class Undecided:
    """What calls itself polkit, and gives no answer until the question is withdrawn."""

    def __init__(self) -> None:
        self.withdrawn = ""
        self._gone = trio.Event()

    async def handle(
        self, _connection: connection.Connection, message: Message
    ) -> connection.Reply:
        values = message.values()
        if message.member == "CancelCheckAuthorization":
            self.withdrawn = str(values[0])
            self._gone.set()
            return "", ()
        *_, flags, cancellation = values
        if flags:
            await self._gone.wait()
            assert self.withdrawn == cancellation
        return "(bba{ss})", [(False, True, {})]


async def test_a_question_that_nobody_answers_is_withdrawn(
    serving: FakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polkit_module, "PATIENCE", 0.01)
    undecided = Undecided()
    async with connection.connect(handler=undecided.handle) as authority:
        await authority.request_name("org.freedesktop.PolicyKit1")
        code, said = await call(OWNER, *RESET)
        assert code != 0
        assert "polkit refuses org.sessiond.overlay1.reset-own" in said
        await until(lambda: undecided.withdrawn)
    assert not serving.jobs


async def test_polkit_that_fails_is_no_polkit_that_is_missing(
    serving: FakeManager, caplog: pytest.LogCaptureFixture
) -> None:
    async with connection.connect() as authority:  # it has no such object
        await authority.request_name("org.freedesktop.PolicyKit1")
        for _ in range(2):
            code, said = await call(OWNER, *RESET)
            assert code != 0
            assert "polkit does not answer for org.sessiond.overlay1.reset-own" in said
    told = [record.message for record in caplog.records if "does not answer" in record.message]
    assert told == [
        "polkit does not answer: There is no object /org/freedesktop/PolicyKit1/Authority."
    ]
    code, said = await call(OWNER, *RESET)
    assert code == 0, said
    assert len(serving.jobs) == 1
