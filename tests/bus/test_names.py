"""Object paths and error names."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sessiond import errors
from sessiond.bus import names
from sessiond.errors import AuthorizationRequired, SessiondError
from sessiond.session.model import SessionId, SnapshotName

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, SessiondError) and kind is not SessiondError
]


def test_every_failure_has_a_name_of_its_own() -> None:
    assert set(names.ERRORS) == set(KINDS)
    assert len(set(names.ERRORS.values())) == len(names.ERRORS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failure_is_named_after_its_class(kind: type[SessiondError]) -> None:
    name = f"org.sessiond.Overlay1.Error.{kind.__name__}"
    if kind is AuthorizationRequired:  # the D-Bus specification has one for that
        name = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"
    assert names.error_name(kind("why")) == name


def test_a_kind_without_a_name_gets_that_of_its_base() -> None:
    class DiskFull(errors.NoSpace):
        """More special than the contract."""

    assert names.error_name(DiskFull("why")) == "org.sessiond.Overlay1.Error.NoSpace"


@pytest.mark.parametrize(
    ("label", "element"),
    [
        ("", "_"),
        ("live", "live"),
        ("1live", "_31live"),
        ("live1", "live1"),
        ("a-b_c.d", "a_2db_5fc_2ed"),
        ("é", "_c3_a9"),
    ],
)
def test_labels_are_escaped_as_sd_bus_does(label: str, element: str) -> None:
    assert names.escape(label) == element


@given(st.text(max_size=80))
def test_escaping_is_undone(label: str) -> None:
    element = names.escape(label)
    assert names.unescape(element) == label
    assert element.isascii()
    assert element.replace("_", "a").isalnum()


def test_paths_tell_their_session() -> None:
    session, snapshot = SessionId("a.b"), SnapshotName("x_1")
    path = names.snapshot_path(session, snapshot)
    assert path == "/org/sessiond/Overlay1/session/a_2eb/snapshot/x_5f1"
    assert names.session_of(path) == "a.b"
    assert names.session_of(names.job_path(3)) == ""
