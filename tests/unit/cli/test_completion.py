"""Bash, zsh and fish complete every command and option of sessionctl, and names that it tells."""

from __future__ import annotations

import argparse
import os
import pty
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio

from sessiond.cli import arguments
from tests.support.waiting import until

COMPLETION = Path(__file__).parents[3] / "packaging/completion"
Complete = Callable[[Sequence[str]], list[set[str]]]
"""What is offered at the end of each of these lines."""

FAKE = """\
#!/bin/sh
case "$*" in
    list) printf 'ID USER\\ndesk alice\\nlobby kiosk\\n' ;;
    'snapshots desk') printf 'NAME CREATED\\nmonday today\\ntuesday today\\n' ;;
    'guest list') echo guest-17 ;;
    *) exit 3 ;;
esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With a sessionctl that knows two sessions, snapshots of one of them, and a guest."""
    program = tmp_path / "bin/sessionctl"
    program.parent.mkdir()
    program.write_text(FAKE)
    program.chmod(0o755)
    return {
        "PATH": f"{program.parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "TERM": "dumb",
        "LC_ALL": "C.UTF-8",
    }


def in_bash(lines: Sequence[str], environment: Mapping[str, str], scratch: Path) -> list[set[str]]:
    script = ["compopt() { :; }", f"source {COMPLETION}/sessionctl.bash"]
    for line in lines:
        words = line.split(" ")
        script += [
            f"COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}",
            "_sessionctl; printf '%s ' \"${COMPREPLY[@]}\"; echo",
        ]
    done = subprocess.run(
        ["bash", "--norc", "-euc", "\n".join(script)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return [set(line.split()) for line in done.stdout.splitlines()]


def in_fish(lines: Sequence[str], environment: Mapping[str, str], scratch: Path) -> list[set[str]]:
    script = [f"source {COMPLETION}/sessionctl.fish"]
    for line in lines:
        script += [f"complete -C {shlex.quote(line)} | string replace -r '\\t.*' ''", "echo ==="]
    done = subprocess.run(
        ["fish", "--no-config", "-c", "\n".join(script)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return [set(part.split()) for part in done.stdout.split("===\n")[:-1]]


ZSH = """\
PS1= zle_highlight=() fpath=({directory} $fpath)
autoload -Uz compinit && compinit -u -D
compadd() {{
    # With these options it is asked something, and offers nothing.
    [[ ${{@[1,(i)(-|--)]}} == *-(O|A|D)\\ * ]] && {{ builtin compadd "$@"; return }}
    local -a offered
    builtin compadd -A offered "$@"
    print -r -- $offered >>{output}
    return 0
}}
bindkey '^I' complete-word
# Not before that are keys taken as they are: the terminal itself would act on some.
zle-line-init() {{ print prompt >>{output} }}
zle -N zle-line-init
"""


def in_zsh(lines: Sequence[str], environment: Mapping[str, str], scratch: Path) -> list[set[str]]:
    """Typed at a terminal, for only there completion works."""
    output = scratch / "offered"
    output.touch()
    setup = scratch / "setup"
    setup.write_text(ZSH.format(directory=COMPLETION, output=output))
    ours, its = pty.openpty()
    shell = subprocess.Popen(
        ["zsh", "-f", "-i"], env=environment, stdin=its, stdout=its, stderr=its, process_group=0
    )
    os.close(its)
    os.set_blocking(ours, False)

    def prompted(times: int) -> bool:
        """Whether it has asked for so many lines; what it draws is thrown away."""
        with suppress(BlockingIOError):
            while os.read(ours, 65536):
                pass
        return output.read_text().count("prompt\n") == times

    try:
        os.write(ours, f"source {setup}\n".encode())
        for number, line in enumerate(lines, 1):
            trio.run(until, partial(prompted, number))
            os.write(ours, f"{line}\t\x15\n".encode())  # complete it, drop it, and go on
        trio.run(until, partial(prompted, len(lines) + 1))
    finally:
        shell.kill()
        shell.wait()
        os.close(ours)
    return [set(part.split()) for part in output.read_text().split("prompt\n")[1:-1]]


@pytest.fixture(params=[in_bash, in_fish, in_zsh])
def complete(
    request: pytest.FixtureRequest, environment: dict[str, str], tmp_path: Path
) -> Complete:
    shell = request.param
    return lambda lines: shell(lines, environment, tmp_path)


def commands() -> dict[str, argparse.ArgumentParser]:
    for action in arguments._parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("sessionctl has commands")


def test_every_command_is_offered(complete: Complete) -> None:
    offered = complete(["sessionctl "])[0]
    assert {word for word in offered if not word.startswith("-")} == set(commands())


def test_every_option_is_offered_with_its_command(complete: Complete) -> None:
    found = complete([f"sessionctl {name} --" for name in commands()])
    for (name, parser), offered in zip(commands().items(), found, strict=True):
        known = {option for action in parser._actions for option in action.option_strings}
        assert offered - {"-h"} == known - {"-h"}, name


def test_names_are_asked_for(complete: Complete) -> None:
    lines = {
        "sessionctl reset ": {"desk", "lobby"},
        "sessionctl reset --grace 5 l": {"lobby"},
        "sessionctl restore desk ": {"monday", "tuesday"},
        "sessionctl restore --terminate desk t": {"tuesday"},
        "sessionctl diff desk --from ": {"monday", "tuesday"},
        "sessionctl guest ": {"add", "remove", "list"},
        "sessionctl guest remove ": {"guest-17"},
        "sessionctl export --format ": {"oci", "squashfs"},
        "sessionctl rebase desk --conflicts ": {"keep", "drop", "save"},
        "sessionctl maintenance ": {"begin", "finish", "cancel", "status"},
    }
    assert complete(list(lines)) == list(lines.values())
