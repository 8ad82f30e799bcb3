"""Counting starts: a table of records is counted together by one column and the class of its durations."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from bootseer_slurm.report.totals.figures import CLASS_STEP, DEVICE_SECONDS, LEAST_S, SUMMED, Group

TOP = 10
_MERGE_ROWS = 200_000


class Counts:
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
        """Count the starts of a table with the columns of `derived`."""
        wanted = [("starts", "sum"), ("measured", "sum"), *((name, "sum") for name in DEVICE_SECONDS)]
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
            total.add(group)
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


def derived(table: pa.Table, unit: str) -> pa.Table:
    """The columns by which starts are counted, and those that are summed.

    table: with tables.COLUMNS. unit: "day" or "week", the trend's.
    """
    waited_s = table["start_to_training_s"]
    measured = pc.is_valid(waited_s)
    ratio = pc.divide(pc.max_element_wise(waited_s, LEAST_S, skip_nulls=False), LEAST_S)
    columns = {
        "class": pc.cast(pc.floor(pc.divide(pc.ln(ratio), CLASS_STEP)), pa.int32()),
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


def _groups(table: pa.Table, column: str) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    for row in table.to_pylist():
        group = groups.setdefault(row[column], Group(row[column]))
        classes = {} if row["class"] is None else {row["class"]: row["measured"]}
        group.add(Group("", classes=classes, **{name: row[name] or 0 for name in SUMMED}))
    return groups
