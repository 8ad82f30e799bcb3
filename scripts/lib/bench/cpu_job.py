"""The job of `bench cpu`: cpu_job.py PATH reads a file, or all files below a folder, in the order of names.

Writes {"bytes", "files", "system_s", "filesystem"} when it has read all: system_s is the CPU time that the
kernel took in this process's name meanwhile (its own time, for Python's loops, is the same whatever it reads
from), filesystem the one that PATH is on. Waits for a line on stdin, then writes {"sha256"} of all that is
there. Standard library only.
"""

import hashlib
import json
import os
import resource
import sys
from collections.abc import Iterator

BUFFER_BYTES = 2**20


def files_of(path: str) -> Iterator[str]:
    """All regular files at or below a path."""
    if os.path.isfile(path):
        yield path
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = os.path.join(folder, name)
            if os.path.isfile(file) and not os.path.islink(file):
                yield file


def pieces_of(path: str, buffer: bytearray) -> Iterator[int]:
    """How many bytes of each read are in the buffer."""
    fd = os.open(path, os.O_RDONLY)
    while count := os.readv(fd, [buffer]):
        yield count
    os.close(fd)


def filesystem_of(path: str) -> str:
    """The type of the file system that a path is on."""
    best = "", ""
    with open("/proc/self/mountinfo") as lines:
        for line in lines:
            before, _, behind = line.partition(" - ")
            point = before.split()[4]
            if (path + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best[0]):
                best = point, behind.split()[0]
    return best[1]


def main(path: str) -> None:
    """Read it, say so, wait, and say what was there."""
    buffer = bytearray(BUFFER_BYTES)
    begin_s = resource.getrusage(resource.RUSAGE_SELF).ru_stime
    size, count = 0, 0
    for file in files_of(path):
        count += 1
        size += sum(pieces_of(file, buffer))
    system_s = resource.getrusage(resource.RUSAGE_SELF).ru_stime - begin_s
    told = {"bytes": size, "files": count, "system_s": system_s, "filesystem": filesystem_of(path)}
    print(json.dumps(told), flush=True)
    sys.stdin.readline()
    digest = hashlib.sha256()
    for file in files_of(path):
        digest.update(os.path.relpath(file, path).encode())
        for count in pieces_of(file, buffer):
            digest.update(memoryview(buffer)[:count])
    print(json.dumps({"sha256": digest.hexdigest()}), flush=True)


main(sys.argv[1])
