"""aria2, a daemon that is asked by RPC.

It has no way to ask for one piece before the others: its first bytes come when its order brings them.
"""

from __future__ import annotations

import base64
import http.client
import json
import subprocess
import time
from pathlib import Path
from typing import Any

from scripts.lib.bench.engines_engine import PATIENCE_S, Engine
from scripts.lib.bench.engines_torrent import PIECE_BYTES

_POLL_S = 0.02
_RPC_PORT = 6800
_OPTIONS = [
    "--enable-rpc",
    f"--rpc-listen-port={_RPC_PORT}",
    "--listen-port=6881",
    "--no-conf",
    "--quiet",
    "--enable-dht=false",
    "--enable-dht6=false",
    "--bt-enable-lpd=false",
    "--enable-peer-exchange=false",
    "--file-allocation=none",
    "--seed-ratio=0.0",
    "--bt-max-peers=64",
    "--bt-request-peer-speed-limit=10000M",  # always look for more peers
    "--bt-tracker-interval=2",
    "--bt-min-crypto-level=plain",
    "--disk-cache=64M",
    "--max-connection-per-server=4",
    "--split=4",
    "--min-split-size=1M",
    "--stream-piece-selector=random",  # in order, all nodes read the same pieces from the store
    "--allow-overwrite=true",
]


class Aria2(Engine):
    """aria2c with its RPC; this process only asks it, and is not counted.

    mode "seed": it serves what lies in the folder of the task.
    """

    def start(self) -> None:
        with (self.folder / "log").open("wb") as log:
            command = [self.task.programs["aria2c"], f"--dir={self.task.folder}", *_OPTIONS]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.pids = [self.process.pid]
        self.wait()
        if self.task.mode == "seed":
            self.add({"bt-seed-unverified": "true"})

    def wait(self) -> None:
        """Wait until it answers. Raises OSError with its log when it does not."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.rpc("getVersion")
                return
            except OSError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    log = (self.folder / "log").read_text()
                    raise OSError(f"aria2 does not answer: {log[-2000:]}") from None
            time.sleep(_POLL_S)

    def add(self, options: dict[str, str] | None = None) -> str:
        """Add the file; the id of the download."""
        metainfo = base64.b64encode(Path(self.task.torrent).read_bytes()).decode()
        return str(self.rpc("addTorrent", metainfo, [], options or {}))

    def quiet(self, offset: int) -> float | None:
        return None

    def all(self, offset: int, wait_s: float) -> tuple[float, float | None]:
        start_s = time.monotonic()
        name = self.add()
        piece, first_s = offset // PIECE_BYTES, None
        while True:
            state = self.rpc("tellStatus", name, ["bitfield", "status", "completedLength"])
            now_s = time.monotonic()
            bits = bytes.fromhex(state.get("bitfield", ""))
            there = len(bits) > piece // 8 and bits[piece // 8] & (0x80 >> piece % 8)
            if first_s is None and there and now_s >= start_s + wait_s:
                first_s = now_s - start_s - wait_s
            if int(state["completedLength"]) == self.task.size_bytes and first_s is not None:
                return now_s, first_s
            if state["status"] == "error" or now_s > start_s + PATIENCE_S:
                raise OSError(f"aria2 did not get it: {state['status']}, {state['completedLength']} bytes")
            time.sleep(_POLL_S)

    def rpc(self, method: str, *params: object) -> Any:
        """The result of a call. Raises OSError."""
        link = http.client.HTTPConnection("127.0.0.1", _RPC_PORT, timeout=PATIENCE_S)
        try:
            call = {"jsonrpc": "2.0", "id": "", "method": f"aria2.{method}", "params": list(params)}
            link.request("POST", "/jsonrpc", json.dumps(call))
            reply = json.loads(link.getresponse().read())
        finally:
            link.close()
        if "error" in reply:
            raise OSError(f"aria2 {method}: {reply['error']}")
        return reply["result"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
