"""Time commands from inside a machine of the cluster: reads a plan as JSON, writes the times as JSON.

    {"rounds": 25, "pause_s": 0.1, "commands": {"NAME": [{"argv": [...], "env": {...}, "timed": true}, ...]}}

Each round runs every command once, so the arms are interleaved; of a command's parts the timed ones count.
{round} in values is the number of the run. Writes {"NAME": [seconds, ...]}. Standard library only.
"""

import json
import os
import subprocess
import sys
import time

plan = json.load(sys.stdin)
seconds: dict[str, list[float]] = {name: [] for name in plan["commands"]}
number = plan.get("first_round", 1)
for _ in range(plan["rounds"]):
    for name, parts in plan["commands"].items():
        number += 1
        total_s = 0.0
        for part in parts:
            env = {key: value.replace("{round}", str(number)) for key, value in part.get("env", {}).items()}
            argv = [word.replace("{round}", str(number)) for word in part["argv"]]
            start_s = time.perf_counter()
            done = subprocess.run(
                argv,
                env=env or os.environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
            )
            if part.get("timed", True):
                total_s += time.perf_counter() - start_s
            if done.returncode != 0:
                sys.exit(f"{argv[0]} ended with {done.returncode}: {done.stderr.decode()}")
        seconds[name].append(total_s)
        time.sleep(plan.get("pause_s", 0))
json.dump(seconds, sys.stdout)
