"""The formats for other programs: csv, parquet and Perfetto's trace hold the same spans."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from pyarrow import parquet

from bootseer_slurm.report.render.formats import COLUMNS, FORMATS, rows
from bootseer_slurm.report.startup.analyse import analyse
from bootseer_slurm.report.startup.figures import Report
from tests.unit.test_report_terminal import RECORD, make


def test_csv_has_one_row_for_each_node_and_stage() -> None:
    report = make(nodes=3)
    found = list(csv.DictReader(io.StringIO(FORMATS["csv"](report).decode())))
    assert tuple(found[0]) == COLUMNS
    assert len(found) == sum(len(start.stages) for start in report.starts) == 18
    (image,) = [row for row in found if (row["node"], row["stage"]) == ("gpu-02", "image")]
    assert float(image["duration_s"]) == pytest.approx(report.starts[1].stages["image"])
    assert int(image["end_ns"]) - int(image["begin_ns"]) == pytest.approx(9.5e9)


def test_a_name_is_no_formula_of_a_spreadsheet() -> None:
    text = FORMATS["csv"](make(record=replace(RECORD, name='=cmd|"/c calc"!A1,\n"', user="@alice"))).decode()
    (row, *_) = csv.DictReader(io.StringIO(text))
    assert (row["job_name"], row["user"]) == ('\'=cmd|"/c calc"!A1, "', "'@alice")


def test_parquet_has_the_same_rows_with_their_types() -> None:
    report = make(nodes=3)
    table = parquet.read_table(io.BytesIO(FORMATS["parquet"](report)))
    assert table.to_pylist() == list(rows(report))
    assert {name: str(table.schema.field(name).type) for name in ("job", "node", "duration_s", "derived")} == {
        "job": "int64", "node": "string", "duration_s": "double", "derived": "bool",
    }  # fmt: skip


def test_a_trace_for_perfetto_has_a_track_for_each_node() -> None:
    report = make(nodes=3)
    events = json.loads(FORMATS["perfetto"](report))["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert list(names.values()) == ["gpu-01", "gpu-02", "gpu-03"]
    for start in report.starts:
        slices = [event for event in events if event["ph"] == "X" and names[event["tid"]] == start.node]
        assert [event["name"] for event in slices] == [span.stage for span in start.spans]
        assert sum(event["dur"] for event in slices) == pytest.approx((start.total_s or 0) * 1e6)
        ends = [event["ts"] + event["dur"] for event in slices]
        assert [event["ts"] for event in slices] == pytest.approx([0, *ends[:-1]])
        (training,) = [event for event in events if event["ph"] == "i" and names[event["tid"]] == start.node]
        assert training["ts"] == pytest.approx(ends[-1])


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_run_without_events_is_no_error(name: str) -> None:
    from bootseer_slurm.report.gather.run import Run

    empty: Report = analyse(Run(9, 0, (0,), None, None, (), (), ()))
    assert FORMATS[name](empty)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--format", "pdf"), "terminal, json, csv, parquet, html, perfetto"),
        (("--format", "parquet"), "--output"),
        (("--output", "x"), "--format"),
    ],
)
def test_a_format_that_cannot_be_written_is_refused_in_one_line(options: tuple[str, ...], said: str) -> None:
    command = [sys.executable, "-m", "bootseer_slurm", "report", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
