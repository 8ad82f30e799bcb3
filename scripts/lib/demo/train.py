"""The demo's training program: imports real packages, loads real weights, says where it is."""

import hashlib
import os
import sys
import time

import bootseer_slurm


def reached(stage: str) -> None:
    """Tell Bootseer, and whoever watches the job's output."""
    bootseer_slurm.mark(stage)
    print(f"{node} {stage} {time.time_ns()}", flush=True)


node = os.environ["SLURMD_NODENAME"]
reached("image_loaded")

import flax.linen  # noqa: E402, F401
import jax.numpy  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import optax  # noqa: E402, F401
import pandas  # noqa: E402, F401
import pyarrow.dataset  # noqa: E402, F401
import sklearn.linear_model  # noqa: E402, F401
from safetensors.numpy import load_file  # noqa: E402
from transformers import AutoTokenizer, LlamaConfig  # noqa: E402, F401

reached("environment_loaded")
weights = load_file(sys.argv[1])
reached("checkpoint_loaded")
reached("training_started")

checksum = hashlib.sha256()
for name in sorted(weights):
    checksum.update(weights[name].data)
print(f"{node} checksum {checksum.hexdigest()}", flush=True)
