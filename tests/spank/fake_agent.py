#!/usr/bin/python3
"""A stand-in for the node agent: answers every request the same way, and writes down what it was asked.

    fake_agent.py SOCKET LOG [--bind SOURCE=TARGET]... [--setenv NAME=VALUE]... [--hang] [--plain]

Each request is one line of JSON in LOG. A bind is a real detached clone of SOURCE's mount, as the agent makes
it: read-only, nosuid, nodev. Prints "ready PID" when it listens. One thread, one client after the other.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socket
import struct
import time
from pathlib import Path

SYS_OPEN_TREE, SYS_MOUNT_SETATTR = 428, 442
OPEN_TREE_CLONE = 1
AT_EMPTY_PATH = 0x1000
READ_ONLY_NOSUID_NODEV = 0x1 | 0x2 | 0x4

_libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *args: object) -> int:
    """A system call; raises OSError."""
    result = int(_libc.syscall(ctypes.c_long(number), *args))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def clone_mount(source: str, *, plain: bool) -> int:
    """A descriptor of a detached mount that shows `source`; plain: with the flags of the mount it lies on."""
    fd = call(
        SYS_OPEN_TREE, ctypes.c_int(-100), source.encode(), ctypes.c_uint(OPEN_TREE_CLONE | os.O_CLOEXEC)
    )
    if not plain:
        attributes = struct.pack("4Q", READ_ONLY_NOSUID_NODEV, 0, 0, 0)
        call(
            SYS_MOUNT_SETATTR,
            ctypes.c_int(fd),
            b"",
            ctypes.c_uint(AT_EMPTY_PATH),
            attributes,
            ctypes.c_size_t(len(attributes)),
        )
    return fd


def attach_reply(options: argparse.Namespace) -> tuple[bytes, list[int]]:
    """The reply to OP=attach, and its descriptors."""
    entries, fds = ["STATUS=ok"], []
    for index, bind in enumerate(options.bind):
        source, _, target = bind.partition("=")
        seen = os.stat(target)
        fds.append(clone_mount(source, plain=options.plain))
        entries.append(f"BIND={index}:{seen.st_dev}:{seen.st_ino}:{target}")
    entries += [f"SETENV={setting}" for setting in options.setenv]
    return "".join(f"{entry}\0" for entry in entries).encode(), fds


def serve(link: socket.socket, options: argparse.Namespace) -> None:
    """Answer one client."""
    request = b"".join(iter(lambda: link.recv(65536), b"")).decode("utf-8", "backslashreplace")
    entries = dict(entry.split("=", 1) for entry in request.split("\0")[:-1])
    with options.log.open("a") as log:
        log.write(json.dumps(entries | {"_pid_uid_gid": struct.unpack("3i", peer(link))}) + "\n")
    reply, fds = b"STATUS=ok\0", []
    if entries.get("OP") == "attach":
        reply, fds = attach_reply(options)
    socket.send_fds(link, [reply], fds)
    for fd in fds:
        os.close(fd)


def peer(link: socket.socket) -> bytes:
    return link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("socket", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--bind", action="append", default=[])
    parser.add_argument("--setenv", action="append", default=[])
    parser.add_argument("--hang", action="store_true", help="accept, read nothing, answer nothing")
    parser.add_argument("--plain", action="store_true", help="leave the binds writable")
    options = parser.parse_args()
    options.socket.parent.mkdir(parents=True, exist_ok=True)
    options.socket.unlink(missing_ok=True)
    held = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(options.socket))
        options.socket.chmod(0o666)
        listener.listen(128)
        options.log.touch()
        print(f"ready {os.getpid()}", flush=True)
        while True:
            link, _ = listener.accept()
            if options.hang:
                held.append(link)
                with options.log.open("a") as log:
                    log.write(json.dumps({"_hung_ns": time.time_ns()}) + "\n")
                continue
            with link:
                try:
                    serve(link, options)
                except ConnectionError:
                    pass  # a client that does not wait for its reply


if __name__ == "__main__":
    main()
