"""A folder as a package index of the cluster: served by HTTP on the store server, behind its link."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from scripts.lib.cluster.client import Cluster
from scripts.lib.cluster.layout import STORE, Layout

PORT = 8003


@contextlib.contextmanager
def serving(cluster: Cluster, folder: Path) -> Iterator[str]:
    """Gives the address of the folder until the block ends."""
    address = Layout(cluster.state_dir).address(STORE)
    serve = f"python3 -m http.server --bind {address} --directory {folder} {PORT}"
    with cluster.start(STORE, "sh", "-c", f"{serve} >/dev/null 2>&1 & read -r end; kill $!") as process:
        try:
            yield f"http://{address}:{PORT}/"
        finally:
            assert process.stdin
            process.stdin.close()
