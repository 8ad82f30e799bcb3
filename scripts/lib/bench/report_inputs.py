"""Records of starts as a cluster might have them, for `scripts/bench report` and to try `bootseer overhead`.

    .venv/bin/python -m scripts.lib.bench.report_inputs FOLDER [COUNT]

The shape, from one seed: 200 users in 20 accounts and 4 partitions, of whom few have most starts (Zipf, 1.2);
40 images per account; COUNT starts (1,000,000), evenly over 90 days. Nodes: powers of two from 1 to 256, each
half as frequent as the one before, 8 GPUs and 96 CPUs a node. The start takes a log-normal time, median 40 s
at one node and a quarter more for each doubling, sigma 0.7; half of it with prefetch, which 60 % have. Run
times: log-normal, median 1 h, sigma 1.5, never shorter than the start. 3 % never say when they train.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from bootseer_slurm.report.records.archive import write_rows
from bootseer_slurm.report.records.row import SCHEMA

USERS, ACCOUNTS, PARTITIONS, IMAGES = 200, 20, 4, 40
DAYS = 90
STAGES = {"prolog": 0.02, "launch": 0.08, "image": 0.4, "environment": 0.15, "checkpoint": 0.15,
          "program": 0.2}  # fmt: skip


def make(folder: Path, count: int, *, until_s: float, seed: int = 1) -> list[Path]:
    """Write `count` records that end before `until_s` as an Archive has them; gives the files."""
    random = np.random.default_rng(seed)
    user = (random.zipf(1.2, count) - 1) % USERS
    month_ms = pa.array(np.sort(random.uniform(until_s - DAYS * 86400, until_s - 3600, count)) * 1000)
    table = _table(random, count, user, np.asarray(month_ms).astype(np.int64))
    months = pa.compute.strftime(table["start_time"], format="%Y-%m")
    files = []
    for month in sorted(set(months.to_pylist())):
        of_month = table.filter(pa.compute.equal(months, month))
        (folder / month).mkdir(parents=True, exist_ok=True)
        for number in range(USERS):
            rows = of_month.filter(pa.compute.equal(of_month["uid"], 20000 + number))
            if rows.num_rows:
                files.append(folder / month / f"{20000 + number}.parquet")
                write_rows(rows, files[-1])
    return files


def _table(random: np.random.Generator, count: int, user: np.ndarray, start_ms: np.ndarray) -> pa.Table:
    exponent = np.minimum(random.geometric(0.5, count) - 1, 8)
    nodes = 2**exponent
    prefetch = random.random(count) < 0.6
    start_s = 40 * 1.25**exponent * random.lognormal(0, 0.7, count) * np.where(prefetch, 0.5, 1.0)
    elapsed_s = np.maximum(random.lognormal(np.log(3600), 1.5, count), start_s).round() + 1
    queue_s = random.exponential(600, count)
    unknown = random.random(count) < 0.03
    account = user % ACCOUNTS

    def known(values: np.ndarray) -> pa.Array:
        return pa.array(values, mask=unknown)

    def named(prefix: str, numbers: np.ndarray) -> pa.Array:
        return pa.array([f"{prefix}{number}" for number in range(numbers.max() + 1)]).take(pa.array(numbers))

    image = account * IMAGES + random.integers(0, IMAGES, count)
    columns = {
        "job": np.arange(1, count + 1),
        "restart": np.zeros(count),
        "shown_id": pa.array(np.arange(1, count + 1)).cast(pa.string()),
        "uid": 20000 + user,
        "user": named("user", user),
        "account": named("account", account),
        "partition": named("part", user % PARTITIONS),
        "job_name": named("train", user),
        "state": named("COMPLETED", np.zeros(count, int)),
        "nodes": nodes,
        "gpus": nodes * 8,
        "cpus": nodes * 96,
        "submit_time": start_ms - (queue_s * 1000).astype(int) - 1000,
        "eligible_time": start_ms - (queue_s * 1000).astype(int),
        "start_time": start_ms,
        "end_time": start_ms + (elapsed_s * 1000).astype(int),
        "training_time": known(start_ms + (start_s * 1000).astype(int)),
        "training_from": pa.array(["mark"] * count, mask=unknown),
        "elapsed_s": elapsed_s,
        "queue_s": queue_s,
        "start_to_training_s": known(start_s),
        **{f"{stage}_s": known(start_s * share) for stage, share in STAGES.items()},
        "lost_gpu_s": known(start_s * nodes * 8),
        "lost_cpu_s": known(start_s * nodes * 96),
        "mode": pa.array(np.where(prefetch, "prefetch", "observe")),
        "image": named("docker://registry/images/train:", image),
        "fetched_bytes": random.integers(0, 4 << 30, count),
        "cached_bytes": random.integers(0, 4 << 30, count),
        "problems": np.zeros(count),
    }
    missing = pa.nulls(count)
    arrays = [pa.array(columns.get(name, missing)).cast(SCHEMA.field(name).type) for name in SCHEMA.names]
    return pa.table(arrays, schema=SCHEMA)


if __name__ == "__main__":
    made = make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000, until_s=time.time())
    print(f"files: {len(made)}, {sum(path.stat().st_size for path in made)} bytes")
