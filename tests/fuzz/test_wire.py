"""Whatever arrives on a bus."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sessiond.bus import wire
from sessiond.bus.wire import Kind, Message, Variant, WireError
from tests.support.fuzzing import damaged, fuzz

_SIGNATURES = st.text("ybnqiuxtdsoghav(){}", max_size=12)

_BODY, _ = wire.pack("sa{sv}ah", ["s", {"k": Variant("(sau)", ("x", [1, 2]))}, []])
_CALL = wire.encode(
    Message(
        kind=Kind.CALL,
        serial=7,
        path="/org/sessiond/Overlay1",
        interface="org.sessiond.Overlay1.Manager",
        member="CreateSession",
        destination=":1.2",
        signature="sa{sv}ah",
        body=_BODY,
    )
)


@given(st.binary(max_size=400) | damaged(_CALL))
@example(b"l\1\0\1" + bytes(12))
@example(b"l\1\0\1\xff\xff\xff\xff" + bytes(8))
@fuzz(500)
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    if len(data) < wire.HEAD_SIZE:
        return
    with suppress(WireError):
        size = wire.HEAD_SIZE + wire.remaining(data[: wire.HEAD_SIZE])
        if size <= 1 << 16:
            message = wire.decode(data[:size].ljust(size, b"\0"))
            message.values()


@given(_SIGNATURES, st.binary(max_size=200), st.booleans())
@fuzz(500)
def test_any_body_is_values_or_malformed(signature: str, body: bytes, big_endian: bool) -> None:
    message = Message(kind=Kind.CALL, signature=signature, body=body, big_endian=big_endian)
    with suppress(WireError):
        message.values()


def test_a_variant_in_a_variant_and_so_on_has_an_end() -> None:
    body = b"\1v\0" * 20_000 + b"\1y\0\0"
    with pytest.raises(WireError, match="malformed"):
        Message(kind=Kind.CALL, signature="v", body=body).values()
