"""A site for the tests with real pyxis: a cluster of two nodes, enroot set up for its users, and a registry.

The site's own enroot.conf stays as it is: in the nodes another folder lies over enroot.conf.d. A hook of
alice's for enroot writes down, in /etc/start of each container, what the container's image is mounted by.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import tarfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from scripts.lib.cluster.client import ALICE, BOOTSEER, Cluster

HOME = "/shared/home/alice"
PACKAGES = ("docker-registry", "mksquashfs", "squashfuse")
TOOLS = ("sh", "cat", "cut", "sha256sum", "sleep")
PAYLOAD_BYTES = 24 << 20
ENROOT_CONF = """\
ENROOT_RUNTIME_PATH /run/enroot/user-$(id -u)
ENROOT_CACHE_PATH /run/enroot/cache-$(id -u)
ENROOT_DATA_PATH /run/enroot/data-$(id -u)
ENROOT_TEMP_PATH /tmp
ENROOT_NATIVE_OVERLAYFS y
ENROOT_ALLOW_HTTP y
"""
# Runs when the image is mounted and before the container's root is entered: mountinfo(5) still shows it.
HOOK = r"""#!/bin/sh
{
    sed -n 's/.* [^ ]*\/overlay\/lower .* - \([^ ]*\) .*/\1/p' /proc/self/mountinfo
    if grep -q ' /shared/home/alice/[^ ]*sqsh .*bootseer' /proc/self/mountinfo; then echo shadow; fi
} | tr '\n' ' ' > "$ENROOT_ROOTFS/etc/start"
"""
CHECK = 'echo "$SLURMD_NODENAME $(sha256sum < /payload | cut -c1-64) $(cat /etc/start)"'
REGISTRY_CONF = """\
version: 0.1
log: {{level: warn}}
storage: {{filesystem: {{rootdirectory: {folder}}}}}
http: {{addr: "{host}"}}
"""
MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"


@dataclass(frozen=True)
class Start:
    """A task's line: its node, the digest of what it read, and by what its image was mounted."""

    node: str
    payload: str
    mounted_by: str
    shadow: bool


class Site:
    """The site. `payload` is the digest of the image's large file, `image` its name in the registry."""

    def __init__(self, state_dir: Path, folder: Path) -> None:
        self.cluster = Cluster(state_dir, node_count=2)
        self.payload = ""
        self._folder = folder
        self._rootfs = folder / "rootfs"
        self._registry: subprocess.Popen[bytes] | None = None
        self._host = ""

    def start(self) -> None:
        self.cluster.script("up", "--nodes", "2", timeout_s=900)
        etc = self.cluster.state_dir / "etc/bootseer"
        with open(etc / "site.key", "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as key:
            key.write(secrets.token_bytes(32))
        (etc / "enroot.conf.d").mkdir()
        (etc / "enroot.conf.d/cluster.conf").write_text(ENROOT_CONF)
        self._make_rootfs()
        self._start_registry()
        self._prepare_home()
        assert self.cluster.exec("login", BOOTSEER, "store", "init").returncode == 0
        for node in self.cluster.nodes:
            self._prepare(node)

    def stop(self) -> None:
        if self._registry is not None:
            self._registry.kill()
            self._registry.wait()
        self.cluster.script("down")

    def configure(self, text: str) -> None:
        """Put this below the cluster's bootseer.toml, and start the agents anew."""
        file = self.cluster.state_dir / "etc/bootseer/bootseer.toml"
        file.write_text(file.read_text().partition("# test\n")[0] + "# test\n" + text)
        for node in self.cluster.nodes:
            self.cluster.agent(node, "stop")
            self.cluster.agent(node, "start")

    def _prepare(self, node: str) -> None:
        """Let users run enroot on a node, with the settings above and our squashfuse."""
        info = self.cluster.exec(node, "enroot", "info").stdout
        conf = re.search(r"^Config file: (.*)$", info, re.MULTILINE)
        assert conf, info
        commands = (
            f"set -e; install -d -m 1777 /run/enroot; mount --bind /etc/bootseer/enroot.conf.d {conf[1]}.d"
        )
        done = self.cluster.exec(node, "sh", "-c", commands)
        assert done.returncode == 0, done.stderr

    def _prepare_home(self) -> None:
        home = self.cluster.shared / "home/alice"
        hook = home / ".config/enroot/hooks.d/50-start.sh"
        hook.parent.mkdir(parents=True)
        hook.write_text(HOOK)
        hook.chmod(0o755)
        pack(self._rootfs, home / "app.sqsh")
        for path in (home / ".config", *(home / ".config").rglob("*"), home / "app.sqsh"):
            os.chown(path, ALICE, ALICE)

    def _make_rootfs(self) -> None:
        """A small image: a shell, a few tools with their libraries, and a large file that nobody has seen."""
        for name in ("etc", "proc", "sys", "dev", "tmp", "var", "root", "bin"):
            (self._rootfs / name).mkdir(parents=True)
        for tool in TOOLS:
            program = shutil.which(tool)
            assert program
            needs = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
            for library in re.findall(r"/\S+", needs):
                target = self._rootfs / library.lstrip("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(library, target)
            shutil.copy(program, self._rootfs / "bin" / tool)
        (self._rootfs / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        payload = secrets.token_bytes(PAYLOAD_BYTES)
        (self._rootfs / "payload").write_bytes(payload)
        self.payload = hashlib.sha256(payload).hexdigest()

    # The registry

    @property
    def image(self) -> str:
        return f"{self._host}/team/app:1"

    def fetched_layers(self) -> int:
        """How often the registry has sent a layer's bytes so far."""
        requests = (self._folder / "log").read_text()
        return len(re.findall(r'"GET /v2/\S+/blobs/sha256:\S+ HTTP/1.1" 200 [0-9]{7,}', requests))

    def _start_registry(self) -> None:
        address = host_address(self.cluster)
        with socket.create_server((address, 0)) as link:
            self._host = f"{address}:{link.getsockname()[1]}"
        config = self._folder / "config.yml"
        config.write_text(REGISTRY_CONF.format(folder=self._folder / "data", host=self._host))
        with (self._folder / "log").open("wb") as log:
            self._registry = subprocess.Popen(
                ["docker-registry", "serve", str(config)], stdout=log, stderr=log
            )
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                self._call("GET", "/v2/")
                break
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.1)
        self._push()

    def _push(self) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.add(self._rootfs, ".")
        layer = buffer.getvalue()
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": ["PATH=/bin"]},
            # enroot's first request accepts only the oldest manifests, which this registry makes of a history.
            "history": [{"created": "2024-01-01T00:00:00Z", "created_by": "a test"}],
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        }
        docker = "application/vnd.docker"
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": self._upload(json.dumps(config).encode(), f"{docker}.container.image.v1+json"),
            "layers": [self._upload(gzip.compress(layer, 1), f"{docker}.image.rootfs.diff.tar.gzip")],
        }
        self._call("PUT", "/v2/team/app/manifests/1", json.dumps(manifest).encode(), MANIFEST_TYPE)

    def _upload(self, content: bytes, media_type: str) -> dict[str, object]:
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        place = self._call("POST", "/v2/team/app/blobs/uploads/", b"")["Location"]
        self._call("PUT", f"{place}&digest={digest}", content, "application/octet-stream")
        return {"mediaType": media_type, "digest": digest, "size": len(content)}

    def _call(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> dict[str, str]:
        url = path if path.startswith("http") else f"http://{self._host}{path}"
        headers = {"Content-Type": kind} if kind else {}
        request = urllib.request.Request(url, data=body, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            return dict(reply.headers)

    # Jobs

    def run(self, image: str, *options: str, user: str = "alice", timeout_s: float = 120) -> list[Start]:
        """Start a container in two tasks on each of two nodes; gives what each task saw, by node."""
        argv = ["srun", "-N2", "--ntasks-per-node=2", *options, f"--container-image={image}"]
        done = self.cluster.exec("login", *argv, "sh", "-c", CHECK, user=user, timeout_s=timeout_s)
        assert done.returncode == 0, done.stderr
        starts = []
        for line in sorted(done.stdout.splitlines()):
            node, payload, mounted_by, *rest = line.split()
            starts.append(Start(node, payload, mounted_by, rest == ["shadow"]))
        return starts

    def expected(self, mounted_by: str, *, shadow: bool = False) -> list[Start]:
        """What the tasks see when all is well."""
        nodes = sorted(self.cluster.nodes * 2)
        return [Start(node, self.payload, mounted_by, shadow) for node in nodes]

    def left_over(self, node: str) -> str:
        """What an ended job of alice's has left on a node: processes, mounts, loop devices, files."""
        script = (
            f"ps -o pid=,args= -U {ALICE}; grep -E ' - (squashfs|fuse.squashfuse) ' /proc/self/mountinfo; "
            "losetup -n -l -O NAME,BACK-FILE | grep /run/bootseer; "
            f"find /run/pyxis/{ALICE} /run/enroot -mindepth 1 -type f ! -path '*/cache-*'"
        )
        return self.cluster.exec(node, "sh", "-c", script).stdout


def pack(rootfs: Path, file: Path) -> None:
    """A squashfs of a folder, all files root's, as enroot makes them."""
    argv = ["mksquashfs", str(rootfs), str(file), "-all-root", "-noappend", "-quiet", "-no-progress"]
    subprocess.run([*argv, "-comp", "zstd", "-Xcompression-level", "1"], check=True, capture_output=True)


def host_address(cluster: Cluster) -> str:
    """The address at which the nodes reach this host."""
    hosts = cluster.exec("n1", "getent", "hosts", "host").stdout.split()
    return hosts[0]
