"""Programs in a session over a whole root file system: this machine's."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.users import NOBODY

COMPILE = """
mkdir /srv/project && cd /srv/project
cat >greet.h <<'C'
const char *greeting(void);
C
cat >greet.c <<'C'
#include "greet.h"
const char *greeting(void) { return "Hello."; }
C
cat >main.c <<'C'
#include <stdio.h>
#include "greet.h"
int main(void) { return puts(greeting()) < 0; }
C
printf 'greet: main.o greet.o\\n\\tcc -o $@ $^\\n' >Makefile
make --silent
./greet
"""

GIT = """
export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
git init --quiet /srv/origin && cd /srv/origin
for number in 1 2 3; do echo $number >file$number; git add .; git commit --quiet -m $number; done
git clone --quiet --no-local /srv/origin /srv/clone && cd /srv/clone
git gc --quiet
git fsck
git status --porcelain
git log --format=%s
"""

SQLITE = """
cd /srv
sqlite3 base 'PRAGMA journal_mode = WAL; CREATE TABLE t (n);'
for n in 1 2 3 4 5 6 7 8; do
    sqlite3 -cmd '.timeout 30000' base "INSERT INTO t VALUES ($n);" &
done
wait
sqlite3 base 'SELECT sum(n) FROM t; PRAGMA integrity_check;'
"""

TAR = """
mkdir /srv/from && cd /srv/from
echo text >file; ln file hard; ln -s file soft; mkfifo fifo; mknod null c 1 3; mkdir -m 3775 shared
chmod 4755 file; chown 1234:5678 soft -h; chown 42:43 shared
touch -d '2001-02-03 04:05:06.789' fifo
setfacl -m u:1234:rw hard; setfattr -n user.note -v kept file
tar --create --acls --xattrs --file ../archive . && mkdir ../to
tar --extract --acls --xattrs --same-owner --file ../archive --directory ../to
tar --compare --acls --xattrs --file ../archive --directory ../to
test ../to/file -ef ../to/hard
getfattr --only-values -n user.note ../to/file
"""


@pytest.fixture
def session(daemon: Daemon) -> Daemon:
    """A session of root's over the machine, ``box``."""
    daemon.sessionctl("create", "root", "machine", "--id", "box")
    return daemon


def test_a_compiler(session: Daemon) -> None:
    assert session.run("box", COMPILE) == "Hello.\n"


def test_git(session: Daemon) -> None:
    assert session.run("box", GIT).split() == ["3", "2", "1"]


def test_sqlite_with_several_writers(session: Daemon) -> None:
    assert session.run("box", SQLITE).split() == ["wal", "36", "ok"]


def test_tar_with_all_that_it_can_keep(session: Daemon) -> None:
    assert session.run("box", TAR) == "kept"


def test_the_host_is_not_changed(session: Daemon) -> None:
    session.run("box", "rm /etc/passwd; echo >/srv/from-inside")
    assert Path("/etc/passwd").exists()
    assert not Path("/srv/from-inside").exists()
    assert session.differences("box") == {"/etc/passwd": "deleted", "/srv/from-inside": "added"}


def test_a_users_session_is_the_users(daemon: Daemon) -> None:
    daemon.sessionctl("create", "nobody", "machine", "--id", "box")
    assert daemon.run("box", "id -u; touch /tmp/mine; stat -c %u /tmp/mine").split() == [
        str(NOBODY),
        str(NOBODY),
    ]
    daemon.run("box", "touch /etc/mine", code=1)
    daemon.run("box", "cp /usr/bin/id /tmp/id && chmod u+s /tmp/id")
    assert "nosuid" in mount_options(daemon.root("box"))


def mount_options(mount_point: Path) -> list[str]:
    with open("/proc/self/mountinfo", encoding="utf-8") as table:
        fields = [line.split(" ") for line in table]
    (options,) = (line[5] for line in fields if line[4] == str(mount_point))
    return options.split(",")


def test_a_session_can_be_closed_while_somebody_is_inside(session: Daemon) -> None:
    """The namespaces of those inside do not keep the mount alive."""
    with session.inside("box", "echo ready; cat; ls /") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        session.sessionctl("close", "box")
        assert not any("/sessions/box/" in mount for mount in session.mounts())
        process.communicate(timeout=60)


def test_a_shell_is_the_users_login_shell(session: Daemon) -> None:
    done = session.sessionctl("shell", "box", code=3, typed="echo $0; pwd; exit 3\n")
    account = pwd.getpwuid(0)
    assert done.stdout.split() == [f"-{os.path.basename(account.pw_shell)}", account.pw_dir]


def test_exit_codes_of_commands_come_through(session: Daemon) -> None:
    session.run("box", "exit 42", code=42)
    session.sessionctl("run", "box", "--", "no-such-command", code=127)
    session.sessionctl("run", "box", "--", "/etc/passwd", code=126)
