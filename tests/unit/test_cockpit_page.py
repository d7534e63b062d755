"""The words of the Cockpit page, in each language."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "packaging/cockpit"
LANGUAGES = ("de", "es", "fr", "zh_CN")

pytestmark = pytest.mark.skipif(shutil.which("xgettext") is None, reason="gettext is missing")


def messages() -> list[str]:
    """Return all that the page says in English, singulars only."""
    options = ["--from-code=UTF-8", "--language=JavaScript", "--no-wrap", "--output=-"]
    keywords = ["--keyword=_", "--keyword=ngettext:1,2"]
    template = subprocess.run(
        ["xgettext", *options, *keywords, *sorted(PAGE.glob("*.js"))],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = re.findall(r'^msgid ("..*")$', template, re.MULTILINE)
    return [json.loads(one) for one in found]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("translations")
    subprocess.run([ROOT / "packaging/cockpit-translations", directory], check=True)
    return directory


def translations(script: Path) -> dict[str, list[str]]:
    told = script.read_text().removeprefix("cockpit.locale(").removesuffix(");\n")
    # The header has a function, which JSON cannot tell.
    entries = json.loads("{" + told.partition("},")[2])
    return {message: forms[1:] for message, forms in entries.items()}


@pytest.mark.parametrize("language", LANGUAGES)
def test_all_is_translated(scripts: Path, language: str) -> None:
    told = translations(scripts / f"po.{language}.js")
    manifest = json.loads((PAGE / "manifest.json").read_text())
    said = {*messages(), manifest["menu"]["index"]["label"]}
    assert len(said) > 90
    assert said == told.keys()
    for message in said:
        assert all(told[message])


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_translation_has_the_same_blanks(scripts: Path, language: str) -> None:
    for message, forms in translations(scripts / f"po.{language}.js").items():
        for form in forms:
            assert set(re.findall(r"\$\d", form)) == set(re.findall(r"\$\d", message)), form
