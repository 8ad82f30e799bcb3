"""The garbage of the store (its blobs: tests/integration/test_image_library.py)."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bootseer_slurm.blob.gc import collect_garbage
from bootseer_slurm.blob.trace import (
    MAX_AGE_S,
    traces_folder,
)
from bootseer_slurm.store import FileStore

UID = 20001


def test_traces_that_are_too_old_for_a_plan_are_garbage(tmp_path: Path) -> None:
    store, root = FileStore(tmp_path), traces_folder(UID)
    for path in ("old/a/1.0.n1", "old/b/2.0.n1", "young/a/3.0.n1", "young/b/4.0.n1", "young/b/5.0.n1"):
        store.write(f"{root}/{path}", b"12345")
    past_s = time.time() - MAX_AGE_S - 10
    for path in (
        "old",
        "old/a",
        "old/a/1.0.n1",
        "old/b",
        "old/b/2.0.n1",
        "young/a",
        "young/a/3.0.n1",
        "young/b",
        "young/b/4.0.n1",
    ):
        os.utime(tmp_path / root / path, (past_s, past_s))
    found = collect_garbage(store, UID)
    assert sorted(found.removed) == [f"{root}/old", f"{root}/young/a"] and found.size_bytes == 15
    assert {path.name for path in (tmp_path / root).rglob("*")} == {"young", "b", "4.0.n1", "5.0.n1"}
    assert collect_garbage(store, UID).removed == []
