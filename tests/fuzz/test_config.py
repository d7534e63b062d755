"""Configurations that nobody would write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sessiond import config
from sessiond.config import Config, Profile, cgroup_path
from sessiond.errors import ConfigError
from sessiond.session import ram
from tests.support.fuzzing import damaged, fuzz

_VALID = b"""
[daemon]
state_directory = "/srv/state"
volatile_limit = "85%"
[profile.guest]
image = "/srv/image.squashfs"
verity_root_hash = "0123456789abcdef0123456789abcdef"
size = "512M"
inodes = 100_000
mount_point = "/home/{user}/{uid}-{id}"
cgroup = "user.slice/user-{uid}.slice"
nosuid = false
[profile.desktop]
image = "/"
storage = "persistent"
quota = "20G"
quota_inodes = 4096
[session.kiosk]
user = "kiosk"
profile = "guest"
"""

_SCALARS = (
    st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    | st.from_regex(r"[1-9][0-9]{0,30}[KMGT%]?", fullmatch=True)
    | st.sampled_from(["/", "//", "/a", "/a/../b", "/{id}", "{", "{id!r}", "/{id:{uid}}", "none"])
)
_VALUES = _SCALARS | st.lists(_SCALARS, max_size=2)
_KEYS = st.sampled_from([*Profile.model_fields, "image", "image"]) | st.text(max_size=4)
_TABLES = st.dictionaries(
    st.sampled_from(["daemon", "profile.p", "session.s", 'profile."a b"', "other"]),
    st.dictionaries(_KEYS, _VALUES, max_size=5),
    max_size=3,
)


def _toml(tables: dict[str, dict[str, object]]) -> str:
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [
            f"{json.dumps(key)} = {json.dumps(value).replace('NaN', 'nan')}"
            for key, value in table.items()
        ]
    return "\n".join(lines).replace("Infinity", "inf").replace("\x7f", "")


def _load(file: Path, text: bytes) -> Config | None:
    file.write_bytes(text)
    try:
        return config.load(file)
    except ConfigError:
        return None


@given(st.binary(max_size=60) | damaged(_VALID))
@example(b"a = " + b"[" * 50_000)
@example(b"a = " + b"9" * 5000)
@fuzz(200)
def test_any_file_is_a_configuration_or_a_mistake(tmp_path: Path, text: bytes) -> None:
    _load(tmp_path / "sessiond.toml", text)


@given(_TABLES)
@example({"profile.p": {"image": "/a", "size": "9" * 5000 + "G"}})
@example({"profile.p": {"image": "/a", "storage": "persistent", "quota": "9" * 30 + "T"}})
@example({"profile.p": {"image": "/a", "inodes": 2**70}})
@example({"daemon": {"volatile_limit": "9" * 5000}})
@fuzz(200)
def test_what_is_accepted_can_be_used(tmp_path: Path, tables: dict[str, dict[str, object]]) -> None:
    loaded = _load(tmp_path / "sessiond.toml", _toml(tables).encode(errors="replace"))
    if loaded is None:
        return
    ram.size_in_bytes(loaded.daemon.volatile_limit, ram.machine_ram())
    for profile in loaded.profile.values():
        assert ram.limits(profile.size, profile.inodes).bytes < 2**63
        if profile.mount_point is not None:
            text = profile.mount_point.format(id="s", user="u", uid=1)
            assert Path(text).parent != Path(text)
        if profile.cgroup is not None:
            assert cgroup_path(profile.cgroup.format(id="s", user="u", uid=1))


@pytest.mark.parametrize("pattern", ["/", "//", "/."])
def test_a_mount_point_cannot_be_the_root(tmp_path: Path, pattern: str) -> None:
    tables: dict[str, dict[str, object]] = {"profile.p": {"image": "/a", "mount_point": pattern}}
    assert _load(tmp_path / "sessiond.toml", _toml(tables).encode()) is None
