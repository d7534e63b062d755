"""The catalogues: complete, and true to the source in what programs fill in."""

from __future__ import annotations

import gettext
import io
import re
import string
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.desktop import CHECKOUT

LOCALE = CHECKOUT / "sessiond" / "locale"
LANGUAGES = (LOCALE / "LINGUAS").read_text().split()

PAGES = [
    ["_Reset…", "_All changes"],
    ["_Keep a snapshot first", "Close _programs that use the session", "_Cancel", "_Reset"],
    ["Close _programs that use the session", "_Cancel", "_Restore"],
    ["_Cancel", "_Delete"],
    ["_Cancel", "_Keep"],
    ["_Cancel", "_Save"],
]
"""Labels with mnemonics that are shown at the same time."""


def run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, cwd=CHECKOUT).stdout


def messages(language: str) -> dict[str | tuple[str, int], str]:
    """Return the translations by their originals; those of plurals by the number of the form."""
    compiled = run("msgfmt", "--output-file=-", str(LOCALE / f"{language}.po"))
    catalogue = vars(gettext.GNUTranslations(io.BytesIO(compiled)))["_catalog"]
    return {key: text for key, text in catalogue.items() if key}


def placeholders(text: str) -> set[str]:
    named = {name for _, name, _, _ in string.Formatter().parse(text) if name}
    return named | set(re.findall(r"%-?[A-Za-z]|[%$]\(\w+\)", text))


def test_there_is_a_catalogue_for_each_language() -> None:
    assert LANGUAGES == ["de", "es", "fr", "zh_CN"]
    assert sorted(path.stem for path in LOCALE.glob("*.po")) == LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_message_is_missing_or_doubtful(language: str) -> None:
    catalogue = str(LOCALE / f"{language}.po")
    run("msgfmt", "--check", "--output-file=/dev/null", catalogue)
    for doubt in ("--untranslated", "--only-fuzzy", "--only-obsolete"):
        found = run("msgattrib", doubt, "--no-wrap", catalogue).decode()
        assert "msgid" not in found.partition("\n\n")[2], found
    # All that the template has, and nothing else.
    run("msgcmp", catalogue, str(LOCALE / "sessiond.pot"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_filled_in_is_the_same(language: str) -> None:
    found = messages(language)
    assert len(found) > 150
    for key, translation in found.items():
        original = key if isinstance(key, str) else key[0]
        original = original.rpartition("\x04")[2]
        if "%H" in original:
            assert "%H" in translation
            assert "%M" in translation
        else:
            assert placeholders(translation) == placeholders(original), original


@pytest.mark.parametrize("language", LANGUAGES)
def test_terminals_get_no_spaces_that_are_escaped_there(language: str) -> None:
    """Where names of files might have some, sessionctl shows what they are."""
    of_terminals = [f"--location={place}/*" for place in ("sessiond/cli", "sessiond/overlay/check")]
    found = run("msggrep", *of_terminals, "--no-wrap", str(LOCALE / f"{language}.po")).decode()
    translations = [line for line in found.splitlines() if line.startswith("msgstr")]
    assert len(translations) > 250
    assert [line for line in translations if not line.isprintable()] == []


def mnemonics(labels: list[str]) -> Iterator[str]:
    for label in labels:
        assert label.count("_") == 1, label
        yield label[label.index("_") + 1].lower()


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_no_key_stands_for_two_things_on_a_page(language: str) -> None:
    found = {} if language == "en" else messages(language)
    for page in PAGES:
        keys = list(mnemonics([found.get(label, label) for label in page]))
        assert len(set(keys)) == len(keys), (page, keys)


def test_the_template_has_what_the_source_has(tmp_path: Path) -> None:
    """If not: `make messages`, and translate what is new."""
    for part in ("sessiond", "packaging"):
        run("cp", "--recursive", part, str(tmp_path))
    subprocess.run([tmp_path / "packaging/messages"], check=True, capture_output=True)
    fresh = (tmp_path / "sessiond/locale/sessiond.pot").read_text()
    assert _without_header(fresh) == _without_header((LOCALE / "sessiond.pot").read_text())


def _without_header(template: str) -> list[str]:
    """Return its messages; what tools of other versions write differently is left out."""
    lines = template.partition("\n\n")[2].splitlines()
    return sorted(line for line in lines if line and not line.startswith("#"))
