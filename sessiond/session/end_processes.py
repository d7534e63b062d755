"""``python -I -S end_processes.py UID NOBODY SIGNAL``: signals all processes of a user at once.

kill(2) of -1 reaches every process that its caller may signal, with no fork in between: a process
that is about to fork then is interrupted first. So the caller has to be that user; it is by its
effective id alone. By the ids by which others may signal or trace it, it is `NOBODY`, whom nothing
else belongs to. Run alone, by its path: it needs no library, and has no right left but this one.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def main() -> None:
    uid, nobody, number = map(int, sys.argv[1:])
    # With a real or saved id of root's it could signal all that is root's.
    assert uid > 0
    assert nobody > 0
    os.setgroups([])
    os.setresgid(nobody, nobody, nobody)
    os.setresuid(nobody, uid, nobody)
    with suppress(ProcessLookupError):
        os.kill(-1, number)


if __name__ == "__main__":
    main()
