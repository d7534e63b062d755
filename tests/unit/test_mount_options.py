"""Options of sessiond-overlay."""

from __future__ import annotations

import pytest

from sessiond.fuse import device
from sessiond.fuse.mount import UsageError, parse_options


def test_all_options() -> None:
    options = parse_options(
        "lowerdir=/a:/b,upperdir=/u,workdir=/w,allow_other,userxattr,nosuid,nodev,noexec,_netdev,rw"
    )
    assert options.lowers == [b"/a", b"/b"]
    assert (options.upper, options.work) == (b"/u", b"/w")
    assert options.allow_other
    assert options.user_xattrs
    assert options.mount_flags == device.MS_NOSUID | device.MS_NODEV | device.MS_NOEXEC


def test_escaped_separators() -> None:
    options = parse_options(r"lowerdir=/a\:b:/c\,d:/e\\f,upperdir=/u\:u,workdir=/w=1")
    assert options.lowers == [b"/a:b", b"/c,d", rb"/e\f"]
    assert (options.upper, options.work) == (b"/u:u", b"/w=1")


def test_data_only_lowers() -> None:
    options = parse_options("lowerdir=/a:/b::/c::/d")
    assert options.lowers == [b"/a", b"/b"]
    assert options.data == [b"/c", b"/d"]


def test_later_flags_win() -> None:
    assert parse_options("lowerdir=/a,upperdir=/u,workdir=/w,ro,rw").mount_flags == 0


def test_a_read_only_mount_shows_the_upper_as_topmost_lower() -> None:
    options = parse_options("lowerdir=/a,upperdir=/u,workdir=/w,ro")
    assert options.lowers == [b"/u", b"/a"]
    assert options.upper is None
    assert options.mount_flags == device.MS_RDONLY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("upperdir=/u,workdir=/w", "lowerdir= is missing"),
        ("lowerdir=/a,upperdir=/u", "workdir= is missing"),
        ("lowerdir=/a,workdir=/w", "upperdir= is missing"),
        ("lowerdir=/a::/b:/c", "data-only"),
        ("lowerdir=/a::", "data-only"),
        ("lowerdir=", "lowerdir= is missing"),
        ("lowerdir=/a,upperdir=,workdir=/w", "upperdir= names no directory"),
        ("lowerdir=/a,lowerdri=/b", "unknown option 'lowerdri=/b'"),
        ("lowerdir", "unknown option 'lowerdir'"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_options(text)
