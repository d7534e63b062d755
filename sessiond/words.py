"""What people read, in their language.

The catalogues are `locale/LANG.po`, with one domain for the whole project; the build compiles them
to where `gettext` looks for them. Where there is none for a language, or it is not compiled, people
read the English of the source. A message is one string with named placeholders, filled in after it
is translated: ``_("{used} of {limit}").format(used=…, limit=…)``.
"""

from __future__ import annotations

import gettext
import os
from collections.abc import Mapping
from pathlib import Path

DOMAIN = "sessiond"
DIRECTORY = Path(__file__).parent / "locale"


def untranslated(environment: Mapping[str, str]) -> bool:
    """Say whether the locale is C, in which LANGUAGE counts for nothing, as gettext(3) has it."""
    chosen = (environment.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    return next(filter(None, chosen), "C").partition(".")[0] in {"C", "POSIX"}


def translate_libraries() -> None:
    """Have modules of Python itself, such as argparse, take their words from here, too."""
    if not untranslated(os.environ):
        gettext.bindtextdomain(DOMAIN, str(DIRECTORY))
        gettext.textdomain(DOMAIN)


_catalogue = gettext.translation(
    DOMAIN, DIRECTORY, languages=[] if untranslated(os.environ) else None, fallback=True
)

_ = _catalogue.gettext
"""Return the translation of a message."""

ngettext = _catalogue.ngettext
"""Return the translation of a message for one, or of the other for several, by the number given."""

pgettext = _catalogue.pgettext
"""Return the translation of a message, the second argument, in a context, the first."""
