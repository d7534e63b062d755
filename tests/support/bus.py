"""A message bus of one's own, like the system bus but in a directory of the test's."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_OPEN_TO_ALL = """
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true"/>
    <allow receive_sender="*"/>
  </policy>
"""

# What Debian's /usr/share/dbus-1/system.conf has by default, before it includes packages' policies.
_LIKE_THE_SYSTEM_BUS = """
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
  </policy>
"""

_CONFIGURATION = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>{listen}</listen>
  <auth>EXTERNAL</auth>
  {policy}
</busconfig>
"""


@contextmanager
def start_private_bus(
    directory: Path, *, policy_files: Sequence[Path] = (), address: str = ""
) -> Iterator[str]:
    """Run a dbus-daemon with its files in `directory`, and yield its address.

    It lets everyone do everything, or, with `policy_files`, what a system bus and those allow.
    Callers without rights have to be able to search `directory`, which pytest's are not.
    """
    address = address or f"unix:path={directory}/bus"
    policy = _OPEN_TO_ALL
    if policy_files:
        included = "".join(f"<include>{file}</include>" for file in policy_files)
        policy = _LIKE_THE_SYSTEM_BUS + included
    configuration = directory / "bus.conf"
    configuration.write_text(_CONFIGURATION.format(listen=address, policy=policy))
    ready, told = os.pipe()
    log = directory / "bus.log"
    with open(log, "wb") as complaints:
        daemon = subprocess.Popen(
            [
                "dbus-daemon",
                f"--config-file={configuration}",
                "--nofork",
                f"--print-address={told}",
            ],
            pass_fds=[told],
            stderr=complaints,
            env={"PATH": os.environ["PATH"]},
        )
    try:
        os.close(told)
        with open(ready) as announcement:
            if not announcement.readline():
                raise RuntimeError(f"dbus-daemon did not start: {log.read_text()}")
        yield address
    finally:
        daemon.terminate()
        daemon.wait()
