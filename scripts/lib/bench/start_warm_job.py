"""The demo's program without its wait: start_warm_job.py CHECKPOINT MODULE... (runs inside the image).

Says when the weights are loaded, and ends.
"""

import importlib
import sys
import time

for name in sys.argv[2:]:
    importlib.import_module(name)

from safetensors.numpy import load_file  # noqa: E402

weights = load_file(sys.argv[1])
print(f"trains {time.time():.6f}", flush=True)
