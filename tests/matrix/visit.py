"""``python -m tests.matrix.visit SESSION...``: call each method, as whoever runs this.

The last two of the sessions are for what closes one. Prints a JSON object: of each method what came
of it, and what was said.
"""

from __future__ import annotations

import json
import sys

import trio

from sessiond.bus import names
from sessiond.bus.connection import connect
from sessiond.bus.objects import JobObject
from tests.matrix.methods import METHODS, By, prepare
from tests.matrix.stage import Stage


async def main(sessions: list[str]) -> None:
    found = {}
    async with connect() as connection:
        stage = Stage(connection, sessions.pop(0))
        for entry in sorted(METHODS, key=lambda one: one.closes):
            if entry.by is By.ANYONE:
                continue
            if entry.closes and entry.by is By.OWNER:
                stage.session = sessions.pop(0)
            await prepare(stage, entry)
            if entry.interface is JobObject:  # of another's session, what anyone may know
                session = await stage.properties(stage.path(names.SESSION), names.SESSION)
                stage.job = str(session["LastJob"])
            found[str(entry)] = await stage.outcome(entry)
        stage.close()
    print(json.dumps(found))


if __name__ == "__main__":
    trio.run(main, sys.argv[1:])
