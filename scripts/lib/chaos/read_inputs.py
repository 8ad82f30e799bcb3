"""Read inputs as a job does, and write what was read: read_inputs.py FOLDER PAUSE_S NAME=PATH...

Runs in each task, by the node's own Python, and pauses behind each MiB. FOLDER/JOB.RESTART.TASK.json gets the
digests, the inputs that were shadows, and the errors. The bytes of a folder are its files', in the order of
their names. LAUNCHED: when the step was, in seconds since the epoch. Exit status 1 with an error.
"""

import hashlib
import json
import os
import sys
import time

BLOCK_BYTES = 1 << 20


def files_below(path: str) -> list[str]:
    """The file itself, or all files of a folder."""
    if not os.path.isdir(path):
        return [path]
    return sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)


def digest(path: str, pause_s: float = 0) -> tuple[str, int]:
    """The digest of what a path holds, and the number of bytes."""
    whole, size_bytes = hashlib.sha256(), 0
    for file_path in files_below(path):
        with open(file_path, "rb", buffering=0) as file:
            file.seek(-min(BLOCK_BYTES, os.fstat(file.fileno()).st_size), os.SEEK_END)
            file.read(BLOCK_BYTES)  # the end first: checkpoints have their table there
            file.seek(0)
            while block := file.read(BLOCK_BYTES):
                whole.update(block)
                size_bytes += len(block)
                time.sleep(pause_s)
    return whole.hexdigest(), size_bytes


def main(folder: str, pause_s: str, *inputs: str) -> int:
    """All inputs, one after the other."""
    # A step that is being launched was shown what was there before its task runs.
    begun = float(os.environ["LAUNCHED"])
    told: dict[str, object] = {"begun": begun, "node": os.environ.get("SLURMD_NODENAME")}
    digests, errors, shadows, total_bytes = {}, {}, [], 0
    shared = os.stat("/shared").st_dev
    for each in inputs:
        name, _, path = each.partition("=")
        try:
            if os.stat(path).st_dev != shared:
                shadows.append(name)
            digests[name], size_bytes = digest(path, float(pause_s))
            total_bytes += size_bytes
        except OSError as error:
            errors[name] = str(error)
    told.update(digests=digests, errors=errors, shadows=shadows, bytes=total_bytes, ended=time.time())
    job, restart = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
    target = f"{folder}/{job}.{restart}.{os.environ['SLURM_PROCID']}"
    with open(f"{target}.new", "w") as file:
        json.dump(told, file)
    os.rename(f"{target}.new", f"{target}.json")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
