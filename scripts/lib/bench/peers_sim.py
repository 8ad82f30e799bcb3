"""Simulated starts of jobs whose nodes read about one copy from the store together. Needs no cluster.

The nodes run the product's own directory and policy (peers_model.py). Jobs of 3 to 10,000 nodes read 256 MiB
from a slow store and from a fast one, undisturbed and disturbed: their nodes start within 2 s, one of a
hundred dies, and one of a hundred has a tenth of the link, one of each at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from scripts.lib.bench.peers_model import Outcome, simulate
from scripts.lib.bench.peers_world import Inputs, Job
from scripts.lib.bench.rows import Row
from scripts.lib.bench.spinner import spinner

PARTS = ("3", "16", "100", "1000", "10000")
_SIZE_BYTES = 256 * 2**20
_SKEW_S = 2.0
_PART = 100
_STORES = {"1 Gbit/s": Inputs(store_rates=((1, 1.25e8),)), "20 Gbit/s": Inputs(store_rates=((1, 2.5e9),))}
# Copies, by the most nodes that they are for. Below 1,000, one node of few is more than one of a hundred.
_COPIES = {100: None, 1000: 1.05, 10000: 1.15}
_LAST_TO_FIRST = 1.3


@dataclass(frozen=True)
class _Case:
    """One job on one cluster, and its name in the rows."""

    job: Job
    inputs: Inputs
    name: str
    is_disturbed: bool

    @property
    def floor_s(self) -> float:
        return self.inputs.floor_s(self.job.size_bytes)

    @property
    def is_large(self) -> bool:
        return self.job.nodes >= 1000


def run(only: str = "") -> list[Row]:
    """The rows of all jobs. only: of those with so many nodes."""
    rows: list[Row] = []
    with spinner("peers-sim") as step:
        for nodes in (only,) if only else PARTS:
            for case in _cases(int(nodes)):
                step(case.name)
                rows += _rows(case, simulate(case.job, case.inputs))
    return rows


def _cases(nodes: int) -> Iterator[_Case]:
    few = max(1, nodes // _PART)
    for store, inputs in _STORES.items():
        quiet = Job(nodes, _SIZE_BYTES)
        disturbed = Job(nodes, _SIZE_BYTES, _SKEW_S, dead=few, slow=few)
        for job, words in ((quiet, "quiet"), (disturbed, "disturbed")):
            yield _Case(job, inputs, f"{nodes:,} nodes, {store}, {words}", job is disturbed)


def _rows(case: _Case, outcome: Outcome) -> Iterator[Row]:
    inputs, floor_s = case.inputs, case.floor_s
    first_s, last_s = outcome.finish_s[0], outcome.finish_s[-1]
    how = (
        f"simulated: {case.job.size_bytes / 2**20:.0f} MiB; links of {inputs.link_bytes_per_s / 1e9:g} GB/s, "
        f"round trip {inputs.round_trip_s * 1e6:.0f} µs, WANT {inputs.want_s * 1e6:.0f} µs; disturbed: "
        f"starts within {_SKEW_S:g} s, 1 % of the nodes die and 1 % have a tenth of the link, one at least; "
        "times of the others"
    )
    # A skew that is longer than the transfer is all that this ratio would show.
    is_shown = case.job.skew_s <= floor_s
    ratio_target = _LAST_TO_FIRST if case.is_large and case.is_disturbed and is_shown else None
    copies = next(target for most, target in _COPIES.items() if case.job.nodes <= most)
    last_limit_s = max(floor_s, outcome.last_start_s + case.job.size_bytes / inputs.receive_bytes_per_s)
    fallbacks = {cause: count for cause, count in outcome.causes.items() if cause != "first"}
    figures: list[tuple[str, float, str, float | None, float | None]] = [
        ("copies", outcome.copies, "", copies, 1.0),
        ("first", first_s, "s", None, floor_s),
        ("99 %", _percentile(outcome.finish_s), "s", None, last_limit_s),
        ("last", last_s, "s", None, last_limit_s),
        *([("last/first", last_s / first_s, "×", ratio_target, 1.0)] if is_shown else []),
        ("from the own start, 99 %", _percentile(outcome.own_s), "s", None, None),
        ("from the own start, longest", outcome.own_s[-1], "s", None, None),
        ("fallbacks to the store", sum(fallbacks.values()), "chunks", None, None),
        *((f"fallbacks: {cause}", count, "chunks", None, None) for cause, count in fallbacks.items()),
        ("depth", outcome.depth, "hops", None, None),
        ("largest upload", outcome.largest_upload, "copies", None, None),
        ("connections of a node, most", outcome.connections, "", None, None),
        ("unfinished", outcome.unfinished, "nodes", 0, None),
    ]
    for metric, value, unit, target, limit in figures:
        yield Row(f"{case.name}: {metric}", value, unit, target, limit, how)


def _percentile(values: tuple[float, ...]) -> float:
    return values[-(-len(values) * 99 // 100) - 1]
