"""Which of very many cases `make test` runs; `make soak` runs the others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

SOAK = float(os.environ.get("SOAK", "1"))
"""How long to soak, as a multiple of what is usual."""


def sample(cases: Sequence[T], every: int) -> list[Any]:
    """Return all cases as parameters, of which only one in `every` is not for soaking alone."""
    return [
        pytest.param(case, marks=() if number % every == 0 else pytest.mark.soak)
        for number, case in enumerate(cases)
    ]
