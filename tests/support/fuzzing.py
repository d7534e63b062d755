"""How much the fuzz tests try, and input of the kind that is nearly right."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.support.soak import factor

SOAKING = "SOAK" in os.environ
_TIMES_LONGER = 10


def json_values(texts: st.SearchStrategy[str]) -> st.SearchStrategy[object]:
    """Values of any type and depth, with those `texts`."""
    scalars = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | texts
    return st.recursive(
        scalars | st.sampled_from([-1, 10**400, 2**63, 2**64]),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=8,
    )


def fuzz(examples: int) -> settings:
    """Try `examples` inputs, always the same ones; many more, and others, in `make soak`."""
    return settings(
        max_examples=int(examples * _TIMES_LONGER * factor()) if SOAKING else examples,
        derandomize=not SOAKING,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.filter_too_much,
        ],
    )


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Draw `valid` with one part replaced."""
    start = draw(st.integers(0, len(valid)))
    end = draw(st.integers(start, min(len(valid), start + 12)))
    return valid[:start] + draw(st.binary(max_size=8)) + valid[end:]


@st.composite
def mistaken(draw: st.DrawFn, valid: bytes, values: st.SearchStrategy[object]) -> bytes:
    """Draw the JSON `valid` with some of its values, at whatever depth, replaced or left out."""
    tree = json.loads(valid)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        if draw(st.integers(0, 5)):
            container[key] = draw(values)
        else:
            del container[key]
    return json.dumps(tree).encode()


def _places(tree: object) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])
