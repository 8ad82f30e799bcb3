"""The store of `scripts/bench peers-engines`: one folder by plain HTTP with ranges, and a BitTorrent tracker.

Run as a program on the store's machine: ADDRESS PORT FOLDER. Standard library only. The tracker is that of
BEP 3 and 23, in memory: it tells each who asks the others that have asked.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from scripts.lib.bench.engines_torrent import bencode

_RANGE = re.compile(r"bytes=(\d+)-(\d*)$")
_INTERVAL_S = 2

folder = Path("/")
swarm: set[tuple[str, int]] = set()
swarm_lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        if self.path.startswith("/announce?"):
            self._announce()
        else:
            self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        """No line for each request: thousands would cost what is measured."""

    def _answer(self, with_body: bool) -> None:
        path = folder / Path(urlsplit(self.path).path).name
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        match = _RANGE.match(self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        end = min(int(match[2]) + 1, size) if match and match[2] else size
        if start >= end:
            self.send_error(416)
            return
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{size}"')
        if match:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        self.wfile.flush()
        if with_body:
            self._send(path, start, end)

    def _send(self, path: Path, start: int, end: int) -> None:
        with path.open("rb") as file:
            while start < end:
                try:
                    sent = os.sendfile(self.connection.fileno(), file.fileno(), start, end - start)
                except (ConnectionError, TimeoutError):
                    sent = 0
                if sent == 0:
                    self.close_connection = True
                    return
                start += sent

    def _announce(self) -> None:
        query = parse_qs(urlsplit(self.path).query, encoding="latin-1")
        me = (self.client_address[0], int(query["port"][0]))
        with swarm_lock:
            others = sorted(swarm - {me})
            swarm.add(me)
            if query.get("event") == ["stopped"]:
                swarm.discard(me)
        compact = b"".join(socket.inet_aton(host) + port.to_bytes(2, "big") for host, port in others)
        body = bencode({"interval": _INTERVAL_S, "min interval": _INTERVAL_S, "peers": compact})
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """Threads that end with the program, and a backlog for many nodes at once."""

    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """An engine that closes a connection early is no fault."""


def main() -> None:
    """Serve until standard input ends."""
    global folder
    address, port, path = sys.argv[1:]
    folder = Path(path)
    server = Server((address, int(port)), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
