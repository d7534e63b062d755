"""Accounts that last until the next reboot, as JSON user records (https://systemd.io/USER_RECORD).

nss-systemd reads them from ``/run/userdb``, so that every program of the machine knows the user as
any other. None has a password: nss-systemd then tells one that nothing fits, so who wants to be
that user has to be root, or let in by a PAM stack that asks for none.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from sessiond.errors import NotSupported
from sessiond.session.accounts import Account

_REAL_NAME = "Guest"


class UserRecords(Protocol):
    """What guests ask of the system's directory of users. All functions block."""

    def is_taken(self, account: Account) -> bool:
        """Say whether there is a user or group of this name or number."""

    def publish(self, account: Account, home: Path, shell: Path) -> None:
        """Make a user, and a group of the same name and number.

        Raises `OSError`, and `NotSupported` if the system does not know them then.
        """

    def withdraw(self, account: Account) -> None:
        """Have it be no user any more; it is no error if it is none. Raises `OSError`."""

    def is_published(self, account: Account) -> bool:
        """Say whether it is one that was made here, and not withdrawn."""


class SystemUserRecords:
    """Implements `UserRecords`."""

    def __init__(self, directory: Path = Path("/run/userdb")) -> None:
        self._directory = directory

    def is_taken(self, account: Account) -> bool:
        name, number = account.name, account.uid
        look_ups = (
            partial(pwd.getpwnam, name),
            partial(pwd.getpwuid, number),
            partial(grp.getgrnam, name),
            partial(grp.getgrgid, number),
        )
        for look_up in look_ups:
            with suppress(KeyError):
                look_up()
                return True
        return False

    def publish(self, account: Account, home: Path, shell: Path) -> None:
        with suppress(FileExistsError):
            self._directory.mkdir(parents=True)
            self._directory.chmod(0o755)
        number = int(account.uid)
        self._write(
            account,
            "group",
            {"groupName": account.name, "gid": number, "disposition": "regular"},
        )
        self._write(
            account,
            "user",
            {
                "userName": account.name,
                "realName": _REAL_NAME,
                "uid": number,
                "gid": number,
                "homeDirectory": str(home),
                "shell": str(shell),
                "disposition": "regular",
            },
        )
        self._require_known(account)

    def _write(self, account: Account, kind: str, record: dict[str, str | int]) -> None:
        file = self._directory / f"{account.name}.{kind}"
        new = file.with_name(f".{file.name}")
        new.write_text(json.dumps(record) + "\n")
        new.chmod(0o644)
        new.rename(file)
        # By number it is found through a symbolic link: nss-systemd(8).
        os.symlink(file.name, self._directory / f"{account.uid}.{kind}")

    def _require_known(self, account: Account) -> None:
        try:
            known = pwd.getpwnam(account.name).pw_uid == account.uid
            known &= pwd.getpwuid(account.uid).pw_name == account.name
            known &= grp.getgrgid(account.uid).gr_name == account.name
        except KeyError:
            known = False
        if not known:
            raise NotSupported(
                f"This machine does not know users by their records in {self._directory}, as "
                "guests have. Install nss-systemd (Debian: libnss-systemd), and see that "
                "/etc/nsswitch.conf has 'systemd' for passwd, group and shadow."
            )

    def withdraw(self, account: Account) -> None:
        for kind in ("user", "group"):
            for name in (f"{account.uid}.{kind}", f"{account.name}.{kind}"):
                for file in (name, f".{name}"):
                    (self._directory / file).unlink(missing_ok=True)

    def is_published(self, account: Account) -> bool:
        return (self._directory / f"{account.uid}.user").is_symlink()
