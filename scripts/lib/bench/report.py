"""The cost of reports: `overhead` of 1,000,000 records, `collect` of 10,000 starts, a page of 1,000 nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bootseer_slurm.report.render.html import to_html
from scripts.lib.bench import report_inputs
from scripts.lib.bench.made_start import made_report
from scripts.lib.bench.rows import Row
from scripts.lib.cluster.client import ALICE, BOOTSEER, Cluster
from scripts.lib.cluster.layout import REPO, ClusterError

RECORDS = 1_000_000
STARTS = 10_000
COMMENTS = 1000
NODES = 1000
ROUNDS = 5
FIRST_JOB = 1_000_000
# A process of its own: a child's peak begins with its parent's memory.
MEASURE = """
import json, resource, subprocess, sys, time
start_s = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps([time.perf_counter() - start_s, peak_kib * 1024]))
sys.exit(done.returncode)
"""
SCAN = """
import sys, pyarrow.dataset as ds
from bootseer_slurm.report.totals.tables import COLUMNS
dataset = ds.dataset(sys.argv[1], format="parquet")
rows = sum(batch.num_rows for batch in dataset.to_batches(columns=list(COLUMNS)))
assert rows == int(sys.argv[2]), rows
"""
READ = """
import json, pathlib, sys
for path in pathlib.Path(sys.argv[1]).glob("*/*.jsonl"):
    for line in path.read_text().splitlines():
        json.loads(line)
"""
# Copies of a real job's row, in the real database: the numbers are new, all else is that job's.
COPY_ROWS = """
CREATE TEMPORARY TABLE one AS SELECT * FROM bootseer_job_table WHERE id_job = {job} LIMIT 1;
SET SESSION group_concat_max_len = 100000;
SET @c = (SELECT GROUP_CONCAT(CONCAT('`', column_name, '`')) FROM information_schema.columns
  WHERE table_schema = DATABASE() AND table_name = 'bootseer_job_table'
  AND column_name NOT IN ('job_db_inx', 'id_job'));
SET @q = CONCAT('INSERT INTO bootseer_job_table (', @c, ', id_job) SELECT ', @c, ', seq FROM one, ',
  'seq_{first}_to_{last}');
PREPARE q FROM @q;
EXECUTE q;
UPDATE bootseer_job_table SET admin_comment = 'somebody else' WHERE id_job > {last_commented};
"""
JOB = f"""#!/bin/bash
#SBATCH -N1 -o /dev/null
srun bash -c 'sleep 2; {BOOTSEER} mark training_started'
sleep 6
"""
GRACE_S = 31  # what collect waits after a job's end


def run(cluster: Cluster) -> list[Row]:
    """All rows, on a cluster that is up."""
    return [*overhead_rows(), *page_rows(), *collect_rows(cluster)]


def overhead_rows() -> list[Row]:
    """The whole command, and a plain scan of the columns that it needs; interleaved."""
    folder = Path(tempfile.mkdtemp(prefix="bootseer-bench-"))
    try:
        records = folder / "records"
        report_inputs.make(records, RECORDS, until_s=time.time())
        config = folder / "bootseer.toml"
        config.write_text(f'[records]\npath = "{records}"\n')
        overhead = [BOOTSEER, "--config", str(config), "overhead", "--since", "100d"]
        arms = {
            "scan": [sys.executable, "-c", SCAN, str(records), str(RECORDS)],
            "by user": [*overhead, "--by", "user"],
            "by image": [*overhead, "--by", "image"],
        }
        seen: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        for _ in range(ROUNDS):
            for name, argv in arms.items():
                seen[name].append(measured(argv))
    finally:
        shutil.rmtree(folder)
    size = f"{RECORDS} records"
    how = f"bootseer overhead --since 100d on {size}, median of {ROUNDS}; limit: pyarrow reads these columns"
    rows = []
    for name in ("by user", "by image"):
        for index, what, unit, target, scale in (
            (0, "time", "s", 10.0, 1.0),
            (1, "memory, peak", "MiB", 1024.0, 2**20),
        ):
            value, limit = (median(each[index] for each in seen[arm]) / scale for arm in (name, "scan"))
            rows.append(Row(f"overhead {name}, {what}", value, unit, target, limit, how))
    return rows


def measured(argv: list[str]) -> tuple[float, float]:
    """Seconds and peak memory in bytes of a command. Raises ClusterError when it fails."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *argv], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(argv[:4])} failed: {done.stderr[-500:]}")
    seconds, peak = json.loads(done.stdout)
    return seconds, peak


def page_rows() -> list[Row]:
    """The HTML of a start on NODES nodes: how large, and how long until a browser has drawn it."""
    from playwright.sync_api import sync_playwright

    browser_path = subprocess.run([REPO / "scripts" / "browser"], capture_output=True, text=True, check=True)
    report = made_report(NODES)
    start_s = time.perf_counter()
    text = to_html(report)
    make_s = time.perf_counter() - start_s
    folder = Path(tempfile.mkdtemp(prefix="bootseer-bench-"))
    drawn: dict[str, list[float]] = {"report": [], "empty": []}
    try:
        (folder / "report.html").write_text(text)
        (folder / "empty.html").write_text("<!doctype html><body data-drawn>empty")
        with sync_playwright() as driver:
            # Chromium's sandbox does not run as root.
            browser = driver.chromium.launch(
                executable_path=browser_path.stdout.strip(), args=["--no-sandbox"]
            )
            for name in [*drawn] * ROUNDS:
                tab = browser.new_page(viewport={"width": 1240, "height": 1800})
                start_s = time.perf_counter()
                tab.goto((folder / f"{name}.html").as_uri())
                tab.wait_for_selector("body[data-drawn]")
                tab.screenshot()  # until then nothing needs to be on the screen
                drawn[name].append(time.perf_counter() - start_s)
                tab.close()
            browser.close()
    finally:
        shutil.rmtree(folder)
    how = f"report --format html of {NODES} nodes, made up (made_start.py)"
    how_drawn = f"the same in headless Chromium, with a picture of it, median of {ROUNDS}; limit: empty page"
    return [
        Row("page, size", len(text.encode()) / 2**20, "MiB", 5.0, None, how),
        Row("page, made", make_s, "s", None, None, how),
        Row("page, drawn", median(drawn["report"]), "s", 2.0, median(drawn["empty"]), how_drawn),
    ]


def collect_rows(cluster: Cluster) -> list[Row]:
    """`bootseer collect` with a real slurmdbd: first without sacctmgr, so that no comment is written."""
    cluster.exec("login", BOOTSEER, "store", "init")
    job = cluster.sbatch(JOB, "--bootseer=observe")
    cluster.wait(job, 120)
    events = cluster.shared / "bootseer/users" / str(ALICE) / "events"
    ended_s = time.monotonic()
    copy_rows(cluster, job)
    copy_events(events, job)
    time.sleep(max(0.0, GRACE_S - (time.monotonic() - ended_s)))
    limit_s, _ = measured([sys.executable, "-c", READ, str(events)])
    start_s = time.perf_counter()
    done = cluster.exec("login", "sh", "-c", f"mkdir -p /run/few && ln -sf $(command -v sacct) /run/few/ && "
                        f"PATH=/run/few {BOOTSEER} collect", timeout_s=600)  # fmt: skip
    add_s = time.perf_counter() - start_s
    added = re.search(r"starts added: (\d+)", done.stdout)
    if not added or int(added[1]) < STARTS:
        raise ClusterError(f"collect added too few: {done.stdout}{done.stderr}")
    start_s = time.perf_counter()
    done = cluster.exec("login", BOOTSEER, "collect", timeout_s=1800)
    comment_s = time.perf_counter() - start_s
    written = re.search(r"AdminComment written: (\d+)", done.stdout)
    if not written or int(written[1]) < COMMENTS:
        raise ClusterError(f"collect commented too few: {done.stdout}{done.stderr}")
    start_s = time.perf_counter()
    done = cluster.exec("login", BOOTSEER, "collect", timeout_s=600)
    again_s = time.perf_counter() - start_s
    if "starts added: 0" not in done.stdout:
        raise ClusterError(f"collect added some again: {done.stdout}")
    how = f"bootseer collect, {STARTS} new starts of one user, real slurmdbd; limit: to read and parse them"
    how_comments = f"bootseer collect, {COMMENTS} comments by sacctmgr, {STARTS - COMMENTS} of others left"
    return [
        Row("collect, new starts into the records", add_s, "s", 60.0, limit_s, how),
        Row("collect, comments a second", COMMENTS / comment_s, "1/s", None, None, how_comments),
        Row("collect, nothing new", again_s, "s", None, None, how),
    ]


def copy_rows(cluster: Cluster, job: int) -> None:
    """Rows in accounting for STARTS more jobs, all but COMMENTS with somebody else's comment."""
    last = FIRST_JOB + STARTS - 1
    sql = COPY_ROWS.format(job=job, first=FIRST_JOB, last=last, last_commented=FIRST_JOB + COMMENTS - 1)
    argv = ("mariadb", "--no-defaults", "--socket=/run/mysqld/mysqld.sock", "slurm_acct")
    done = cluster.exec("login", *argv, input_text=sql, timeout_s=120)
    if done.returncode != 0:
        raise ClusterError(f"rows cannot be copied: {done.stderr}")


def copy_events(events: Path, job: int) -> None:
    """The events of that job, as those of STARTS more, which changed a minute ago."""
    (source,) = (events / f"{job}.0").glob("*.jsonl")
    text = source.read_text()
    changed_s = time.time() - 60
    for number in range(FIRST_JOB, FIRST_JOB + STARTS):
        folder = events / f"{number}.0"
        folder.mkdir(mode=0o700)
        path = folder / source.name
        path.write_text(text.replace(f'"job":{job},', f'"job":{number},'))
        for each in (path, folder):
            os.chown(each, ALICE, ALICE)
        os.utime(folder, (changed_s, changed_s))
