"""A start on many nodes as its events would tell it, made up: for the report's bench, tests and pictures.

The shape: most nodes take the same time within some percent, as in a start with --bootseer whose link is the
store's; of a hundred, one has a slow link, one a cold cache, and one in two hundred too little CPU. The same
seed makes the same start. What is made are events and an accounting record; all figures are the report's own.
"""

from __future__ import annotations

import random

from bootseer_slurm.events import EventLog
from bootseer_slurm.report.gather.run import NodeEvents, Run
from bootseer_slurm.report.startup.analyse import analyse
from bootseer_slurm.report.startup.figures import PlainStarts, Report
from bootseer_slurm.slurm.jobs import JobRecord

START_NS = 1_800_000_000_000_000_000
JOB = 184211
GPUS_PER_NODE = 8
IMAGE = "/lustre/images/nemo-25.04.sqsh"
ENVIRONMENT = "/home/alice/venvs/llama"
CHECKPOINT = "/lustre/ckpt/llama-70b/step_42000"


def made_report(node_count: int = 1000, *, seed: int = 1) -> Report:
    """The report of a start on so many nodes."""
    return analyse(made_run(node_count, seed=seed), plain=PlainStarts(7, 412.6))


def made_run(node_count: int = 1000, *, seed: int = 1) -> Run:
    """The run that collect would give of this start; of over a hundred nodes the last has sent nothing."""
    names = [f"gpu-{number:04d}" for number in range(1, node_count + 1)]
    chance = random.Random(seed)
    silent = names[-1:] if node_count > 100 else []
    nodes = tuple(_node(name, chance, number) for number, name in enumerate(names) if name not in silent)
    record = JobRecord(
        job=JOB, shown_id=str(JOB), array_task=None, het_offset=None, restart=0, user="alice", uid=1000,
        account="foundation", partition="h100", name="llama-70b-pretrain", state="COMPLETED",
        submit_ns=START_NS - 190_000_000_000, eligible_ns=START_NS - 185_000_000_000, start_ns=START_NS,
        end_ns=START_NS + 14_400_000_000_000, nodes=tuple(names), cpus=node_count * 192,
        gpus=node_count * GPUS_PER_NODE,
    )  # fmt: skip
    return Run(JOB, 0, (0,), 1000, record, nodes, tuple(silent), ())


def _node(name: str, chance: random.Random, number: int) -> NodeEvents:
    log = EventLog(JOB, 0, name)
    fault = _fault(number)
    cold = 1.0 if fault == "cold" else 0.12
    link = chance.gauss(1.0, 0.04) * (3.2 if fault == "link" else 1.0)
    cpu = chance.gauss(1.0, 0.03) * (1.9 if fault == "cpu" else 1.0)

    def at(t_s: float, kind: str, event: str, **fields: str | int | float | None) -> None:
        log.emit(kind, event, t_ns=START_NS + round(max(0.0, t_s) * 1e9), **fields)

    prolog = 0.35 + abs(chance.gauss(0, 0.3))
    attach = prolog + 1.1 + abs(chance.gauss(0, 0.2))
    get = attach + 0.3
    task = get + chance.gauss(5.5, 0.3) * cpu + 9 * (cold - 0.12) * link
    loaded = task + chance.gauss(9, 0.7) * cpu
    read = loaded + chance.gauss(24, 1.2) * link + 16 * (cold - 0.12) * link
    # Reads waited for as long as a slow link and a cold cache made the start longer.
    slow_s, cold_s = 24 * max(0.0, link - 1.2), (cold - 0.12) * link
    waits_s = {"image": 9 * cold_s, "environment": 0.0, "checkpoint": slow_s + 16 * cold_s}
    trained = read + chance.gauss(6, 0.5) * cpu
    at(prolog, "hook", "begin")
    at(prolog + 0.02, "hook", "received")
    at(prolog + 0.02, "session", "begin", mode="prefetch")
    at(attach, "step", "attach", step="0")
    at(get, "image", "get", target=IMAGE, what="image")
    at(task, "step", "task_start", step="0", task=number * GPUS_PER_NODE)
    at(trained, "mark", "training_started", step="0", task=number * GPUS_PER_NODE)
    cpu_s = trained * (0.5 if fault == "cpu" else 0.04)
    at(trained + 2, "load", "start", dur_s=trained, cpu_s=cpu_s, io_s=2.0)
    at(14_399, "clock", "store", offset_ms=chance.gauss(0, 0.8), error_ms=6.0)
    things = (
        ("image", IMAGE, 18 << 30, get, loaded),
        ("environment", ENVIRONMENT, 6 << 30, task, loaded),
        ("checkpoint", CHECKPOINT, 40 << 30, loaded, read),
    )
    for what, target, size_bytes, first_s, last_s in things:
        share = 1.0 if what == "checkpoint" else cold
        fetched = int(size_bytes * share)
        fetch_s = 8 * fetched / (2.1e9 / link)
        about = {"what": what, "target": target}
        at(prolog + 0.1, "prefetch", "begin", bytes=size_bytes, **about)
        at(
            prolog + fetch_s / 8, "prefetch", "end", bytes=fetched, bytes_cached=size_bytes - fetched,
            dur_s=fetch_s / 8, **about,
        )  # fmt: skip
        waited_s = 0.1 * link + waits_s[what]
        told = {
            "waited_s": waited_s, "longest_wait_s": 0.3 * waited_s,
            "reads": fetched >> 18, "read_bytes": size_bytes // 3, "miss_bytes": fetched // 40,
            "hit_bytes": size_bytes // 3 - fetched // 40, "blocked_s": 4 * waited_s,
            "first_ns": START_NS + round(first_s * 1e9), "last_ns": START_NS + round(last_s * 1e9),
            "store_bytes": fetched, "origin_bytes": 0, "cached_bytes": size_bytes - fetched,
            "fetch_s": fetch_s, "disk_s": fetched / 4e9,
        }  # fmt: skip
        at(trained + 2, "access", "start", **about, **told)
        at(14_399, "access", "summary", **about, **told)
    at(14_400, "session", "end")
    events = sorted(log.events(), key=lambda event: event.t_ns)
    return NodeEvents(name, tuple(events), 0)


def _fault(number: int) -> str:
    """The fault of a node; "" of a sound one."""
    if number % 100 == 41:
        return "link"
    if number % 100 == 67:
        return "cold"
    return "cpu" if number % 200 == 112 else ""


if __name__ == "__main__":
    import sys

    from bootseer_slurm.report.render.html import to_html

    print(to_html(made_report(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)), end="")
