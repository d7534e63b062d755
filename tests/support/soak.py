"""How long the tests that take long are to be."""

from __future__ import annotations

import os


def factor() -> float:
    """What `make soak SOAK=...` was given; their usual length is 1."""
    return float(os.environ.get("SOAK", "1"))
