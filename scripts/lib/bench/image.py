"""Starting a container from its image: everything that can be done today, beside Bootseer.

One run takes about half an hour on two cores, and longer the first time, when it makes its image.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from scripts.lib.bench import image_arms as arms
from scripts.lib.bench import image_inputs, image_local, image_ours
from scripts.lib.bench.image_inputs import Inputs
from scripts.lib.bench.rows import Row
from scripts.lib.cluster.client import Cluster

REPEATS = 5
STOCK_REPEATS = 1
LINKS = ("1gbit", "10gbit")
DD_BYTES = 256 * 2**20
DELAY_S = 0.0005  # each way

Results = dict[str, list[arms.Result]]


def run(cluster: Cluster) -> list[Row]:
    """All rows, on a cluster that is up."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    rows: list[Row] = []
    with Progress(*columns) as progress:
        task = progress.add_task("inputs", total=None)

        def step(text: str) -> None:
            progress.update(task, description=text, advance=1)

        inputs = image_inputs.make(cluster, step)
        local = arms.rounds(cluster, inputs, arms.local(inputs), REPEATS, step)
        rows += local_rows(local)
        rows += image_local.store_rows(inputs, REPEATS, step)
        step("64 KiB blocks")
        touched_bytes = image_local.touched_bytes(cluster, inputs)
        for link in LINKS:
            cluster.script("link", arms.NODE, link)

            def step_of_link(text: str, link: str = link) -> None:
                step(f"{link}: {text}")

            results = link_rounds(cluster, inputs, link, step_of_link)
            rows += link_rows(inputs, link, results)
            rows += node_rows(link, results, touched_bytes, seconds(local["local, squashfuse"]))
    cluster.script("link", arms.NODE, LINKS[0])
    return rows


def local_rows(results: Results) -> list[Row]:
    """The cost of the mounts when the image lies on the node."""
    tree_s = seconds(results["ext4 tree"])
    how = f"imports in a container until the last is done, cold page cache, median of {REPEATS}, interleaved"
    return [
        Row(
            f"{name}, against an ext4 tree",
            seconds(each) / tree_s,
            "×",
            1.3 if name == "local, kernel" else None,
            1.0,
            f"{how}; tree {tree_s:.2f} s",
        )
        for name, each in results.items()
        if name != "ext4 tree"
    ]


def node_rows(link: str, results: Results, touched_bytes: int, squashfuse_s: float) -> list[Row]:
    """The node's rows of one link's rounds. squashfuse_s: a start of squashfuse on a local file."""
    hot_bytes = median(each["hot_bytes"] for each in results["with Bootseer"])
    how = f"hot blocks {hot_bytes / 1e6:.0f} MB; blocks of 64 KiB {touched_bytes / 1e6:.0f} MB, from a "
    how += "kernel mount of a file without readahead, when the last import was done"
    warm_how = (
        f"cold page cache, hot blocks on the node's disk; squashfuse on a local file {squashfuse_s:.2f} s"
    )
    start_s = seconds(results["with Bootseer"])
    return [
        Row(
            f"{link}: bytes before ready, against 64 KiB blocks",
            hot_bytes / touched_bytes,
            "×",
            1.4,
            1.0,
            how,
        ),
        Row(
            f"{link}: warm start, against squashfuse",
            seconds(results["warm"]) / squashfuse_s,
            "×",
            1.05,
            1.0,
            warm_how,
        ),
        image_local.recording_row(hot_bytes, start_s),
    ]


def link_rows(inputs: Inputs, link: str, results: Results) -> list[Row]:
    """The link's rows of one link's rounds."""
    rates = [result["bytes_per_s"] for result in results["dd"]]
    link_bytes_per_s = median(rates)
    local_s = seconds(results["local, kernel"])
    how = (
        f"{link}, cold page cache and empty agent's cache, {REPEATS} interleaved repeats ({STOCK_REPEATS} of "
    )
    how += f"stock), medians, bytes compared; dd {link_bytes_per_s / 1e6:.0f} MB/s; image "
    how += f"{inputs.image_bytes / 1e6:.0f} MB"
    ours = results["with Bootseer"]
    hot_bytes = median(each["hot_bytes"] for each in ours)
    # With a head start nothing else uses the link, nor this machine's cores.
    rate = median(each["hot_bytes"] / each["hot_s"] for each in results["10 s head start"])
    bound_s = hot_bytes / link_bytes_per_s + local_s
    copy_s = seconds(results["copy first, kernel"])
    far_s, ours_far_s = seconds(results["lazy over sshfs at 1 ms, kernel"]), seconds(results["at 1 ms"])
    added_s = seconds(ours) - local_s
    # Reads of pages that were pushed are not seen: a start without these tells how many there are.
    reads = max(each["reads"] for each in ours)
    blocked = median(each["reads_blocked"] for each in ours) / reads
    heavy_s, heavy_copy_s = seconds(results["heavy"]), seconds(results["copy first, kernel, reads a third"])
    far = (ours_far_s - local_s) / (far_s - local_s)
    targets = [
        ("hot prefetch, share of dd", rate / link_bytes_per_s, "", 0.95, 1.0, True),
        ("start, against hot bytes / link + local", seconds(ours) / bound_s, "×", 1.15, 1.0, False),
        ("what the link adds, of what copying adds", added_s / (copy_s - local_s), "", 0.2, None, False),
        ("at 1 ms: what the link adds, of a kernel mount over sshfs", far, "", 0.5, None, False),
        ("stock, against ours", seconds(results["stock"]) / seconds(ours), "×", 10.0, None, True),
        (
            "with 10 s head start, against local",
            seconds(results["10 s head start"]) / local_s,
            "×",
            None,
            1.0,
            False,
        ),
        ("reads that waited", blocked, "", 0.01, None, False),
        ("reads a third: ours, against copying first", heavy_s / heavy_copy_s, "×", 1.0, None, False),
    ]
    rows = [
        Row(f"{link}: {name}", value, unit, target, limit, how, at_least)
        for name, value, unit, target, limit, at_least in targets
    ]
    return rows + [
        Row(f"{link}: {name}", seconds(each), "s", None, local_s, how)
        for name, each in results.items()
        if name not in ("local, kernel", "dd")
    ]


def link_rounds(cluster: Cluster, inputs: Inputs, link: str, step: Callable[[str], None]) -> Results:
    """All starts over one link; "dd" has the link's own rates."""
    kernel = [arm for arm in arms.local(inputs) if arm.name == "local, kernel"]
    results: Results = {}

    def ours(name: str, **options: Any) -> None:
        step(f"{name}, {number + 1} of {REPEATS}")
        result = image_ours.measured(cluster, inputs, image_ours.URI, **options)
        results.setdefault(name, []).append(result)

    image_ours.publish(cluster, inputs.shared)
    image_ours.forget(cluster)
    for heavy in (False, True):  # these are recorded, and not counted
        step("recording")
        image_ours.measured(cluster, inputs, image_ours.URI, heavy=heavy)
    for number in range(REPEATS):
        step(f"dd, {number + 1} of {REPEATS}")
        rate = arms.measure_dd(cluster, inputs, DD_BYTES)
        results.setdefault("dd", []).append({"bytes_per_s": rate})
        merge(results, arms.rounds(cluster, inputs, [*kernel, *arms.remote(inputs)], 1, step))
        ours("with Bootseer")
        ours("warm", warm=True)
        ours("10 s head start", head_start_s=10.0)
        ours("heavy", heavy=True)
        with arms.far_store(cluster, DELAY_S):
            merge(results, arms.rounds(cluster, inputs, arms.far(inputs), 1, step))
            ours("at 1 ms")
    with arms.registry(cluster, inputs.registry) as address:
        merge(results, arms.rounds(cluster, inputs, [arms.stock(address)], STOCK_REPEATS, step))
    return results


def merge(results: Results, more: Results) -> None:
    """Add a round's results."""
    for name, each in more.items():
        results.setdefault(name, []).extend(each)


def seconds(results: list[arms.Result]) -> float:
    """The median start."""
    return median(float(result["total_s"]) for result in results)
