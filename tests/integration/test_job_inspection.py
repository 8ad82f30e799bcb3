"""`bootseer debug job`: its owner and root see how far a start is, and nobody else does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.integration.node import BOB, Node, node, wait_until
from tests.integration.test_service_recovery import attach, make_file

__all__ = ["node"]
pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, /dev/fuse"),
]


def test_its_owner_sees_how_far_a_start_is(node: Node) -> None:
    model, gone = make_file(node, "model.bin", 2**20), node.folder / "data" / "gone.bin"
    node.start()
    profile = f'checkpoints = ["{model}", "{gone}"]'
    node.ask("prolog", JOB_ID=7, UID=54321, BOOTSEER=1, PROFILE=profile, NODENAME="n1")
    for fd in attach(node, 7).values():
        os.close(fd)

    def state() -> dict[str, object]:
        return dict(json.loads(node.bootseer("debug", "job", "7", "--json")))

    size_bytes = model.stat().st_size
    wait_until(lambda: f'"present_bytes": {size_bytes}' in json.dumps(state()))
    found = state()
    assert (found["node"], found["phase"], found["queues"]) == ("n1", "starting", {"hot": 0, "whole": 0})
    here, lacks = found["artifacts"]  # type: ignore[misc]
    assert (here["name"], here["state"], here["asked_by"]) == (str(model), "ready", "job")
    assert here["shown_at"] == str(model)
    (layer,) = here["layers"]
    assert (layer["fetched_bytes"], layer["sources"], layer["planned_blocks"]) == (
        size_bytes,
        ["origin"],
        None,
    )
    assert (lacks["state"], lacks["layers"]) == ("failed", []) and "No such file" in lacks["reason"]
    table = " ".join(node.bootseer("debug", "job", "7").split())
    assert "100 %" in table and "job 7 on n1: starting" in table
    node.ask("mark", JOB_ID=7, NAME="training_started", TIME_NS=1)
    wait_until(lambda: state()["phase"] == "training")


def test_nobody_else_sees_it(node: Node) -> None:
    node.start()
    node.ask("prolog", JOB_ID=7, UID=54321, BOOTSEER="observe")
    with pytest.raises(AssertionError, match="another user's"):
        node.bootseer("debug", "job", "7", uid=BOB)
    with pytest.raises(AssertionError, match="did not ask for Bootseer"):
        node.bootseer("debug", "job", "8")
