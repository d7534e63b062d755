"""Cockpit on a port of the loopback device, with our page, and without a login."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PACKAGING = Path(__file__).parents[2] / "packaging"
_SERVER = "/usr/lib/cockpit/cockpit-ws"
_PAGE = "/cockpit/@localhost/sessiond/index.html"
_BOUND = 30.0


def install_page(data: Path) -> None:
    """Put the page, with its translations, where Cockpit looks for it below a data directory."""
    page = data / "cockpit/sessiond"
    shutil.copytree(PACKAGING / "cockpit", page)
    subprocess.run([PACKAGING / "cockpit-translations", page], check=True)


@contextmanager
def start_cockpit(
    data: Path, environment: Mapping[str, str], *, user: int | None = None
) -> Iterator[str]:
    """Yield the address of the page, in a Cockpit of that user's; `data` has the page."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [_SERVER, "--local-session=cockpit-bridge", "--address=127.0.0.1", f"--port={port}"],
        env={**environment, "XDG_DATA_HOME": str(data), "HOME": str(data)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        user=user,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + _BOUND
        while not _listens(port):
            assert process.poll() is None, "cockpit-ws has ended"
            assert time.monotonic() < deadline, "cockpit-ws does not listen"
        yield f"http://127.0.0.1:{port}{_PAGE}"
    finally:
        process.terminate()
        process.wait(_BOUND)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
