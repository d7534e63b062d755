"""The checker as other tests use it: after whatever they did, an upper has to be in order."""

from __future__ import annotations

import os
from collections.abc import Sequence

from sessiond.overlay.check.checker import Target, check
from sessiond.overlay.check.findings import Finding, Severity

Path = str | bytes | os.PathLike[str]


def findings(
    upper: Path, work: Path, lowers: Sequence[Path], *, repair: bool = False
) -> list[Finding]:
    """Return all that the checker finds in an upper that is not mounted; lowers topmost first."""
    target = Target(os.fsencode(upper), os.fsencode(work), [os.fsencode(lower) for lower in lowers])
    return list(check(target, repair=repair))


def assert_clean(upper: Path, work: Path, lowers: Sequence[Path]) -> None:
    """Fail if the checker finds anything but what a crash may leave."""
    bad = [one for one in findings(upper, work, lowers) if one.kind.severity is not Severity.NOTE]
    assert not bad, "\n".join(f"{one.path!r}: {one.kind.id}: {one.detail}" for one in bad)
