from __future__ import annotations

import pytest

from tests.support.fuzzing import SOAKING


def pytest_itemcollected(item: pytest.Item) -> None:
    """In `make soak` every fuzz test takes part, and takes long."""
    if SOAKING:
        item.add_marker(pytest.mark.soak)
        item.add_marker(pytest.mark.timeout(0))
