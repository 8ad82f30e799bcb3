"""Clients that load the agent of this node, until stdin is closed: flood.py hold|ask.

hold: connections that fill the backlog of root's socket and say nothing. ask: threads that ask for its status
all the time. connect: threads that connect all the time.
"""

import socket
import sys
import threading

SOCKET = "/run/bootseer/agent.sock"
ROOT_SOCKET = "/run/bootseer/root.sock"
ASKING = 8

held: list[socket.socket] = []


def hold() -> None:
    """Connect until the kernel takes no more."""
    while True:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.settimeout(0.2)
        held.append(link)
        try:
            link.connect(ROOT_SOCKET)
        except (BlockingIOError, TimeoutError):
            return


def ask() -> None:
    """Ask and wait for the answer, again and again."""
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.connect(SOCKET)
            link.sendall(b"OP=status\0")
            link.shutdown(socket.SHUT_WR)
            while link.recv(65536):
                pass


def connect() -> None:
    """Connect and go, again and again."""
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.connect(SOCKET)


if sys.argv[1] == "hold":
    hold()
else:
    for _ in range(ASKING):
        threading.Thread(target={"ask": ask, "connect": connect}[sys.argv[1]], daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
