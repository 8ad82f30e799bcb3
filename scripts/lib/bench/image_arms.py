"""The arms of `bench image`: the ways in which a container can start, as plans for image_node.py.

Every arm ends with the same job in the same container (bwrap, as alice), so the arms differ only in where the
image is and how it is mounted. Before each start the node is made cold: no cached pages, and where the arm
says so nothing in the agent's cache. Then the programs that the arms need are run once, and the store server
reads the image into its memory: what a node's own programs and the server's disk cost is not measured here.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.lib.bench.image_inputs import HEAVY, IMPORTS, REFERENCE, Inputs, Registry
from scripts.lib.cluster.client import ALICE, Cluster
from scripts.lib.cluster.layout import STORE, ClusterError, Layout
from scripts.lib.cluster.storage import PORT, SSHFS_OPTIONS
from scripts.lib.demo.inputs import PYTHON

NODE = "n1"
WORK = "/var/lib/bootseer/bench"  # on the node's disk, not in memory
ROOT = f"{WORK}/root"
COPY = f"{WORK}/image.sqsh"
STOCK = f"{WORK}/stock"
RUN_TIMEOUT_S = 900.0
# enroot.conf(5): the default of ENROOT_SQUASH_OPTIONS, and what enroot itself adds.
ENROOT_SQUASHFS = ["-comp", "lzo", "-noD", "-all-root", "-noappend", "-quiet", "-no-progress"]
RELAY_PORT = 2050
HERE = Path(__file__).resolve().parent
JOB_ENV = {
    "MPLCONFIGDIR": "/tmp",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "JAX_PLATFORMS": "cpu",
}

Step = dict[str, Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to start.

    steps: of image_node.py; those with timed off come before the clock starts. root: the folder that becomes
    the container's /. heavy: the job also reads large packages whole. empty: forget the agent's cache too.
    enter: squashfuse, image and mount point of image_enter.sh, in which the container starts.
    imported, ended: steps when the job has imported, and when it has ended.
    """

    name: str
    steps: list[Step]
    root: str = ROOT
    heavy: bool = False
    empty: bool = False
    imported: list[Step] = field(default_factory=list)
    ended: list[Step] = field(default_factory=list)
    enter: list[str] = field(default_factory=list)

    def plan(self) -> Result:
        """The steps that image_node.py is given."""
        job = ["python3", "-W", "ignore", "/tmp/job.py", *IMPORTS]
        if self.heavy:
            job += ["--", *(f"/usr/local/lib/python{PYTHON}/dist-packages/{name}" for name in HEAVY)]
        container = ["bwrap", "--ro-bind", self.root, "/", "--dev", "/dev", "--proc", "/proc"]
        container += ["--tmpfs", "/tmp", "--ro-bind", str(HERE / "image_job.py"), "/tmp/job.py", "--", *job]
        if self.enter:
            container = [str(HERE / "image_enter.sh"), *self.enter, *container]
        return {
            "steps": self.steps,
            "run": {"name": "job", "argv": container, "user": "alice", "env": JOB_ENV},
            "imported": self.imported,
            "ended": self.ended,
            "after": [["umount", "-q", ROOT], ["rm", "-rf", COPY, STOCK]],
            "link": "eth0",
        }


def kernel(image: str) -> Step:
    """A loop mount by the kernel's driver."""
    argv = ["mount", "-t", "squashfs", "-o", "ro,loop", image, ROOT]
    return {"name": "mount", "argv": argv, "mounts": ROOT}


def fuse(program: str, image: str) -> Step:
    """A mount by squashfuse or squashfuse_ll, as the user."""
    argv = [program, "-f", image, ROOT]
    return {"name": "mount", "argv": argv, "user": "alice", "mounts": ROOT, "stays": True}


def copy(source: str) -> Step:
    """The whole image onto the node's disk."""
    return {"name": "copy", "argv": ["dd", f"if={source}", f"of={COPY}", "bs=4M"]}


def local(inputs: Inputs) -> list[Arm]:
    """Everything on the node's disk: what no link can change."""
    image = str(inputs.image)
    return [
        Arm("ext4 tree", [], root=str(inputs.tree)),
        Arm("local, kernel", [kernel(image)]),
        Arm("local, squashfuse", [fuse("squashfuse", image)]),
        Arm("local, squashfuse_ll", [fuse("squashfuse_ll", image)]),
    ]


def remote(inputs: Inputs) -> list[Arm]:
    """Over the link, as it is done today; the image is on shared storage."""
    return [
        Arm("copy first, kernel", [copy(inputs.shared), kernel(COPY)]),
        Arm("lazy over sshfs, squashfuse", [fuse("squashfuse", inputs.shared)]),
        Arm("copy first, kernel, reads a third", [copy(inputs.shared), kernel(COPY)], heavy=True),
    ]


def far(inputs: Inputs) -> list[Arm]:
    """Inside of `far_store`."""
    return [
        Arm("lazy over sshfs at 1 ms, kernel", [kernel(inputs.shared)]),
        Arm("lazy over sshfs at 1 ms, squashfuse", [fuse("squashfuse", inputs.shared)]),
    ]


def stock(registry: str) -> Arm:
    """Do as `enroot import` and `enroot create`, with Debian's tools and enroot's default compression."""
    layout, bundle, image, tree = (f"{STOCK}/{name}" for name in ("oci", "bundle", "image.sqsh", "tree"))

    def alice(name: str, *argv: str) -> Step:
        return {"name": name, "argv": list(argv), "user": "alice"}

    source = f"docker://{registry}/{REFERENCE}"
    tls = "--src-tls-verify=false"
    return Arm(
        "stock",
        [
            alice("pull", "skopeo", "--insecure-policy", "copy", "--quiet", tls, source, f"oci:{layout}:1"),
            alice("unpack", "umoci", "unpack", "--rootless", "--image", f"{layout}:1", bundle),
            alice("mksquashfs", "mksquashfs", f"{bundle}/rootfs", image, *ENROOT_SQUASHFS),
            alice("unsquashfs", "unsquashfs", "-no-progress", "-quiet", "-user-xattrs", "-d", tree, image),
        ],
        root=tree,
    )


def start(cluster: Cluster, inputs: Inputs, arm: Arm) -> Result:
    """One start, on a node that was made cold as the arm says. Raises ClusterError."""
    make_cold(cluster, empty=arm.empty)
    folders = f"mkdir -p {ROOT} {STOCK} && chown {ALICE}:{ALICE} {ROOT} {STOCK}"
    warm = "bwrap --version; setpriv --version; squashfuse --help; squashfuse_ll --help; mount --version"
    warm += f"; python3 -c 'import json, subprocess, contextlib'; dd if={HERE}/image_job.py of=/dev/null"
    cluster.exec(NODE, "bash", "-c", f"{folders} && {{ {warm}; }} >/dev/null 2>&1")
    for path in [cluster.shared / inputs.shared.removeprefix("/shared/")]:
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=4M"], stderr=subprocess.DEVNULL, check=True)
    return run_plan(cluster, arm.name, arm.plan(), RUN_TIMEOUT_S)


def run_plan(cluster: Cluster, name: str, plan: dict[str, Any], timeout_s: float) -> Result:
    """A start on the node as a plan says (image_node.py). Raises ClusterError."""
    argv = ["/usr/bin/python3", str(HERE / "image_node.py")]
    done = cluster.exec(NODE, *argv, input_text=json.dumps(plan), timeout_s=timeout_s)
    if done.returncode != 0:
        raise ClusterError(f"the start {name!r} failed: {done.stderr.strip()}")
    result: Result = json.loads(done.stdout)
    return result


def make_cold(cluster: Cluster, *, empty: bool) -> None:
    """Forget cached pages, and with `empty` the agent's cache."""
    cluster.script("drop-caches", *(["--bootseer"] if empty else []))


def measure_dd(cluster: Cluster, inputs: Inputs, size_bytes: int) -> float:
    """The rate of the link: bytes/s of dd from the node's shared folder, cold."""
    make_cold(cluster, empty=False)
    count = size_bytes // 2**22
    path = cluster.shared / inputs.shared.removeprefix("/shared/")
    subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=4M"], stderr=subprocess.DEVNULL, check=True)
    argv = ["dd", f"if={inputs.shared}", "of=/dev/null", "bs=4M", f"count={count}"]
    done = cluster.exec(NODE, *argv, timeout_s=300)
    if done.returncode != 0:
        raise ClusterError(f"dd failed: {done.stderr}")
    last = done.stderr.splitlines()[-1]
    return int(last.split(" bytes")[0]) / float(last.split(", ")[-2].split()[0])


@contextlib.contextmanager
def registry(cluster: Cluster, storage: Path) -> Iterator[str]:
    """The registry of a folder on the store server, behind its link and the nodes': gives HOST:PORT."""
    address = f"{Layout(cluster.state_dir).address(STORE)}:5000"

    def launch(*argv: str) -> subprocess.Popen[str]:
        return cluster.start(STORE, *argv)

    with Registry(storage, address, launch):
        yield address


@contextlib.contextmanager
def far_store(cluster: Cluster, delay_s: float) -> Iterator[None]:
    """The node's /shared with `delay_s` more each way to its server (image_relay.py) until the block ends."""
    layout = Layout(cluster.state_dir)
    relay = ["/usr/bin/python3", str(HERE / "image_relay.py"), str(RELAY_PORT), layout.address(STORE)]
    with cluster.start(NODE, *relay, str(PORT), str(delay_s)) as process:
        assert process.stdout
        try:
            if process.stdout.readline() != "ready\n":
                raise ClusterError("image_relay.py did not start")
            options = f"directport={RELAY_PORT},{SSHFS_OPTIONS}"
            preload = f"LD_PRELOAD={layout.dir / 'lib' / 'owner.so'}"
            mounting = ["env", preload, "sshfs", "-o", options, "127.0.0.1:/shared", "/shared"]
            cluster.run(NODE, *mounting)
            try:
                yield
            finally:
                cluster.run(NODE, "umount", "-l", "/shared")
        finally:
            assert process.stdin
            process.stdin.close()


def rounds(
    cluster: Cluster,
    inputs: Inputs,
    arms: list[Arm],
    count: int,
    step: Callable[[str], None],
) -> dict[str, list[Result]]:
    """Each arm once in every round, so that they are interleaved. Raises ClusterError when bytes differ."""
    results: dict[str, list[Result]] = {arm.name: [] for arm in arms}
    seen: dict[bool, str] = {}
    for number in range(count):
        for arm in arms:
            step(f"{arm.name}, {number + 1} of {count}")
            result = start(cluster, inputs, arm)
            if seen.setdefault(arm.heavy, result["sha256"]) != result["sha256"]:
                raise ClusterError(f"the start {arm.name!r} read other bytes than {arms[0].name!r}")
            results[arm.name].append(result)
    return results
