"""What the starts of a whole cluster cost: shares, distributions, growth with size, wasters and trend.

Figures only; overhead_table.py shows them. Records come as Parquet files or bytes, are read a batch at a
time and counted together at once, so memory does not grow with their number. Times are counted in classes
that are 2 % wide: a percentile is right within 1 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import fs

from bootseer_slurm.errors import BootseerError
from bootseer_slurm.report.records import SCHEMA

BY = ("user", "account", "partition", "size", "image")
EDGES_S = (0, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, math.inf)
TOP = 10
_STEP = math.log(1.02)
_LEAST_S = 0.01
_MERGE_ROWS = 200_000
_BATCH_ROWS = 1 << 17
_READAHEAD = 2  # batches
_DAYS_BY_DAY = 35
_COLUMNS = ("shown_id", "restart", "user", "account", "partition", "image", "mode", "nodes", "start_time",
            "elapsed_s", "start_to_training_s", "gpus", "cpus", "lost_gpu_s", "lost_cpu_s")  # fmt: skip
_SUMS = ("gpu_s", "lost_gpu_s", "cpu_s", "lost_cpu_s")


@dataclass(slots=True)
class Group:
    """Some starts: all, or those of one user, size, day … Only measured ones count beyond `starts`."""

    name: str
    starts: int = 0
    measured: int = 0
    gpu_s: float = 0.0
    lost_gpu_s: float = 0.0
    cpu_s: float = 0.0
    lost_cpu_s: float = 0.0
    classes: dict[int, int] = field(default_factory=dict)

    def percentile(self, share: float) -> float | None:
        """Seconds until training that this share of the measured starts did not exceed."""
        left = math.ceil(share * self.measured)
        for number in sorted(self.classes):
            left -= self.classes[number]
            if left <= 0:
                return _middle_s(number)
        return None

    def histogram(self) -> list[int]:
        """How many starts lie between each two of EDGES_S."""
        counts = [0] * (len(EDGES_S) - 1)
        for number, count in self.classes.items():
            at_s = _middle_s(number)
            counts[next(place for place, edge in enumerate(EDGES_S[1:]) if at_s < edge)] += count
        return counts


@dataclass(frozen=True, slots=True)
class Dear:
    """One start that cost much."""

    shown_id: str
    user: str
    nodes: int
    start_s: float
    lost_s: float


@dataclass(frozen=True, slots=True)
class Overhead:
    """The figures. device: "gpu", or "cpu" where no start had a GPU; whose seconds all sums are of."""

    since_ms: int
    by: str
    device: str
    trend_unit: str  # "day" or "week"
    total: Group
    groups: tuple[Group, ...]  # by `by`, the TOP that lost most
    group_count: int
    sizes: tuple[Group, ...]
    modes: tuple[Group, ...]
    trend: tuple[Group, ...]
    dearest: tuple[Dear, ...]

    def used_s(self, group: Group) -> float:
        """Device-seconds that the measured starts' jobs had."""
        return group.gpu_s if self.device == "gpu" else group.cpu_s

    def lost_s(self, group: Group) -> float:
        """Device-seconds that went by before training began."""
        return group.lost_gpu_s if self.device == "gpu" else group.lost_cpu_s

    def share(self, group: Group) -> float | None:
        """Lost of used; None where nothing was measured."""
        used_s = self.used_s(group)
        return self.lost_s(group) / used_s if used_s else None


def overhead(sources: Iterable[Path | pa.Buffer], *, since_ms: int, by: str, days: float) -> Overhead:
    """The figures of the starts from `since_ms` (since 1970) on, grouped by one of BY.

    sources: Parquet files of records, or what is in them. days: how long that is; long times are shown by
    week. Raises BootseerError when one cannot be read.
    """
    unit = "day" if days <= _DAYS_BY_DAY else "week"
    dimensions = dict.fromkeys((by, "size", "mode", unit))
    counts = {name: _Counts(name) for name in dimensions}
    with_gpu = False
    dearest: dict[str, pa.Table] = {}
    for table in _tables(sources, since_ms):
        counted = _derived(table, unit)
        with_gpu = with_gpu or bool(pc.any(pc.greater(counted["gpu_s"], 0.0)).as_py())
        for each in counts.values():
            each.add(counted)
        for lost in ("lost_gpu_s", "lost_cpu_s"):
            known = [dearest[lost]] if lost in dearest else []
            dearest[lost] = _dearest(pa.concat_tables([*known, table]), lost)
    if with_gpu:
        for each in counts.values():
            each.keep_gpu_jobs()
    total = counts[unit].total()
    device = "gpu" if with_gpu else "cpu"
    lost = f"lost_{device}_s"
    groups, group_count = counts[by].top(lost)
    return Overhead(
        since_ms=since_ms,
        by=by,
        device=device,
        trend_unit=unit,
        total=total,
        groups=groups,
        group_count=group_count,
        sizes=counts["size"].by_size(),
        modes=counts["mode"].by_name(),
        trend=counts[unit].by_name(),
        dearest=_dear_rows(dearest.get(lost), lost),
    )


class _Counts:
    """Starts counted together by one column and their class of duration."""

    def __init__(self, column: str) -> None:
        self._column = column
        self._by = [column, "class", "has_gpu"]
        self._parts: list[pa.Table] = []
        self._rows = 0

    def keep_gpu_jobs(self) -> None:
        """Forget the starts of jobs without GPUs."""
        self._parts = [part.filter(part["has_gpu"]) for part in self._parts]

    def add(self, table: pa.Table) -> None:
        wanted = [("starts", "sum"), ("measured", "sum"), *((name, "sum") for name in _SUMS)]
        grouped = table.group_by(self._by).aggregate(wanted)
        part = grouped.select([*self._by, *(f"{name}_sum" for name, _ in wanted)])
        self._parts.append(part.rename_columns([*self._by, *(name for name, _ in wanted)]))
        self._rows += part.num_rows
        if self._rows > _MERGE_ROWS and len(self._parts) > 1:
            self.merged()

    def merged(self) -> pa.Table | None:
        """All that was added, as one table; None when nothing was."""
        if len(self._parts) > 1:
            parts, self._parts, self._rows = pa.concat_tables(self._parts), [], 0
            self.add(parts)
        return self._parts[0] if self._parts else None

    def total(self) -> Group:
        """All together."""
        total = Group("all")
        for group in self.by_name():
            _put_together(total, group)
        return total

    def top(self, lost: str) -> tuple[tuple[Group, ...], int]:
        """The groups that lost most, and how many there are."""
        table = self.merged()
        if table is None:
            return (), 0
        sums = table.group_by(self._column).aggregate([(lost, "sum"), ("starts", "sum")])
        order = [(f"{lost}_sum", "descending"), ("starts_sum", "descending"), (self._column, "ascending")]
        names = sums.sort_by(order)[self._column].slice(0, TOP)
        chosen = table.filter(pc.is_in(table[self._column], value_set=names.combine_chunks()))
        groups = _groups(chosen, self._column)
        return tuple(groups[name] for name in names.to_pylist()), sums.num_rows

    def by_name(self) -> tuple[Group, ...]:
        """All groups, by their names."""
        table = self.merged()
        groups = _groups(table, self._column) if table is not None else {}
        return tuple(groups[name] for name in sorted(groups))

    def by_size(self) -> tuple[Group, ...]:
        """All groups, whose names are numbers of nodes."""
        return tuple(sorted(self.by_name(), key=lambda group: int(group.name.split("-")[0] or 0)))


def _groups(table: pa.Table, column: str) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    for row in table.to_pylist():
        group = groups.setdefault(row[column], Group(row[column]))
        classes = {} if row["class"] is None else {row["class"]: row["measured"]}
        _put_together(group, Group("", classes=classes, **{name: row[name] or 0 for name in _ADDED}))
    return groups


_ADDED = ("starts", "measured", *_SUMS)


def _put_together(group: Group, more: Group) -> None:
    for name in _ADDED:
        setattr(group, name, getattr(group, name) + getattr(more, name))
    for number, count in more.classes.items():
        group.classes[number] = group.classes.get(number, 0) + count


def _tables(sources: Iterable[Path | pa.Buffer], since_ms: int) -> Iterator[pa.Table]:
    """The records from `since_ms` on, many in one table."""
    pending: list[pa.RecordBatch] = []
    rows = 0
    for batch in _batches(sources, since_ms):
        pending.append(batch)
        rows += batch.num_rows
        if rows >= _BATCH_ROWS:
            yield pa.Table.from_batches(pending)
            pending, rows = [], 0
    if pending:
        yield pa.Table.from_batches(pending)


def _batches(sources: Iterable[Path | pa.Buffer], since_ms: int) -> Iterator[pa.RecordBatch]:
    parquet = ds.ParquetFileFormat(
        default_fragment_scan_options=ds.ParquetFragmentScanOptions(pre_buffer=False)
    )
    local = fs.LocalFileSystem()
    wanted = ds.field("start_time") >= pa.scalar(since_ms, SCHEMA.field("start_time").type)
    for source in sources:
        try:
            if isinstance(source, Path):
                fragment = parquet.make_fragment(str(source), local)
            else:
                fragment = parquet.make_fragment(source)
            scanner = fragment.scanner(
                schema=SCHEMA,
                columns=list(_COLUMNS),
                filter=wanted,
                batch_size=_BATCH_ROWS,
                batch_readahead=_READAHEAD,
            )
            yield from (batch for batch in scanner.to_batches() if batch.num_rows)
        except FileNotFoundError:
            continue  # collect has just replaced it
        except (OSError, pa.ArrowException) as error:
            name = source if isinstance(source, Path) else "of this user"
            raise BootseerError(f"records {name}: cannot be read: {error}") from error


def _derived(table: pa.Table, unit: str) -> pa.Table:
    """The columns by which starts are counted, and what is summed."""
    waited_s = table["start_to_training_s"]
    measured = pc.is_valid(waited_s)
    ratio = pc.divide(pc.max_element_wise(waited_s, _LEAST_S, skip_nulls=False), _LEAST_S)
    columns = {
        "class": pc.cast(pc.floor(pc.divide(pc.ln(ratio), _STEP)), pa.int32()),
        "starts": pa.array([1], pa.int64()).take(pa.array([0] * table.num_rows, pa.int32())),
        "measured": pc.cast(measured, pa.int64()),
        "has_gpu": pc.greater(pc.fill_null(table["gpus"], 0), 0),
        "size": _sizes(table["nodes"]),
        unit: pc.strftime(pc.floor_temporal(table["start_time"], unit=unit), format="%Y-%m-%d"),
    }
    for device in ("gpu", "cpu"):
        used_s = pc.multiply(table["elapsed_s"], pc.cast(table[f"{device}s"], pa.float64()))
        columns[f"{device}_s"] = pc.if_else(measured, used_s, None)
        columns[f"lost_{device}_s"] = table[f"lost_{device}_s"]
    for name in ("user", "account", "partition", "image", "mode"):
        columns[name] = pc.fill_null(table[name], "-")
    return pa.table(columns)


def _sizes(nodes: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers of nodes in classes up to each power of two: "1", "2", "3-4", "5-8" …"""
    exponent = pc.cast(pc.ceil(pc.log2(pc.cast(pc.fill_null(nodes, 1), pa.float64()))), pa.int32())
    names = ["1", "2", *(f"{2 ** (each - 1) + 1}-{2**each}" for each in range(2, 32))]
    return pc.take(pa.array(names), exponent)


def _dearest(table: pa.Table, lost: str) -> pa.Table:
    return table.take(pc.select_k_unstable(table, k=TOP, sort_keys=[(lost, "descending")]))


def _dear_rows(table: pa.Table | None, lost: str) -> tuple[Dear, ...]:
    rows: Sequence[dict[str, object]] = [] if table is None else table.to_pylist()
    return tuple(
        Dear(
            shown_id=str(row["shown_id"]),
            user=str(row["user"] or "-"),
            nodes=int(str(row["nodes"] or 0)),
            start_s=float(str(row["start_to_training_s"])),
            lost_s=float(str(row[lost])),
        )
        for row in rows
        if row[lost]
    )


def _middle_s(number: int) -> float:
    return _LEAST_S * math.exp((number + 0.5) * _STEP)
