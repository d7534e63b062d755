"""Messages as bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from dbus_next.signature import SignatureTree
from hypothesis import given
from hypothesis import strategies as st

from sessiond.bus import wire
from sessiond.bus.wire import Kind, Message, Variant, WireError

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


def sent_and_received(message: Message) -> Message:
    data = wire.encode(message)
    assert wire.remaining(data[: wire.HEAD_SIZE]) == len(data) - wire.HEAD_SIZE
    return wire.decode(data, message.descriptors)


@given(TEXT, st.integers(0, 2**64 - 1), st.booleans(), st.lists(TEXT), st.dictionaries(TEXT, TEXT))
def test_what_is_sent_is_received(
    text: str, number: int, flag: bool, items: list[str], options: dict[str, str]
) -> None:
    signature = "stbasa{sv}(sv)"
    body, descriptors = wire.pack(
        signature,
        [
            text,
            number,
            flag,
            items,
            {key: Variant("s", value) for key, value in options.items()},
            (text, Variant("a{sv}", {"n": Variant("t", number)})),
        ],
    )
    message = Message(
        kind=Kind.CALL,
        serial=7,
        path="/a/b",
        interface="a.b",
        member="C",
        destination=":1.2",
        signature=signature,
        body=body,
        descriptors=descriptors,
    )
    received = sent_and_received(message)
    assert received == message
    assert received.values() == (text, number, flag, items, options, [text, {"n": number}])


def test_big_endian_messages_are_read() -> None:
    # Hello's answer, as a big-endian peer would send it.
    data = bytes.fromhex(
        "42020101" "00000009" "00000005" "0000000f"
        "05017500" "00000001" "08016700" "01730000"
        "00000004" "3a312e37" "00"
    )  # fmt: skip
    message = wire.decode(data)
    assert (message.kind, message.serial, message.reply_serial) == (Kind.REPLY, 5, 1)
    assert message.values() == (":1.7",)


@pytest.mark.parametrize(
    ("signature", "values", "complaint"),
    [
        ("s", ["a\0b"], "NUL"),
        ("s", ["\udcff"], "UTF-8"),
        ("s", [3], "do not fit"),
        ("s", [], "do not fit"),
        ("s", ["a", "b"], "do not fit"),
        ("o", ["no path"], "do not fit"),
        ("u", [-1], "do not fit"),
        ("t", [2**64], "do not fit"),
        ("{", ["a"], "no D-Bus signature"),
        ("s", ["x" * (wire.BODY_LIMIT + 1)], "too long"),
    ],
)
def test_what_no_bus_would_take_is_refused(
    signature: str, values: list[object], complaint: str
) -> None:
    with pytest.raises(WireError, match=complaint):
        wire.pack(signature, values)


def test_refused_arguments_close_their_descriptors() -> None:
    descriptor = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    with pytest.raises(WireError):
        wire.pack("hs", [descriptor, 3])
    assert not Path(f"/proc/self/fd/{descriptor}").exists()


def test_a_descriptor_that_did_not_arrive_is_an_error() -> None:
    body, _ = wire.pack("u", [0])
    with pytest.raises(WireError, match="did not arrive"):
        Message(kind=Kind.REPLY, signature="h", body=body).values()


@pytest.mark.parametrize(
    "head", [b"GET / HTTP/1.1\r\n", b"l\x01\x00\x02" + bytes(12), b"l\x01\x00\x01" + b"\xff" * 12]
)
def test_a_head_that_is_none_is_refused(head: bytes) -> None:
    with pytest.raises(WireError):
        wire.remaining(head)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_malformed_bodies_raise_nothing_else(body: bytes, cut: int) -> None:
    message = Message(kind=Kind.CALL, signature="sa{sv}a(vay)h", body=body[:cut])
    with pytest.raises(WireError):
        # What happens to be well-formed is refused as well: no descriptor came with it.
        message.values()


@given(st.data())
def test_malformed_headers_raise_nothing_else(data: st.DataObject) -> None:
    good = wire.encode(Message(kind=Kind.SIGNAL, path="/a", interface="a.b", member="C"))
    position = data.draw(st.integers(wire.HEAD_SIZE, len(good) - 1))
    bad = good[:position] + data.draw(st.binary(min_size=1, max_size=1)) + good[position + 1 :]
    try:
        wire.decode(bad)
    except WireError:
        return


def test_signatures_that_senders_choose_are_not_kept() -> None:
    message = Message(kind=Kind.CALL, signature="v", body=b"\x05(nqb)\0" + bytes(9))
    assert message.values() == ([0, 0, False],)
    assert "(nqb)" not in SignatureTree._cache


def test_text_is_shown_whatever_it_holds() -> None:
    assert wire.shown("a\udcffb\0c") == "a\\udcffb\\0c"
