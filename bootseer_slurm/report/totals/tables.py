"""Reading records, many at a time, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow import fs

from bootseer_slurm.errors import BootseerError
from bootseer_slurm.report.records.row import SCHEMA

COLUMNS = ("shown_id", "restart", "user", "account", "partition", "image", "mode", "nodes", "start_time",
           "elapsed_s", "start_to_training_s", "gpus", "cpus", "lost_gpu_s", "lost_cpu_s")  # fmt: skip
_BATCH_ROWS = 1 << 17
_READAHEAD = 2  # batches


def tables(sources: Iterable[Path | pa.Buffer], since_ms: int) -> Iterator[pa.Table]:
    """The records from `since_ms` (since 1970) on, many in one table. Raises BootseerError."""
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
                columns=list(COLUMNS),
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
