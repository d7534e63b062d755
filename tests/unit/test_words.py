"""Which language is spoken."""

from __future__ import annotations

import pytest

from sessiond.words import untranslated


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"LANG": "C.UTF-8", "LANGUAGE": "de"}, True),
        ({"LANG": "de_DE.UTF-8"}, False),
        ({"LANG": "de_DE.UTF-8", "LC_ALL": "POSIX"}, True),
        ({"LANG": "C", "LC_MESSAGES": "fr_FR.UTF-8"}, False),
        ({"LC_ALL": "", "LANG": "es_ES.UTF-8"}, False),
    ],
)
def test_the_c_locale_is_not_translated(environment: dict[str, str], expected: bool) -> None:
    assert untranslated(environment) is expected
