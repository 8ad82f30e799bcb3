"""The figures of many starts, compared with a plain count of the same rows, and how they are shown."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from statistics import quantiles
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from bootseer_slurm.errors import BootseerError
from bootseer_slurm.report.overhead import BY, overhead
from bootseer_slurm.report.records.row import SCHEMA, table_of
from bootseer_slurm.report.render.overhead_table import to_json, to_terminal
from bootseer_slurm.report.totals import counts, tables
from bootseer_slurm.report.totals.figures import Overhead

DAY_MS = 86_400_000
START_MS = 1_800_000_000_000 // DAY_MS * DAY_MS


def row(job: int, **more: Any) -> dict[str, Any]:
    """A start of 10 s on one node of 8 GPUs that ran 100 s."""
    made: dict[str, Any] = dict.fromkeys(SCHEMA.names)
    made |= {"job": job, "restart": 0, "shown_id": str(job), "uid": 1, "user": "alice", "account": "ml", "partition": "gpu",
             "nodes": 1, "gpus": 8, "cpus": 96, "start_time": START_MS, "elapsed_s": 100.0,
             "start_to_training_s": 10.0, "mode": "prefetch", "image": "a"}  # fmt: skip
    made |= more
    if made["start_to_training_s"] is not None:
        made["lost_gpu_s"] = made["start_to_training_s"] * made["gpus"] if made["gpus"] else None
        made["lost_cpu_s"] = made["start_to_training_s"] * made["cpus"]
    return made


def write(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    """The rows in three files."""
    paths = []
    for number in range(3):
        paths.append(folder / f"{number}.parquet")
        pq.write_table(table_of(rows[number::3]), paths[-1])
    return paths


def many(count: int) -> list[dict[str, Any]]:
    dice = random.Random(3)
    return [
        row(job, user=dice.choice("abcdefghijklmnop"), nodes=dice.choice([1, 2, 3, 4, 7, 64]),
            gpus=dice.choice([8, 16]), start_time=START_MS + dice.randrange(10) * DAY_MS,
            start_to_training_s=None if dice.random() < 0.1 else dice.lognormvariate(3, 1),
            mode=dice.choice(["prefetch", "observe", None]))
        for job in range(count)
    ]  # fmt: skip


def test_the_figures_are_those_of_a_plain_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_MERGE_ROWS", 50)  # parts are put together on the way too
    monkeypatch.setattr(tables, "_BATCH_ROWS", 64)
    rows = many(600)
    result = overhead(write(tmp_path, rows), since_ms=START_MS, by="user", days=30)
    known = [each for each in rows if each["start_to_training_s"] is not None]
    total = result.total
    assert (total.starts, total.measured, result.device, result.trend_unit) == (600, len(known), "gpu", "day")
    assert total.lost_gpu_s == pytest.approx(sum(each["lost_gpu_s"] for each in known))
    assert total.gpu_s == pytest.approx(sum(100.0 * each["gpus"] for each in known))
    assert result.share(total) == pytest.approx(total.lost_gpu_s / total.gpu_s)
    cuts = quantiles((each["start_to_training_s"] for each in known), n=100)
    for share, exact in ((0.5, cuts[49]), (0.9, cuts[89])):
        assert total.percentile(share) == pytest.approx(exact, rel=0.03)
    assert sum(total.histogram()) == len(known)
    lost = {
        user: sum(each["lost_gpu_s"] for each in known if each["user"] == user) for user in "abcdefghijklmnop"
    }
    assert [group.name for group in result.groups] == sorted(lost, key=lost.__getitem__, reverse=True)[:10]
    assert (result.groups[0].lost_gpu_s, result.group_count) == (pytest.approx(max(lost.values())), 16)
    assert [group.name for group in result.sizes] == ["1", "2", "3-4", "5-8", "33-64"]
    assert [group.name for group in result.modes] == ["-", "observe", "prefetch"]
    assert sum(group.starts for group in result.modes) == 600
    assert len(result.trend) == 10 and [group.name for group in result.trend] == sorted(
        group.name for group in result.trend
    )
    dear = sorted((each["lost_gpu_s"] for each in known), reverse=True)[:10]
    assert [each.lost_s for each in result.dearest] == pytest.approx(dear)


@pytest.mark.parametrize("by", BY)
def test_each_way_to_group(tmp_path: Path, by: str) -> None:
    result = overhead(
        write(tmp_path, [row(1), row(2), row(3, nodes=5, user="bob")]), since_ms=0, by=by, days=7
    )
    names = {
        "user": ["alice", "bob"],
        "size": ["1", "5-8"],
        "account": ["ml"],
        "partition": ["gpu"],
        "image": ["a"],
    }
    assert [group.name for group in result.groups] == names[by]
    assert result.total.starts == 3


def test_only_starts_of_the_time_asked_for(tmp_path: Path) -> None:
    rows = [row(1), row(2, start_time=START_MS + 5), row(3, start_time=START_MS + DAY_MS)]
    assert overhead(write(tmp_path, rows), since_ms=START_MS + 5, by="user", days=1).total.starts == 2


def test_a_long_time_is_shown_by_week(tmp_path: Path) -> None:
    rows = [row(number, start_time=START_MS + number * DAY_MS) for number in range(28)]
    result = overhead(write(tmp_path, rows), since_ms=0, by="user", days=60)
    assert (result.trend_unit, len(result.trend)) == ("week", 5)


def test_a_cluster_without_gpus_counts_cpus(tmp_path: Path) -> None:
    result = overhead(write(tmp_path, [row(1, gpus=0)]), since_ms=0, by="user", days=7)
    assert (result.device, result.share(result.total)) == ("cpu", pytest.approx(0.1))
    assert result.dearest[0].lost_s == 960.0


def test_jobs_without_gpus_do_not_count_where_there_are_jobs_with(tmp_path: Path) -> None:
    many_cpu = [
        row(job, gpus=0, start_to_training_s=1000.0, user="bob", nodes=64, mode="observe") for job in range(9)
    ]
    result = overhead(write(tmp_path, [*many_cpu, row(10)]), since_ms=0, by="user", days=7)
    assert (result.total.starts, result.total.measured) == (1, 1)
    assert result.total.percentile(0.9) == pytest.approx(10.0, rel=0.01)
    assert sum(result.total.histogram()) == 1
    for groups in (result.groups, result.sizes, result.modes, result.trend):
        assert sum(group.starts for group in groups) == 1
    assert [each.shown_id for each in result.dearest] == ["10"]
    # None of those with GPUs was measured: then it is the CPUs, of all.
    rows = [*many_cpu, row(10, start_to_training_s=None)]
    result = overhead(write(tmp_path, rows), since_ms=0, by="user", days=7)
    assert (result.device, result.total.starts, result.total.measured) == ("cpu", 10, 9)


def test_bytes_are_as_good_as_a_file_and_rubbish_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, [row(1)])[0]
    result = overhead([pa.py_buffer(path.read_bytes())], since_ms=0, by="user", days=7)
    assert result.total.starts == 1
    with pytest.raises(BootseerError, match="cannot be read"):
        overhead([pa.py_buffer(b"PAR1 and no more")], since_ms=0, by="user", days=7)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BootseerError, match=path.name):
        overhead([path], since_ms=0, by="user", days=7)


def shown(result: Overhead, *, width: int = 100, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, force_terminal=False)
    to_terminal(result, console)
    file.flush()
    return file.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_the_terminal_shows_shares_bars_and_the_dearest(tmp_path: Path) -> None:
    rows = [
        row(1),
        row(2, start_to_training_s=40.0, nodes=4, user="[red]bob"),
        row(3, start_to_training_s=None),
    ]
    text = shown(overhead(write(tmp_path, rows), since_ms=START_MS, by="user", days=7))
    assert "3, measured: 2" in text and "25.00 % of 0.4 GPU-hours" in text
    assert "10 s to 20 s" in text and "30 s to 1 min" in text and "█" * 30 in text
    assert "[red]bob" in text and "3-4" in text and "prefetch" in text
    assert "half within" in text


def test_a_terminal_without_utf8_gets_other_bars(tmp_path: Path) -> None:
    result = overhead(write(tmp_path, [row(1, user="müller")]), since_ms=0, by="user", days=7)
    text = shown(result, encoding="ascii")
    assert "#" * 30 in text and "m?ller" in text


def test_nothing_at_all_is_said_and_fails_nothing() -> None:
    result = overhead([], since_ms=START_MS, by="image", days=7)
    assert "No start of that time" in shown(result)
    assert json.loads(to_json(result))["total"]["share"] is None


def test_json_has_every_figure(tmp_path: Path) -> None:
    content = json.loads(to_json(overhead(write(tmp_path, [row(1), row(2)]), since_ms=5, by="user", days=7)))
    assert (content["schema"], content["since_ms"], content["device"]) == (1, 5, "gpu")
    assert content["total"] | {"p50_s": 0, "p90_s": 0, "p99_s": 0} == {
        "name": "all", "starts": 2, "measured": 2, "p50_s": 0, "p90_s": 0, "p99_s": 0,
        "used_s": 1600.0, "lost_s": 160.0, "share": 0.1}  # fmt: skip
    assert content["total"]["p50_s"] == pytest.approx(10.0, rel=0.01)
    assert len(content["histogram"]["edges_s"]) == len(content["histogram"]["starts"]) + 1
    assert content["histogram"]["edges_s"][-1] is None
    assert content["dearest"][0] == {"job": "1", "user": "alice", "nodes": 1, "start_s": 10.0, "lost_s": 80.0}
