"""The extension: requests answered without Python, and passthrough. Built from ``kernel_io/``.

Loaded with RTLD_GLOBAL before pyfuse3, it takes the place of libfuse's ``fuse_session_mount`` and
puts itself between ``/dev/fuse`` and libfuse. Node numbers are those of `sessiond.overlay.nodes`.
One mount for each process.
"""

TRY_AGAIN: int
"""Error of a reply to LOOKUP or OPENDIR that has the extension try the request once more."""

NAMES_ONLY: int
"""Bit of the handle in a READDIRPLUS that stands for a READDIR: nodes are not referred to."""

SETXATTR: int
"""An opcode."""

def configure(path: str) -> None:
    """Before the mount: "plain" (take no part), "cached" or "passthrough"."""

def is_active() -> bool:
    """Say whether the mount has been made through this module."""

def has_passthrough() -> bool:
    """Say whether the kernel has agreed to passthrough; known after its first request."""

def hold(held: bool, /) -> None:
    """Leave every change to Python, which lets it wait, until called with False."""

def record(device: int, journal: int, inherits: bool, /) -> bool:
    """Before the mount, which is that of `device`: keep a journal for a successor of this process.

    `journal` is a descriptor of a file in memory. `inherits`: take over what a predecessor wrote
    there, and the connection with it. Return False if that cannot be read, or there is none.
    """

def key() -> bytes:
    """Return 16 secret bytes, which a successor has, too."""

def resent() -> int:
    """Return the opcode of the request that Python was given last, if it had been sent to a
    predecessor, which may, or may not, have carried it out; else 0.

    Call before the first checkpoint of a handler.
    """

def inherited() -> list[tuple[int, int, list[tuple[int, bytes]], dict[int, bytes]]]:
    """Return, once, what `sessiond.overlay.fastpath.Inherited` says."""

def inherited_listings() -> list[tuple[int, int]]:
    """Return listings that a predecessor made here: the handle, and the directory's number."""

def reopen_listing(handle: int, descriptor: int, numbering: int, /) -> bool:
    """Go on with one of these; take over a descriptor of the directory, open for reading."""

def last_listing() -> int:
    """Return the largest handle of a listing that a predecessor gave."""

def placed(number: int, kind: int, parent: int, name: bytes, /) -> None: ...
def removed(number: int, parent: int, name: bytes, /) -> None: ...
def note(number: int, which: int, data: bytes, /) -> bool: ...
def serve(number: int, descriptors: tuple[int, ...], bottom: bool, numbering: int, /) -> bool: ...
def shows_image(number: int, /) -> bool: ...
def is_served(number: int, /) -> bool: ...
def withdraw(number: int, /) -> None: ...
def claim(number: int, /) -> int: ...
def place(number: int, /) -> tuple[int, int, bytes] | None: ...
def names() -> list[tuple[int, bytes]]: ...
def opened() -> list[int]: ...
def begin_generation() -> list[int]: ...
def keep(number: int, /) -> None: ...
def give_up(number: int, /) -> None: ...
def closes(number: int, /) -> int: ...
def finish(number: int, closes: int, /) -> bool: ...
def duplicate(number: int, /) -> int:
    """These are `FastPath`'s."""

def forget(number: int, count: int, /) -> None:
    """Give back references to a node, which Python has been told of and has forgotten."""

def listed(handle: int, /) -> int:
    """Return the number of the directory that a listing's handle is of; 0 for one of Python's."""

def remember_missing(parent: int, name: bytes, /) -> int:
    """Return for how many seconds the kernel may remember that a name is missing."""

def set_contents(number: int, descriptor: int, writable: bool, /) -> bool:
    """Take over a descriptor of the node's contents; `writable`: it is in the upper.

    Return False, with the descriptor closed, if the kernel has another file of this node open by
    passthrough: it cannot have two.
    """

def opens(number: int, /) -> tuple[int, int]:
    """Return how often the file is open, and how often of these for writing."""
