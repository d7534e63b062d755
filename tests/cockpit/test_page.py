"""The page, used with a pointer and a keyboard."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from tests.support.browser import Browser
from tests.support.cockpit import start_cockpit
from tests.support.daemon import Daemon
from tests.support.users import NOBODY

MARKUP = "<img src=x onerror=document.title='owned'>"
STUBBORN = "trap '' TERM; echo ready; read line"
"""A program that SIGTERM does not end."""


def test_sessions_and_snapshots(
    daemon: Daemon, page: str, browser: Browser, keep_screenshot: Callable[[str], None]
) -> None:
    """Look, keep a snapshot, reset, go back, and delete."""
    browser.open(page)
    browser.shows("There are no sessions.")
    daemon.sessionctl("create", "daemon", "guest", "--id", "desk")
    browser.shows("desk", "daemon", "guest", "in RAM", "active", "0 B of 64 MiB (0%)")
    (daemon.root("desk") / "home/film").write_bytes(b"x" * (32 << 20))
    (daemon.root("desk") / "home" / MARKUP.replace("/", "")).write_bytes(b"x")
    browser.shows("32 MiB of 64 MiB (50%)")
    browser.click("button.toggle", "desk")
    browser.shows("2 added; 32 MiB in files", "/home/film (32 MiB)", MARKUP, "There are none.")
    keep_screenshot("session")

    browser.click("button", "Make a snapshot…")
    browser.click("dialog input[name=name]")
    browser.type("with a slash/")
    browser.click("dialog button", "Make a snapshot")
    browser.shows("is no snapshot name")
    keep_screenshot("refused")
    browser.evaluate("document.querySelector('dialog input[name=name]').value = ''")
    browser.click("dialog input[name=name]")
    browser.type("monday")
    browser.click("dialog input[name=description]")
    browser.type("before the exam")
    browser.click("dialog button", "Make a snapshot")
    browser.wait("document.querySelector('dialog') === null")
    browser.shows("monday", "before the exam", "32 MiB")

    browser.click("tr button", "Reset")
    browser.shows("Reset desk?", "Now none does.")
    browser.press_escape()
    browser.hides("Reset desk?")
    assert daemon.sessions()["desk"]["last_reset"] is None
    browser.click("tr button", "Reset")
    browser.click("dialog input[name=snapshot-first]")
    browser.click("dialog button", "Reset")
    browser.shows("Nothing differs from the image.", "before-reset-", "automatic")
    assert os.listdir(daemon.root("desk") / "home") == []
    keep_screenshot("reset")

    browser.click("tr[data-key$=monday] button", "Restore…")
    browser.shows("Restore monday?")
    browser.click("dialog button", "Restore")
    browser.shows("2 added; 32 MiB in files")
    assert (daemon.root("desk") / "home/film").stat().st_size == 32 << 20

    browser.click("tr[data-key$=monday] button", "Delete…")
    browser.shows("What only this snapshot keeps is lost.")
    browser.click("dialog button", "Delete")
    browser.hides("before the exam")

    daemon.sessionctl("close", "desk")
    browser.shows("There are no sessions.")
    assert browser.evaluate("document.title") == "Sessions"


def test_programs_and_jobs(
    daemon: Daemon, page: str, browser: Browser, keep_screenshot: Callable[[str], None]
) -> None:
    """A reset that ends programs names them, shows how far it is, and can be cancelled."""
    daemon.sessionctl("create", "daemon", "machine", "--id", "desk")
    browser.open(page)
    with daemon.inside("desk", STUBBORN) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        browser.click("tr button", "Reset")
        browser.shows("Now these do: sh (")
        browser.click("dialog input[name=terminate]")
        keep_screenshot("programs")
        browser.click("dialog button", "Reset")
        browser.wait("document.querySelector('.job progress') !== null")
        keep_screenshot("job")
        browser.click(".job button", "Cancel")
        browser.shows("Reset has failed.", "active")
        keep_screenshot("cancelled")
        process.send_signal(signal.SIGKILL)


def test_maintenance(
    daemon: Daemon, page: str, browser: Browser, keep_screenshot: Callable[[str], None]
) -> None:
    browser.open(page)
    for ending, question in (
        ("Give up", "Give up…"),
        ("Make the new image", "Make the new image…"),
    ):
        browser.click("button", "Begin maintenance…")
        browser.shows("Message to users")
        browser.click("dialog input[name=message]")
        browser.type("Back at noon.")
        browser.click("dialog button", "Begin maintenance")
        browser.shows("The image of guest is being maintained", "Back at noon.", "on disk")
        (daemon.root("maintenance") / "etc/motd").write_text("Better.\n")
        keep_screenshot("maintenance")
        browser.click(".maintenance button", question)
        browser.click("dialog button", ending)
        browser.shows("There are no sessions.", "Begin maintenance…")
    daemon.sessionctl("create", "daemon", "guest", "--id", "desk")
    assert (daemon.root("desk") / "etc/motd").read_text() == "Better.\n"


def test_sessiond_goes_and_comes(
    daemon: Daemon, page: str, browser: Browser, keep_screenshot: Callable[[str], None]
) -> None:
    """It says what to do, and goes on by itself."""
    daemon.sessionctl("create", "daemon", "guest", "--id", "desk")
    browser.open(page)
    browser.shows("desk")
    daemon.leave()
    browser.shows("sessiond does not answer", "'systemctl start sessiond' starts it")
    keep_screenshot("away")
    browser.click("button", "Try again")
    browser.shows("sessiond does not answer")
    daemon.start()
    browser.shows("desk", "active")
    daemon.sessionctl("snapshot", "desk", "monday")
    browser.click("button.toggle", "desk")
    browser.shows("monday")


def test_limited_access(
    daemon: Daemon, browser: Browser, keep_screenshot: Callable[[str], None]
) -> None:
    """Somebody without administrative access is told so, and may do what owners may."""
    daemon.sessionctl("create", "nobody", "guest", "--id", "mine")
    daemon.sessionctl("create", "daemon", "guest", "--id", "other")
    with start_cockpit(daemon.directory / "data", daemon.environment, user=NOBODY) as page:
        browser.open(page)
        browser.shows("mine", "other", "You have limited access")
        browser.click("button.toggle", "mine")
        browser.shows("Nothing differs from the image.")  # what is below has moved by then
        browser.click("button.toggle", "other")
        browser.shows("you may not see what has changed")
        browser.click("tr[data-key$=other] button", "Reset")
        browser.click("dialog button", "Reset")
        browser.shows("you may not reset this session", "that takes administrative access")
        keep_screenshot("limited")
        browser.press_escape()
        browser.click("tr[data-key$=mine] button", "Reset")
        browser.click("dialog button", "Reset")
        browser.wait("document.querySelector('dialog') === null")
    assert daemon.sessions()["other"]["last_reset"] is None
    assert daemon.sessions()["mine"]["last_reset"] is not None


def test_languages(
    daemon: Daemon, page: str, browser: Browser, keep_screenshot: Callable[[str], None]
) -> None:
    """Those of Cockpit's user; names and numbers come as each has them."""
    daemon.sessionctl("create", "daemon", "guest", "--id", "desk")
    for language, title, full in (
        ("de-de", "Sitzungen", "0 B von 64 MiB (0\u00a0%)"),
        ("es-es", "Sesiones", "0 B de 64 MiB (0\u00a0%)"),
        ("fr-fr", "Sessions", "0 B sur 64 MiB (0"),
        ("zh-cn", "会话", "0 B / 64 MiB\uff080%\uff09"),
        ("en-us", "Sessions", "0 B of 64 MiB (0%)"),
    ):
        browser.open(page, language=language)
        browser.shows(title, full)
        browser.click("button.toggle", "desk")
        browser.wait("document.querySelector('.changes ul') !== null")
        keep_screenshot(language)


def test_small_and_dark(
    daemon: Daemon, page: str, browser: Browser, keep_screenshot: Callable[[str], None]
) -> None:
    """Nothing is wider than the screen of a telephone, and the colours are those of Cockpit."""
    daemon.sessionctl("create", "daemon", "guest", "--id", "desk")
    browser.open(page, width=400)
    browser.shows("desk")
    browser.evaluate("localStorage.setItem('shell:style', 'dark')")
    browser.open(page, width=400)
    browser.click("button.toggle", "desk")
    browser.shows("Nothing differs from the image.")
    keep_screenshot("small")
    assert browser.evaluate("document.documentElement.scrollWidth") == 400
    colour = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colour == "rgb(15, 18, 20)"
