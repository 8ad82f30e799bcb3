"""A longer way to the store: image_relay.py PORT ADDRESS PORT DELAY_S, on the node.

Whatever comes in on one side goes out on the other DELAY_S later, with no limit to the rate: one thread for
each direction takes what there is, another sends it when its time has come. Standard library only.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import time

PART_BYTES = 2**20
WAITING = 64  # parts: at 1 ms they are far more than any link delivers
Parts = queue.Queue[tuple[float, bytes]]  # when each is due, in monotonic seconds


def take(source: socket.socket, parts: Parts, delay_s: float) -> None:
    """Read until the end, and note when each part may go on."""
    with source:
        while True:
            try:
                part = source.recv(PART_BYTES)
            except OSError:
                part = b""
            parts.put((time.monotonic() + delay_s, part))
            if not part:
                return


def give(parts: Parts, target: socket.socket) -> None:
    """Send each part when it is due, and then the end."""
    while True:
        due_s, part = parts.get()
        if (left_s := due_s - time.monotonic()) > 0:
            time.sleep(left_s)
        try:
            if not part:
                target.shutdown(socket.SHUT_WR)
                return
            target.sendall(part)
        except OSError:
            return


def serve(listener: socket.socket, address: str, far_port: int, delay_s: float) -> None:
    """Four threads for each connection."""
    while True:
        near, _ = listener.accept()
        far = socket.create_connection((address, far_port))
        for link in (near, far):
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, target in ((near, far), (far, near)):
            parts: Parts = queue.Queue(WAITING)
            threading.Thread(target=take, args=(source.dup(), parts, delay_s), daemon=True).start()
            threading.Thread(target=give, args=(parts, target), daemon=True).start()


def main() -> None:
    """Listen and relay until stdin is closed."""
    port, address, far_port, delay_s = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    with socket.create_server(("127.0.0.1", port), backlog=64) as listener:
        serving = threading.Thread(target=serve, args=(listener, address, far_port, delay_s), daemon=True)
        serving.start()
        print("ready", flush=True)
        sys.stdin.read()
        os._exit(0)


main()
