"""The configuration: what is read, and how mistakes are named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sessiond.config import Config, load, seconds
from sessiond.errors import ConfigError


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


def test_a_full_configuration(tmp_path: Path) -> None:
    config = load(
        write(
            tmp_path / "sessiond.toml",
            """
            [daemon]
            state_directory = "/srv/state"
            runtime_directory = "/srv/run"

            [profile.guest]
            image = "/srv/image.squashfs"
            verity_root_hash = "0123456789abcdef0123456789abcdef"
            verity_hash_device = "/srv/image.verity"
            storage = "tmpfs"
            size = "512M"
            inodes = 100_000
            mount_point = "/home/{user}/{uid}-{id}"
            cgroup = "user.slice/user-{uid}.slice"
            nosuid = false
            nodev = true

            [profile.desktop]
            image = "/"
            storage = "persistent"

            [session.kiosk]
            user = "kiosk"
            profile = "guest"
            """,
        )
    )
    guest = config.profile["guest"]
    assert guest.image == Path("/srv/image.squashfs")
    assert guest.verity_hash_device == Path("/srv/image.verity")
    assert (guest.size, guest.inodes, guest.nosuid, guest.nodev) == ("512M", 100_000, False, True)
    assert guest.mount_point == "/home/{user}/{uid}-{id}"
    assert guest.cgroup == "user.slice/user-{uid}.slice"
    assert config.profile["desktop"].storage == "persistent"
    assert config.session["kiosk"].user == "kiosk"
    assert config.daemon.state_directory == Path("/srv/state")


def test_an_empty_configuration_has_the_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path / "sessiond.toml", ""))
    assert config == Config()
    assert config.daemon.runtime_directory == Path("/run/sessiond")
    assert config.daemon.state_directory == Path("/var/lib/sessiond")


def test_later_files_add_tables_and_override_keys(tmp_path: Path) -> None:
    file = write(tmp_path / "sessiond.toml", '[profile.a]\nimage = "/a"\nsize = "1G"\n')
    drop_ins = tmp_path / "sessiond.conf.d"
    write(drop_ins / "20.toml", '[profile.a]\nimage = "/twenty"\n')
    write(drop_ins / "10.toml", '[profile.a]\nimage = "/ten"\n[profile.b]\nimage = "/b"\n')
    write(drop_ins / "30.toml.disabled", "this is not TOML")
    config = load(file)
    assert config.profile["a"].image == Path("/twenty")
    assert config.profile["a"].size == "1G"
    assert config.profile["b"].image == Path("/b")
    other = write(tmp_path / "other" / "x.toml", '[profile.c]\nimage = "/c"\n')
    assert set(load(file, other.parent).profile) == {"a", "c"}


IMAGE = '[profile.p]\nimage = "/i"\n'

MISTAKES = {
    "[daemon]\nstate_directory = 'relative'": "daemon.state_directory: an absolute path",
    "[daemon]\ncolour = 1": "daemon.colour: is unknown; allowed are: state_directory, runtime",
    "colour = 1": "colour: is unknown; allowed are: daemon, profile, session, login, guests.",
    "daemon = 1": "daemon: input should be a valid dictionary",
    "[profile.p]": "profile.p.image: is missing.",
    "[profile.p]\nimage = 5": "profile.p.image: an absolute path without '..' is needed.",
    "[profile.p]\nimage = '/a/../b'": "profile.p.image: an absolute path without '..' is needed.",
    '[profile.p]\nimage = "/a\\u0000b"': "profile.p.image: a path without NUL is needed.",
    "[profile.'a b']\nimage = '/i'": "profile.a b: a name is 1 to 64 letters",
    f"[profile.{'x' * 65}]\nimage = '/i'": "a name is 1 to 64 letters",
    IMAGE + "storage = 'disk'": "profile.p.storage: input should be 'tmpfs' or 'persistent'",
    IMAGE + "size = '12X'": "profile.p.size: a size is like '512M'",
    IMAGE + "size = '0%'": "profile.p.size: a size is like '512M'",
    IMAGE + "size = '101%'": "profile.p.size: a size is like '512M'",
    IMAGE + "size = '1G,mode=0777'": "profile.p.size: a size is like '512M'",
    IMAGE + "size = 512": "profile.p.size: input should be a valid string",
    IMAGE + "inodes = 1": "profile.p.inodes: input should be greater than or equal to 64",
    IMAGE + "inodes = '1000'": "profile.p.inodes: input should be a valid integer",
    IMAGE + "nosuid = 'yes'": "profile.p.nosuid: input should be a valid boolean",
    IMAGE + "storage = 'persistent'\nsize = '1G'": 'profile.p.size: that is for storage = "tmpfs"',
    IMAGE + "storage = 'persistent'\ninodes = 1000": "profile.p.inodes: that is for storage =",
    IMAGE + "verity_root_hash = 'XYZ'": "profile.p.verity_root_hash: a root hash is 32 to 128",
    IMAGE + "verity_hash_device = '/d'": "verity_hash_device: verity_root_hash is needed with it",
    IMAGE + "mount_point = 'relative'": "profile.p.mount_point: an absolute path",
    IMAGE + "mount_point = '/a/../b'": "profile.p.mount_point: an absolute path",
    IMAGE + "mount_point = '/'": "profile.p.mount_point: a directory below / is needed",
    IMAGE + "mount_point = '/{usr}'": "{usr} is unknown here; in braces may stand {id}, {user}",
    IMAGE + "mount_point = '/{}'": "{} is unknown here; in braces may stand",
    IMAGE + "mount_point = '/{id.x}'": "{id.x} is unknown here; in braces may stand",
    IMAGE + "mount_point = '/{id!r}'": "{id} is unknown here; in braces may stand",
    IMAGE + "mount_point = '/{id:9}'": "{id} is unknown here; in braces may stand",
    IMAGE + "mount_point = '/{id'": "in braces may stand {id}, {user}, {uid}",
    IMAGE + "cgroup = ''": "profile.p.cgroup: the path of a cgroup below the root",
    IMAGE + "cgroup = '/'": "profile.p.cgroup: the path of a cgroup below the root",
    IMAGE + "cgroup = '/user.slice'": "profile.p.cgroup: the path of a cgroup below the root",
    IMAGE + "cgroup = 'user.slice/../system.slice'": "profile.p.cgroup: the path of a cgroup",
    IMAGE
    + "cgroup = 'user-{gid}.slice'": "{gid} is unknown here; in braces may stand {id}, {user}",
    IMAGE
    + "[profile.p.snapshots]\ncount = 0": "profile.p.snapshots.count: input should be greater",
    IMAGE
    + "[profile.p.snapshots]\ncolour = 0": "colour: is unknown; allowed are: count, daily, max",
    IMAGE + "[profile.p.snapshots]\nmax_bytes = 'x'": "snapshots.max_bytes: a size is like '512M'",
    IMAGE + "[profile.p.snapshots]\nevery = '1s'": "snapshots.every: a time is like '30min', '1h'",
    IMAGE + "[profile.p.snapshots]\nflatten_above = -1": "flatten_above: input should be greater",
    IMAGE + "[profile.p.snapshots]\nflatten_above = 201": "flatten_above: input should be less",
    IMAGE + "snapshots = 1": "profile.p.snapshots: input should be a valid dictionary",
    "[session.s]\nuser = 'u'": "session.s.profile: is missing",
    "[session.s]\nuser = ''\nprofile = 'p'": "session.s.user: string should have at least 1",
    "[session.'../s']\nuser = 'u'\nprofile = 'p'": "a name is 1 to 64 letters",
    IMAGE
    + "[session.s]\nuser = 'u'\nprofile = 'q'": "there is no profile 'q'; the profiles are: p.",
}


@pytest.mark.parametrize("text", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_names_file_key_and_what_is_allowed(tmp_path: Path, text: str) -> None:
    file = write(tmp_path / "sessiond.toml", text)
    with pytest.raises(ConfigError, match=re.escape(MISTAKES[text])) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_mistake_is_looked_for_in_the_right_file(tmp_path: Path) -> None:
    file = write(tmp_path / "sessiond.toml", IMAGE + "size = '5'\nstorage = 'persistent'")
    drop_ins = tmp_path / "sessiond.conf.d"
    ten = write(drop_ins / "10.toml", "[profile.p]\nsize = '12X'\n[profile.q]\nnodev = true\n")
    twenty = write(drop_ins / "20.toml", "[profile.q]\nnosuid = 3\n[session.s]\nprofile = 'r'\n")
    with pytest.raises(ConfigError) as caught:
        load(file)
    lines = str(caught.value).splitlines()
    assert {line.split(": ")[0] + ": " + line.split(": ")[1] for line in lines} == {
        f"{ten}: profile.p.size",
        f"{ten}: profile.q.image",
        f"{twenty}: profile.q.nosuid",
        f"{twenty}: session.s.user",
    }


def test_times_are_in_words() -> None:
    assert [seconds(text) for text in ("2min", "1h", "30d")] == [120, 3600, 30 * 86400]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml: cannot be read: No such file.*--config"):
        load(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)
    file = write(tmp_path / "sessiond.toml", "a = \n")
    with pytest.raises(ConfigError, match=r"sessiond\.toml: is not valid TOML: .*line 1"):
        load(file)
    file.write_bytes(b"# \xff")
    with pytest.raises(ConfigError, match="is not UTF-8 at byte 2"):
        load(file)
    file.write_text("")
    bad = write(tmp_path / "sessiond.conf.d" / "1.toml", "[")
    with pytest.raises(ConfigError, match=re.escape(f"{bad}: is not valid TOML")):
        load(file)
