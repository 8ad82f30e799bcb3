"""The event that ends a prefetch: how much was brought of a layer, and from where."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from bootseer_slurm.artifacts.layer import Layer
from bootseer_slurm.cache.fetching import Usage
from bootseer_slurm.events import Event, EventLog
from bootseer_slurm.prefetch.queue import tell_bytes
from bootseer_slurm.prefetch.work import Work


def told(**counted: int) -> Event:
    """The event of a layer of which these bytes came."""
    handle = SimpleNamespace(usage=Usage(**cast(Any, counted)), cached_bytes=7)
    layer = SimpleNamespace(handle=handle, label="/a", ref=SimpleNamespace(kind="image"))
    log = EventLog(5, 0, "n1")
    tell_bytes(log, "end", Work(cast(Layer, layer), {}, planned=False))
    (event,) = log.events()
    return event


def test_it_tells_the_bytes_of_each_source_apart() -> None:
    event = told(store_bytes=100, origin_bytes=20, peer_bytes=3)
    assert event.bytes == 123
    assert event.extra == {"bytes_cached": 7, "bytes_origin": 20, "bytes_peers": 3}


@pytest.mark.parametrize(
    ("counted", "source"),
    [
        ({"store_bytes": 1, "peer_bytes": 9}, "store"),
        ({"store_bytes": 1, "origin_bytes": 9}, "store"),
        ({"origin_bytes": 1, "peer_bytes": 9}, "origin"),
        ({"peer_bytes": 9}, "peers"),
    ],
)
def test_it_names_other_nodes_only_where_nothing_else_gave_bytes(
    counted: dict[str, int], source: str
) -> None:
    assert told(**counted).source == source
