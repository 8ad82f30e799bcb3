"""An environment until its imports are done: what is done today, beside Bootseer.

Every arm ends with the same imports by alice, who sees the environment at its own path; the clock runs until
the last is done. Before each start no page is cached, and where an arm says so the agent's cache is empty.
One run takes about an hour on two cores, and longer the first time.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from scripts.lib.bench import env_inputs, image_inputs, index
from scripts.lib.bench.env_inputs import PEERS, Environment
from scripts.lib.bench.image_arms import (
    HERE,
    JOB_ENV,
    NODE,
    WORK,
    Result,
    Step,
    far_store,
    make_cold,
    measure_dd,
    run_plan,
)
from scripts.lib.bench.image_inputs import IMPORTS, PACKAGES
from scripts.lib.bench.rows import Row
from scripts.lib.bench.spinner import spinner
from scripts.lib.bench.told import events_of, figures, hook_environ
from scripts.lib.cluster.client import ALICE, BOOTSEER, HOOK, Cluster
from scripts.lib.cluster.layout import REPO, ClusterError, poll

REPEATS = 5
LINK = "1gbit"
DD_BYTES = 256 * 2**20
DELAY_S = 0.0005  # each way
PLACE = f"{WORK}/env"  # where other arms put the environment
UV_CACHE = f"{WORK}/uv-cache"
PYTHON = str(REPO / ".venv" / "bin" / "python")
ENTER = str(HERE / "env_enter.py")
STAMP = "/run/bench-attached"
BLOBS = f"/shared/bootseer/users/{ALICE}/blobs"
PATIENCE_S = 900.0
LOCAL, COLD, WARM = "local ext4 tree", "with Bootseer", "with Bootseer, snapshot on the node"
LAYER, LAYER_WARM = "with Bootseer, snapshot and layer", "with Bootseer, snapshot and layer on the node"
SHARED, TAR, VENV_PACK = "slow shared mount", "tar --zstd", "venv-pack, tar --gzip"
UV, PIP = "uv pip install", "pip install"
FAR, FAR_COLD = "slow shared mount, 1 ms", "with Bootseer, 1 ms"
UV_WARM = "uv pip install, warm cache, hard links"

_job_ids = itertools.count(700_000 + int(time.time()) % 100_000 * 10)


@dataclass(frozen=True)
class Arm:
    """steps: of image_node.py. source: what is shown at the environment's path, "" for what lies there.

    read: what the server reads into its memory first, for its disk is not what is measured. empty: forget the
    agent's cache first. job: of Bootseer's arms.
    """

    name: str
    steps: list[Step]
    source: str = ""
    read: str = ""
    empty: bool = False
    job: int = 0


@dataclass(frozen=True)
class Saved:
    """A snapshot that the first start made: the seconds that it took, and the bytes of the blob."""

    dur_s: float
    size_bytes: int


def run(cluster: Cluster) -> list[Row]:
    """All rows, on a cluster that is up."""
    with spinner("inputs") as step:
        inputs = image_inputs.make(cluster, step)
        environment = env_inputs.make(cluster, inputs, step)
        cluster.script("link", NODE, "10gbit")
        step("the first start, which saves the environment")
        prepare(cluster)
        saved = [save(cluster, environment)]
        step("the same of another one, and then of what is installed to that")
        second = env_inputs.make_second(cluster, environment)
        saved.append(save(cluster, second))
        env_inputs.install_more(cluster, second)
        saved.append(save(cluster, second))
        cluster.script("link", NODE, LINK)
        results: dict[str, list[Result]] = {}
        with index.serving(cluster, environment.wheels) as address:
            for number in range(REPEATS):
                step(f"dd, {number + 1} of {REPEATS}")
                rate = measure_dd(cluster, inputs, DD_BYTES)
                results.setdefault("dd", []).append({"bytes_per_s": rate})
                for arm in arms(environment, address):
                    step(f"{arm.name}, {number + 1} of {REPEATS}")
                    results.setdefault(arm.name, []).append(start(cluster, environment, arm))
                for arm in with_layer(second):
                    step(f"{arm.name}, {number + 1} of {REPEATS}")
                    results.setdefault(arm.name, []).append(start(cluster, second, arm))
                with far_store(cluster, DELAY_S):
                    for arm in far(environment):
                        step(f"{arm.name}, {number + 1} of {REPEATS}")
                        results.setdefault(arm.name, []).append(start(cluster, environment, arm))
    return rows_of(environment, results, saved)


def arms(environment: Environment, address: str) -> list[Arm]:
    """One round. Of Bootseer's arms the second finds what the first brought."""
    uv = [str(PEERS / "bin" / "uv"), "pip", "install", "--quiet", "--python", str(PEERS / "bin" / "python")]
    pip = [str(PEERS / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--trusted-host", address.split("/")[2].partition(":")[0]]
    wanted = ["--no-index", "--find-links", address, "--target", PLACE, *PACKAGES]
    cold, warm = next(_job_ids), next(_job_ids)

    def alice(name: str, *argv: str, **env: str) -> Step:
        return {"name": name, "argv": list(argv), "user": "alice", "env": env}

    hard = [*uv, "--link-mode", "hardlink", "--cache-dir", UV_CACHE, *wanted]
    forget = f"rm -rf {PLACE}/*; sync; echo 3 > /proc/sys/vm/drop_caches"
    from_cache: list[Step] = [
        {**alice("fill", *hard), "timed": False},
        {"name": "forget", "argv": ["bash", "-c", forget], "timed": False},
        alice("install", *hard),
    ]
    unpack = alice("unpack", "tar", "--zstd", "-C", PLACE, "-xf", environment.archive)
    unpack_venv = alice("unpack", "tar", "-C", PLACE, "-xzf", environment.venv_archive)
    site, wheels = f"{PLACE}/{env_inputs.VENV_SITE}", str(environment.wheels)
    return [
        Arm(LOCAL, [], source=str(environment.local)),
        Arm(SHARED, [], read=environment.target),
        Arm(COLD, [_prolog(cold, environment)], read=BLOBS, empty=True, job=cold),
        Arm(WARM, [_prolog(warm, environment)], job=warm),
        Arm(TAR, [unpack], source=PLACE, read=environment.archive),
        Arm(VENV_PACK, [unpack_venv], source=site, read=environment.venv_archive),
        Arm(UV_WARM, from_cache, source=PLACE, read=wheels),
        Arm(UV, [alice("install", *uv, "--no-cache", *wanted)], source=PLACE, read=wheels),
        Arm(PIP, [alice("install", *pip, "--no-cache-dir", *wanted)], source=PLACE, read=wheels),
    ]


def with_layer(environment: Environment) -> list[Arm]:
    """Of the environment that was installed to; the second finds what the first brought."""
    cold, warm = next(_job_ids), next(_job_ids)
    return [
        Arm(LAYER, [_prolog(cold, environment)], read=BLOBS, empty=True, job=cold),
        Arm(LAYER_WARM, [_prolog(warm, environment)], job=warm),
    ]


def far(environment: Environment) -> list[Arm]:
    """Inside of `far_store`: with 1 ms more round trip."""
    job = next(_job_ids)
    return [
        Arm(FAR, [], read=environment.target),
        Arm(FAR_COLD, [_prolog(job, environment)], read=BLOBS, empty=True, job=job),
    ]


def _slurm(job: int, environment: Environment) -> dict[str, str]:
    return hook_environ(job, "bench-env", ENV=environment.target)


def _prolog(job: int, environment: Environment) -> Step:
    env = _slurm(job, environment) | {"SLURM_SCRIPT_CONTEXT": "prolog_slurmd"}
    return {"name": "prolog", "argv": [HOOK], "env": env}


def _ended(job: int, environment: Environment) -> list[Step]:
    env = _slurm(job, environment) | {"SLURM_SCRIPT_CONTEXT": "epilog_slurmd"}
    return [{"name": "epilog", "argv": [HOOK], "env": env}]


def _mark(job: int) -> Step:
    env = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0"}
    return {"name": "mark", "argv": [BOOTSEER, "mark", "training_started"], "user": "alice", "env": env}


def start(cluster: Cluster, environment: Environment, arm: Arm) -> Result:
    """One start, on a node that was made cold. Raises ClusterError."""
    make_cold(cluster, empty=arm.empty)
    places = f"{PLACE} {UV_CACHE}"
    ready = f"rm -rf {places}; mkdir -p {places} && chown {ALICE}:{ALICE} {places}; "
    ready += (
        f"{{ setpriv --version; "
        f"{PYTHON} -c 'import bootseer_slurm.mounts, bootseer_slurm.agentapi.protocol'; "
    )
    ready += (
        f"/usr/bin/python3 -c 'import json, hashlib, importlib'; dd if={HERE}/image_job.py of=/dev/null; "
    )
    ready += f"{PEERS}/bin/uv --version; {PEERS}/bin/pip --version; }} >/dev/null 2>&1"
    cluster.exec(NODE, "bash", "-c", ready, timeout_s=120)
    if arm.read:
        # Not tar: it does not read what it writes to /dev/null.
        path = cluster.shared / arm.read.removeprefix("/shared/")
        subprocess.run(["grep", "-rqsa", "no such text in here", str(path)], check=False)
    how = ["agent", str(arm.job)] if arm.job else ["bind", arm.source or environment.target]
    job = [
        "env",
        f"PYTHONPATH={environment.target}",
        "/usr/bin/python3",
        "-W",
        "ignore",
        str(HERE / "image_job.py"),
        *IMPORTS,
    ]
    plan: dict[str, Any] = {
        "steps": arm.steps,
        "run": {
            "name": "job",
            "argv": [PYTHON, ENTER, *how, environment.target, str(ALICE), *job],
            "env": JOB_ENV | {"HOME": "/shared/home/alice"},
        },
        "imported": [_mark(arm.job)] if arm.job else [],
        "ended": _ended(arm.job, environment) if arm.job else [],
        "after": [["rm", "-rf", PLACE, UV_CACHE]],
        "link": "eth0",
    }
    result = run_plan(cluster, arm.name, plan, PATIENCE_S)
    return result | (_told(cluster, arm.job) if arm.job else {})


def _told(cluster: Cluster, job: int) -> Result:
    """The node's figures of a job, and the time at which its step had the environment."""
    events = events_of(cluster, job)
    begin_ns = next(event["t_ns"] for event in events if (event["kind"], event["name"]) == ("hook", "begin"))
    attached_ns = int(cluster.exec(NODE, "cat", STAMP).stdout)
    return figures(events) | {"attached_s": (attached_ns - begin_ns) / 1e9}


def prepare(cluster: Cluster) -> None:
    """An empty store, and an agent that packs."""
    key = f"umask 077; [ -s /etc/bootseer/site.key ] || {BOOTSEER} image make-key"
    shutil.rmtree(cluster.shared / f"bootseer/users/{ALICE}", ignore_errors=True)
    cluster.exec("login", BOOTSEER, "store", "init", timeout_s=300)
    cluster.exec(NODE, "bash", "-c", key)
    cluster.agent(NODE, "stop")
    cluster.agent(NODE, "start")


def save(cluster: Cluster, environment: Environment) -> Saved:
    """A start that finds no snapshot, and makes one in the background. Then one that records."""
    job = next(_job_ids)
    env = _slurm(job, environment)
    cluster.exec(NODE, "env", *_words(env), "SLURM_SCRIPT_CONTEXT=prolog_slurmd", HOOK)
    mark = ["env", f"SLURM_JOB_ID={job}", BOOTSEER, "mark", "training_started"]
    cluster.exec(NODE, *mark, user="alice")
    kept = f"/run/bootseer/events/{job}.0"

    def told() -> bool:
        return cluster.exec(NODE, "grep", "-q", '"kind":"snapshot"', kept).returncode == 0

    if not poll(told, timeout_s=PATIENCE_S):
        raise ClusterError("the first start saved no environment")
    cluster.exec(NODE, "env", *_words(env), "SLURM_SCRIPT_CONTEXT=epilog_slurmd", HOOK)
    (event,) = (event for event in events_of(cluster, job) if event["kind"] == "snapshot")
    if event["name"] != "saved":
        raise ClusterError(f"the first start saved no environment: {event}")
    names = cluster.shared / f"bootseer/users/{ALICE}/names"
    records = [json.loads(path.read_text()) for path in names.glob("*.json")]
    record = next(each for each in records if each["name"] == environment.target)
    size_bytes = (cluster.shared / "bootseer" / record["folder"] / "0").stat().st_size
    recorded = next(_job_ids)
    start(cluster, environment, Arm("recorded", [_prolog(recorded, environment)], empty=True, job=recorded))
    return Saved(event["dur_s"], size_bytes)


def _words(env: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in env.items()]


def rows_of(environment: Environment, results: dict[str, list[Result]], saved: list[Saved]) -> list[Row]:
    """The rows of all rounds. saved: two snapshots, and a layer over the second."""
    rate = median(each["bytes_per_s"] for each in results["dd"])
    local_s = _seconds(results[LOCAL])
    cold, warm = results[COLD], results[WARM]
    hot_bytes = median(each["hot_bytes"] for each in cold)
    bound_s = hot_bytes / rate + local_s
    best_s = min(_seconds(results[name]) for name in (SHARED, TAR, VENV_PACK, UV, PIP))
    _, whole, layer = saved
    layer_ratio = _seconds(results[LAYER]) / _seconds(cold)
    far_ratio = _seconds(results[FAR]) / _seconds(results[FAR_COLD])
    uv_s = _seconds(results[UV_WARM])
    how = f"{LINK}, dd {rate / 1e6:.0f} MB/s; {environment.files} files, {environment.size_bytes / 1e9:.1f} "
    how += f"GB; cold page cache; medians of {REPEATS} interleaved starts"
    attached_s = median(each["attached_s"] for each in warm)
    figures = [
        ("attached in the prolog, snapshot on the node", attached_s, "s", 0.2, None, False),
        ("snapshot on the node, against an ext4 tree", _seconds(warm) / local_s, "×", 1.0, 1.0, False),
        ("best of the others on a new node, against ours", best_s / _seconds(cold), "×", 5.0, 1.0, True),
        ("slow shared mount with 1 ms, against ours", far_ratio, "×", None, 1.0, True),
        ("snapshot on the node, against uv with all it needs", _seconds(warm) / uv_s, "×", 1.0, 1.0, False),
        ("start, against hot bytes / link + local", _seconds(cold) / bound_s, "×", 1.15, 1.0, False),
        ("layer, against the snapshot: start on a new node", layer_ratio, "×", None, 1.0, False),
        ("layer, against the snapshot: bytes", layer.size_bytes / whole.size_bytes, "×", None, None, False),
        ("layer, against the snapshot: time to save", layer.dur_s / whole.dur_s, "×", None, None, False),
        ("snapshot: time to save, in the background", whole.dur_s, "s", None, None, False),
    ]
    rows = [
        Row(name, value, unit, target, limit, how, at_least)
        for name, value, unit, target, limit, at_least in figures
    ]
    return rows + [
        Row(name, _seconds(each), "s", None, local_s, how) for name, each in results.items() if name != "dd"
    ]


def _seconds(results: list[Result]) -> float:
    return median(float(result["total_s"]) for result in results)
