"""The demo's training program: imports real packages, loads real weights, says where it is.

    train.py CHECKPOINT MODULE...

It goes on "training" until the file stop.<job id> is there: what Bootseer does in the background after a
start needs a job that runs.
"""

import hashlib
import importlib
import os
import sys
import time
from pathlib import Path

import bootseer_slurm

TRAINS_S = 600.0


def reached(stage: str) -> None:
    """Tell Bootseer, and whoever watches the job's output."""
    bootseer_slurm.mark(stage)
    print(f"{node} {stage}", flush=True)


node = os.environ["SLURMD_NODENAME"]
reached("image_loaded")

for name in sys.argv[2:]:
    importlib.import_module(name)
reached("environment_loaded")

from safetensors.numpy import load_file  # noqa: E402

weights = load_file(sys.argv[1])
reached("checkpoint_loaded")
reached("training_started")

stop = Path(f"stop.{os.environ['SLURM_JOB_ID']}")
end_s = time.monotonic() + TRAINS_S
while not stop.exists() and time.monotonic() < end_s:
    time.sleep(0.2)

checksum = hashlib.sha256()
for name in sorted(weights):
    checksum.update(weights[name].data)
print(f"{node} checksum {checksum.hexdigest()}", flush=True)
