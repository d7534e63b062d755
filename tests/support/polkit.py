"""A polkitd of one's own, on a bus of one's own, with rules of one's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sessiond.bus.transport import ADDRESS_VARIABLE

ACTIONS = Path(__file__).parents[2] / "packaging/polkit/org.sessiond.overlay1.policy"
TRANSLATIONS = Path(__file__).parents[2] / "packaging/polkit-translations"
BUS_POLICY = Path("/usr/share/dbus-1/system.d/org.freedesktop.PolicyKit1.conf")
_PROGRAM = Path("/usr/lib/polkit-1/polkitd")
_BOUND = 30.0

# In a mount namespace of its own, since it reads its files from where the system has them.
_START = """
mount --bind "$1" /usr/share/polkit-1/actions
for rules in /etc/polkit-1/rules.d /usr/share/polkit-1/rules.d; do
    if [ -d $rules ]; then mount --bind "$2" $rules; fi
done
exec "$3" --no-debug
"""


def translated_policy(directory: Path) -> Path:
    """Make in `directory` what packaging/install installs."""
    target = directory / ACTIONS.name
    subprocess.run([TRANSLATIONS, target], check=True)
    return target


@contextmanager
def start_polkit(
    directory: Path, address: str, *, rules: str = "", policy: Path = ACTIONS
) -> Iterator[None]:
    """Run polkitd on the bus at `address`, with its files in `directory`, and our actions.

    `rules` is JavaScript; what is shipped with the system does not apply.
    """
    if not _PROGRAM.exists():
        pytest.skip("polkitd is missing")
    actions, rule_files = directory / "actions", directory / "rules"
    actions.mkdir()
    rule_files.mkdir()
    shutil.copy(policy, actions)
    (rule_files / "10-test.rules").write_text(rules)
    log = directory / "polkitd.log"
    environment = {"PATH": os.environ["PATH"], ADDRESS_VARIABLE: address}
    private = ["unshare", "--mount", "--propagation", "private"]
    with open(log, "wb") as complaints:
        process = subprocess.Popen(
            [*private, "sh", "-euc", _START, "polkit", actions, rule_files, _PROGRAM],
            env=environment,
            stdout=complaints,
            stderr=complaints,
        )
    try:
        ask = ["busctl", "--quiet", "call", "org.freedesktop.DBus", "/org/freedesktop/DBus"]
        name = ["org.freedesktop.DBus", "GetNameOwner", "s", "org.freedesktop.PolicyKit1"]
        deadline = time.monotonic() + _BOUND
        while subprocess.call([*ask, *name], env=environment, stderr=subprocess.DEVNULL):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
        yield
    finally:
        process.terminate()
        process.wait()
