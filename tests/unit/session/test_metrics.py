"""Metrics: what is counted, how it is written down, and the file."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import trio

from sessiond.errors import SessiondError
from sessiond.session import metrics as module
from sessiond.session.metrics import Metrics, remove_metrics, write_metrics
from tests.support.sessions import UID, USER, World
from tests.support.waiting import until

# https://prometheus.io/docs/instrumenting/exposition_formats/
LABEL = r'[a-z_]+="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"(sessiond_[a-z_]+)(\{{{LABEL}(?:,{LABEL})*\}})? ([0-9.e+-]+)")


def samples(text: str) -> dict[str, float]:
    """Return the samples of a text that has to be well-formed, by name and labels."""
    assert text.endswith("\n")
    found: dict[str, float] = {}
    family = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split()[2]
            assert f"# TYPE {family} " in text
        elif not line.startswith("# TYPE "):
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            assert match[1].removesuffix("_sum").removesuffix("_count") == family
            key = match[1] + (match[2] or "")
            assert key not in found
            found[key] = float(match[3])
    return found


async def test_all_metrics_are_documented(world: World) -> None:
    text = (Path(__file__).parents[3] / "docs/monitoring.md").read_text()
    async with world.manager() as manager:
        for line in Metrics(manager).text().splitlines():
            if line.startswith("# HELP "):
                assert f"`{line.split()[2]}`" in text


async def test_sessions_by_state_and_storage(world: World) -> None:
    async with world.manager() as manager:
        metrics = Metrics(manager)
        for name, profile in (("a", "volatile"), ("b", "volatile"), ("c", "lasting")):
            await manager.create(USER, profile, session_id=name)
        found = samples(metrics.text())
        assert found['sessiond_sessions{state="active",storage="tmpfs"}'] == 2
        assert found['sessiond_sessions{state="active",storage="persistent"}'] == 1
        assert found['sessiond_sessions{state="failed",storage="tmpfs"}'] == 0
        labels = f'{{session="a",user="{USER}",profile="volatile"}}'
        usage = manager.get("a").usage
        assert found[f"sessiond_session_limit_bytes{labels}"] == usage.bytes_limit > 0
        assert f"sessiond_session_used_inodes{labels}" in found
        # What has no limit of its own is not compared with one.
        labels = f'{{session="c",user="{USER}",profile="lasting"}}'
        assert f"sessiond_session_used_bytes{labels}" in found
        assert f"sessiond_session_limit_bytes{labels}" not in found


async def test_jobs_by_how_they_end(world: World) -> None:
    async with world.manager() as manager:
        metrics = Metrics(manager)
        session = await manager.create(USER, "volatile", session_id="s")
        await session.reset(started_by=UID).wait()
        job = session.reset(started_by=UID)
        job.cancel()
        with pytest.raises(SessiondError):
            await job.wait()
        found = samples(metrics.text())
        assert found['sessiond_jobs_total{operation="reset",outcome="succeeded"}'] == 1
        assert found['sessiond_jobs_total{operation="reset",outcome="cancelled"}'] == 1
        assert found['sessiond_jobs_total{operation="persist",outcome="failed"}'] == 0


@pytest.mark.usefixtures("expect_log")
async def test_deaths_of_workers(world: World) -> None:
    async with world.manager() as manager:
        metrics = Metrics(manager)
        await manager.create(USER, "volatile", session_id="s")
        recovered = 'sessiond_worker_deaths_total{outcome="recovered"}'
        assert samples(metrics.text())[recovered] == 0
        world.mount("s").die()
        await until(lambda: samples(metrics.text())[recovered] == 1)
        assert samples(metrics.text())["sessiond_worker_recovery_seconds_count"] == 1


async def test_requests_are_counted_and_labels_cannot_break_out(world: World) -> None:
    async with world.manager() as manager:
        metrics = Metrics(manager)
        metrics.request_answered("reset", "refused")
        metrics.request_answered("reset", "refused")
        metrics.request_answered('"} 1\n\\', "done")
        found = samples(metrics.text())
        assert found['sessiond_requests_total{operation="reset",outcome="refused"}'] == 2
        assert found[r'sessiond_requests_total{operation="\"} 1\n\\",outcome="done"}'] == 1


async def test_the_file_is_kept_up_to_date(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.01)
    file = world.directory / "collector" / "sessiond.prom"
    precious = world.directory / "precious"
    precious.write_text("precious")
    async with world.manager() as manager, trio.open_nursery() as nursery:
        metrics = Metrics(manager)
        nursery.start_soon(write_metrics, metrics, file)
        file.parent.mkdir()
        # What whoever owns the directory may put there.
        (file.parent / ".sessiond.prom.new").symlink_to(precious)
        await until(file.exists)
        assert precious.read_text() == "precious"
        assert file.stat().st_mode & 0o777 == 0o644
        metrics.request_answered("reset", "refused")
        await until(lambda: "refused" in file.read_text())
        samples(file.read_text())
        nursery.cancel_scope.cancel()
    remove_metrics(file)
    remove_metrics(file)
    assert not file.exists()


@pytest.mark.usefixtures("expect_log")
async def test_a_file_that_cannot_be_written_is_one_line_of_the_log(
    world: World,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    attempts = 0

    def refuse(file: Path, text: str) -> None:
        nonlocal attempts
        attempts += 1
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module, "INTERVAL", 0.0)
    monkeypatch.setattr(module, "_replace", refuse)
    async with world.manager() as manager:
        nursery.start_soon(write_metrics, Metrics(manager), world.directory / "x.prom")
        await until(lambda: attempts > 2)
        nursery.cancel_scope.cancel()
    assert [record.message for record in caplog.records if "metrics" in record.message] == [
        "The metrics cannot be written: [Errno 28] No space left on device"
    ]
