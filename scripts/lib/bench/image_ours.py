"""The arms with Bootseer: what Slurm, pyxis and enroot do at a start, in order, with the real programs.

    prolog.d/50-bootseer     as slurmd calls it, with what `sbatch --bootseer` passes on; the clock starts
    bootseer-importer get    as pyxis calls it, as the user; its answer is the image
    libexec/squashfuse       as enroot calls it, in the user's namespaces (image_enter.sh)
    the job; bootseer mark training_started as soon as it has imported
    bootseer-importer release, and the hook as epilog

All starts are of one job class, so the first one, which is not counted, records what the next ones prefetch.
"""

from __future__ import annotations

import itertools
import shutil
import time

from scripts.lib.bench.image_arms import ROOT, Arm, Result, Step, start
from scripts.lib.bench.image_inputs import Inputs
from scripts.lib.bench.told import events_of, figures, hook_environ
from scripts.lib.cluster.client import ALICE, HOOK, Cluster
from scripts.lib.cluster.layout import REPO

BIN = REPO / ".venv" / "bin"
STAND_IN = str(REPO / "libexec" / "squashfuse")
JOB_NAME = "bench-image"
RUNTIME = "/run/bench-pyxis"
# By digest: no registry needs to be asked what a tag means.
DIGEST = "sha256:" + "1" * 64
URI = f"docker://registry.example/bench@{DIGEST}"

_job_ids = itertools.count(800_000 + int(time.time()) % 100_000 * 10)


def publish(cluster: Cluster, image: str) -> None:
    """Put an image of the shared storage into the store as alice's, under a registry's name, with the site's
    signature.

    The node gets the key, as every node of a site has it.
    """
    python = str(BIN / "python")
    program = str(REPO / "scripts" / "lib" / "bench" / "image_publish.py")
    for user, *command in (
        (None, str(BIN / "bootseer"), "store", "init"),
        ("alice", str(BIN / "bootseer"), "image", "push", image),
        (None, python, program, image, URI, DIGEST, str(ALICE)),
    ):
        cluster.run("login", *command, user=user, timeout_s=300)


def measured(
    cluster: Cluster,
    inputs: Inputs,
    uri: str,
    *,
    head_start_s: float = 0.0,
    heavy: bool = False,
    warm: bool = False,
) -> Result:
    """One start of a new job, and what its node told of it (docs/events.md).

    warm: what earlier starts brought to the node's disk is kept.
    Beside what every start gives: hot_bytes and hot_s of the prefetch, reads, reads_blocked.
    """
    job_id = next(_job_ids)
    result = start(cluster, inputs, arm(job_id, uri, head_start_s=head_start_s, heavy=heavy, warm=warm))
    return result | figures(events_of(cluster, job_id))


def forget(cluster: Cluster) -> None:
    """Forget what earlier starts touched."""
    shutil.rmtree(cluster.shared / f"bootseer/users/{ALICE}/traces", ignore_errors=True)


def arm(job_id: int, uri: str, *, head_start_s: float, heavy: bool, warm: bool) -> Arm:
    """A start of a new job. head_start_s: between the prolog and the step."""
    title = "with Bootseer"
    slurm = hook_environ(job_id, f"{JOB_NAME}-{heavy}", CONTAINER_IMAGE=uri)
    step = {
        "SLURM_JOB_ID": str(job_id),
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_UID": str(ALICE),
        "PYXIS_RUNTIME_PATH": RUNTIME,
    }
    importer = str(BIN / "bootseer-importer")
    steps: list[Step] = [
        {"name": "prolog", "argv": [HOOK], "env": slurm | {"SLURM_SCRIPT_CONTEXT": "prolog_slurmd"},
         "timed": head_start_s == 0},
        {"name": "head start", "pause_s": head_start_s, "timed": False},
        {"name": "importer", "argv": [importer, "get", uri], "user": "alice", "env": step, "prints": "image"},
    ]  # fmt: skip
    marking = [str(BIN / "bootseer"), "mark", "training_started"]
    mark: Step = {"name": "mark", "argv": marking, "user": "alice", "env": step}
    release: Step = {"name": "release", "argv": [importer, "release"], "user": "alice", "env": step}
    epilog: Step = {
        "name": "epilog",
        "argv": [HOOK],
        "env": slurm | {"SLURM_SCRIPT_CONTEXT": "epilog_slurmd"},
    }
    enter = [STAND_IN, "{image}", ROOT]
    return Arm(
        title, steps, heavy=heavy, empty=not warm, imported=[mark], ended=[release, epilog], enter=enter
    )
