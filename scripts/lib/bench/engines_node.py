"""A node of `scripts/bench peers-engines`: one engine, started and told what to get.

Run as a program on the node's machine with one argument, JSON with the fields of `Task`. It writes "ready"
when the engine runs, then a line of JSON for each line that it reads:

    quiet OFFSET          {"first_s": S}               256 KiB at OFFSET and no more; null: it cannot
    all OFFSET WAIT_S     {"done_at": T, "first_s": S} all; 256 KiB at OFFSET are wanted after WAIT_S
    cpu                   {"cpu_s": S}                 CPU time of the engine's processes since "ready"
    check                 {"sha256": HEX}              of the file that it got

Times are of the monotonic clock, which all machines share. It ends, with its engine, when its input ends.
Standard library only, libtorrent's binding for the arms of libtorrent, and the product for its own peers.
"""

from __future__ import annotations

import hashlib
import json
import sys

from scripts.lib.bench.engines_aria2 import Aria2
from scripts.lib.bench.engines_engine import Direct, Engine, Task, process_s


def engine_of(task: Task) -> Engine:
    """The engine that a task names. Imports what only this one needs."""
    if task.engine == "direct":
        return Direct(task)
    if task.engine == "libtorrent":
        from scripts.lib.bench.engines_libtorrent import Libtorrent

        return Libtorrent(task)
    if task.engine == "peers":
        from scripts.lib.bench.peers_engine import Peers

        return Peers(task)
    return Aria2(task)


def answer(engine: Engine, line: str) -> dict[str, object]:
    """What is written for a line that was read."""
    verb, *words = line.split()
    if verb == "quiet":
        return {"first_s": engine.quiet(int(words[0]))}
    if verb == "all":
        done_at, first_s = engine.all(int(words[0]), float(words[1]))
        return {"done_at": done_at, "first_s": first_s}
    if verb == "cpu":
        return {"cpu_s": engine.cpu_s()}
    with engine.path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return {"sha256": digest.hexdigest()}


def main() -> None:
    """Work until standard input ends."""
    engine = engine_of(Task(**json.loads(sys.argv[1])))
    try:
        engine.start()
        engine.before_s = sum(map(process_s, engine.pids))
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(engine, line)), flush=True)
    finally:
        engine.close()


if __name__ == "__main__":
    main()
