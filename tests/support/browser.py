"""Chromium without a window, driven by its DevTools protocol over a pipe."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = "chromium-headless-shell"
BOUND = 60.0
"""Seconds within which something comes about, or else the test fails."""

_OPTIONS = (
    "--headless",
    "--no-sandbox",  # tests run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# Chromium reads commands from descriptor 3, and answers on 4.
_TEXT = "(document.body?.innerText ?? '')"
_START = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'


class Browser:
    """One page. What goes wrong in its scripts is in `complaints`."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands = commands
        self._answers = answers
        self._unread = b""
        self._last = 0
        self._session: str | None = None
        self._context = ""
        self.complaints: list[str] = []

    def begin_anew(self) -> None:
        """Have an empty page, and nothing known of what was shown before: no cookies."""
        self._session = None
        if self._context:
            self._call("Target.disposeBrowserContext", browserContextId=self._context)
        self.complaints.clear()
        self._context = self._call("Target.createBrowserContext")["browserContextId"]
        target = self._call(
            "Target.createTarget", url="about:blank", browserContextId=self._context
        )["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, address: str, *, language: str = "en", width: int = 1200) -> None:
        """Go to a page, as somebody who reads that language."""
        self._call("Network.setExtraHTTPHeaders", headers={"Accept-Language": language})
        self._call("Network.setCookie", name="CockpitLang", value=language.lower(), url=address)
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=False,
        )
        self._call("Page.navigate", url=address)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript, which JSON can tell."""
        answer = self._call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Return the value of an expression once there is one that is true."""
        deadline = time.monotonic() + BOUND
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"{expression}: never; {self.text()}"
        return value

    def text(self) -> str:
        """Return what can be read on the page."""
        text = self.evaluate(_TEXT)
        assert isinstance(text, str)
        return text

    def shows(self, *texts: str) -> None:
        """Wait until all of these can be read."""
        told = json.dumps(texts)
        self.wait(f"{told}.every(one => {_TEXT}.includes(one))")

    def hides(self, text: str) -> None:
        """Wait until this cannot be read any more."""
        self.wait(f"!{_TEXT}.includes({json.dumps(text)})")

    def click(self, selector: str, text: str = "") -> None:
        """Click, with a pointer, in the middle of the first element that has this text.

        The page may move between a look at it and the click: what has missed is tried again.
        """
        found = (
            f"[...document.querySelectorAll({json.dumps(selector)})].find("
            "e => e.offsetParent !== null && !e.disabled"
            f" && e.innerText.includes({json.dumps(text)}))"
        )
        where = (
            f"(() => {{ const e = {found}; if (!e) return null;"
            "e.scrollIntoView({block: 'nearest'});"
            "window.hit = false;"
            "e.addEventListener('click', () => { window.hit = true; },"
            " {capture: true, once: true});"
            "const r = e.getBoundingClientRect();"
            "const at = [r.x + r.width / 2, r.y + r.height / 2];"
            "return e.contains(document.elementFromPoint(...at)) ? at : null; })()"
        )
        while True:
            x, y = self.wait(where)
            for kind in ("mousePressed", "mouseReleased"):
                self._call(
                    "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1
                )
            if self.evaluate("window.hit"):
                return

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self._call("Input.insertText", text=text)

    def press_escape(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self._call(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Escape",
                code="Escape",
                windowsVirtualKeyCode=27,
            )

    def screenshot(self, file: Path) -> None:
        image = self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(image))

    def _call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._last += 1
        message: dict[str, object] = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        details = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(details["exceptionDetails"]))
            case "Log.entryAdded" if details["entry"]["level"] == "error":
                self.complaints.append(json.dumps(details["entry"]))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            readable, _, _ = select.select([self._answers], [], [], BOUND)
            part = os.read(self._answers, 1 << 16) if readable else b""
            assert part, "Chromium does not answer"
            self._unread += part
        message, _, self._unread = self._unread.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        return told


@contextmanager
def start_browser() -> Iterator[Browser]:
    """Yield a browser with nothing in its profile."""
    profile = tempfile.mkdtemp(prefix="browser-", dir="/var/tmp")
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    program = [PROGRAM, *_OPTIONS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        ["bash", "-c", _START, "bash", str(commands), str(answers), *program],
        pass_fds=[commands, answers],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(commands)
    os.close(answers)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        os.close(to_browser)  # so it ends
        process.wait(BOUND)
        os.close(from_browser)
        shutil.rmtree(profile)
