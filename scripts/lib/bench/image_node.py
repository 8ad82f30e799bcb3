"""One start of a container on a node, step by step: reads a plan as JSON, writes what it took as JSON.

    {"steps": [{"name": "mount", "argv": [...], "user": "alice", "env": {...}, "timed": true,
                "mounts": "/run/bench/root", "prints": "image", "stays": false, "pause_s": 10}, ...],
     "run": {"argv": [...], "user": "alice", "env": {...}}, "after": [argv, ...], "link": "eth0"}

Steps run in order; the clock starts with the first timed one (or the job) and stops when the job (run) says
that it has imported; then the steps "imported" run, and when it has ended those of "ended". mounts: wait
until something is mounted there. prints: the step's last line of output becomes {image} in later words.
stays: it is not waited for, and ended at the end. after: always done, whatever happened. Writes
{"total_s", "stages": {name: s}, "link_bytes": received until imported, "link_before_bytes": before the clock
started, "sha256", "read_bytes"}. Runs as root, standard library only.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from typing import Any, NoReturn

BASE = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
MOUNT_TIMEOUT_S = 120.0


def main() -> None:
    """Do what the plan on stdin says."""
    plan = json.load(sys.stdin)
    with contextlib.ExitStack() as stack:
        for argv in reversed(plan.get("after", [])):
            stack.callback(subprocess.run, argv, capture_output=True, check=False)
        json.dump(start(plan, stack), sys.stdout)


def start(plan: dict[str, Any], stack: contextlib.ExitStack) -> dict[str, Any]:
    """All steps and the job; the result."""
    first_bytes = received(plan["link"])
    begin: tuple[int, float] | None = None
    words: dict[str, str] = {}
    stages: dict[str, float] = {}
    for step in plan["steps"]:
        if step.get("timed", True) and begin is None:
            begin = received(plan["link"]), time.monotonic()
        since_s = time.monotonic()
        do(step, words, stack)
        stages[step["name"]] = round(time.monotonic() - since_s, 4)
    begin_bytes, begin_s = begin or (received(plan["link"]), time.monotonic())
    since_s = time.monotonic()
    job = launch(plan["run"], words, stdin=subprocess.PIPE)
    assert job.stdout is not None
    done = json.loads(job.stdout.readline() or fail(job, "the job"))
    stages["job"] = round(done["imported"] - since_s, 4)
    end_bytes = received(plan["link"])
    for step in plan.get("imported", []):
        do(step, words, stack)
    shown = json.loads(job.communicate(b"\n")[0] or fail(job, "the job"))
    for step in plan.get("ended", []):
        do(step, words, stack)
    return {
        "total_s": done["imported"] - begin_s,
        "stages": stages,
        "link_bytes": end_bytes - begin_bytes,
        "link_before_bytes": begin_bytes - first_bytes,
        "read_bytes": done["read_bytes"],
        "sha256": shown["sha256"],
    }


def do(step: dict[str, Any], words: dict[str, str], stack: contextlib.ExitStack) -> None:
    """One step."""
    time.sleep(step.get("pause_s", 0))
    if "argv" not in step:
        return
    stays = step.get("stays", False)
    process = launch(step, words)
    if stays:
        stack.callback(end, process)
    else:
        output, errors = process.communicate()
        if process.returncode != 0:
            why = f"{step['argv'][0]} ended with {process.returncode}: {errors.decode()[-2000:]}"
            sys.exit(f"{step['name']}: {why}")
        if "prints" in step:
            words[step["prints"]] = output.decode().strip().splitlines()[-1]
    if "mounts" in step:
        deadline_s = time.monotonic() + MOUNT_TIMEOUT_S
        while not mounted(step["mounts"]):
            if process.poll() not in (None, 0) or time.monotonic() > deadline_s:
                fail(process, step["name"])
            time.sleep(0.005)


def launch(
    step: dict[str, Any], words: dict[str, str], stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start a step's program with the user's rights, and pipes for its output."""
    argv = [fill(word, words) for word in step["argv"]]
    env = BASE | {key: fill(value, words) for key, value in step.get("env", {}).items()}
    if step.get("user"):
        argv = ["setpriv", f"--reuid={step['user']}", f"--regid={step['user']}", "--init-groups", *argv]
        env |= {"HOME": f"/shared/home/{step['user']}", "USER": step["user"]}
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, env=env, cwd="/", stdin=stdin, stdout=pipe, stderr=pipe)


def fill(word: str, words: dict[str, str]) -> str:
    """{name} replaced by what an earlier step printed."""
    for name, value in words.items():
        word = word.replace("{" + name + "}", value)
    return word


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that stayed; its mount was taken away before."""
    if process.poll() is None:
        process.terminate()
    process.wait()


def fail(process: subprocess.Popen[bytes], name: str) -> NoReturn:
    """The whole start failed: says why."""
    process.kill()
    sys.exit(f"{name} failed: {process.communicate()[1].decode()[-2000:]}")


def received(device: str) -> int:
    """Bytes that came over the link so far."""
    with open("/proc/self/net/dev") as lines:
        line = next(line for line in lines if line.strip().startswith(f"{device}:"))
    return int(line.split(":")[1].split()[0])


def mounted(target: str) -> bool:
    """Whether something is mounted there; a stat by root would ask the user's squashfuse, which refuses."""
    with open("/proc/self/mountinfo") as lines:
        return any(line.split()[4] == target for line in lines)


main()
