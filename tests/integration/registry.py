"""A real registry (Debian's docker-registry) on loopback for a test, and small images in it."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import json
import shutil
import socket
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOOLS = ("docker-registry", "skopeo", "zstd", "umoci", "mksquashfs")
# Tests put other tools into their PATH.
_REGISTRY, _SKOPEO, _ZSTD = (shutil.which(tool) or tool for tool in TOOLS[:3])
_MEDIA_TYPES = {
    "oci": "application/vnd.oci.image.manifest.v1+json",
    "v2s2": "application/vnd.docker.distribution.manifest.v2+json",
}
_CONFIG = """
version: 0.1
log: {{level: warn, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}/data}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""
_CLOSED = "auth: {{htpasswd: {{realm: test, path: {folder}/users}}}}\n"
LOGIN = ("alice", "secret")
_USERS = "alice:$2b$04$aT02zES20Fk5iM9Nl8nlReLRZORV0nI6gXKKujavTxpBkmE.iwliq\n"


def lacking() -> list[str]:
    """Which of the tools are not installed."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


class Registry:
    """The registry. closed: only LOGIN may read it."""

    def __init__(self, folder: Path, *, closed: bool) -> None:
        self.closed = closed
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as link:
            self.port = link.getsockname()[1]
        self.host = f"127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        config = self.folder / "config.yml"
        content = _CONFIG + (_CLOSED if self.closed else "")
        config.write_text(content.format(folder=self.folder, port=self.port))
        (self.folder / "users").write_text(_USERS)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen([_REGISTRY, "serve", str(config)], stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                with urllib.request.urlopen(self._request("GET", ""), timeout=2):
                    return
            time.sleep(0.1)
        raise AssertionError(f"the registry does not answer: {(self.folder / 'log').read_text()}")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def push(
        self, name: str, files: dict[str, Any], config: dict[str, Any] | None = None, *, form: str = "v2s2"
    ) -> str:
        """Put an image of one layer into the registry; gives its digest. For `files` see `layer`.

        form: v2s2, oci, or zstd: oci with layers that are compressed so.
        This registry gives OCI manifests only to those who ask for them, as enroot does not.
        """
        layout = self.folder / "push"
        shutil.rmtree(layout, ignore_errors=True)
        write_layout(layout, files, config or {}, zstd=form == "zstd")
        form = "oci" if form == "zstd" else form
        target = f"docker://{self.host}/{name}"
        command = [
            _SKOPEO,
            "--insecure-policy",
            "copy",
            "--quiet",
            "--dest-tls-verify=false",
            f"--format={form}",
        ]
        login = [f"--dest-creds={':'.join(LOGIN)}"] if self.closed else []
        subprocess.run([*command, *login, f"oci:{layout}", target], check=True, capture_output=True)
        repository, _, tag = name.partition(":")
        request = self._request("HEAD", f"{repository}/manifests/{tag}")
        request.add_header("Accept", f"{_MEDIA_TYPES['oci']}, {_MEDIA_TYPES['v2s2']}")
        with urllib.request.urlopen(request, timeout=5) as reply:
            assert reply.headers["Content-Type"] == _MEDIA_TYPES[form]
            return str(reply.headers["Docker-Content-Digest"])

    def _request(self, method: str, path: str) -> urllib.request.Request:
        request = urllib.request.Request(f"http://{self.host}/v2/{path}", method=method)
        if self.closed:
            request.add_header(
                "Authorization", f"Basic {base64.b64encode(':'.join(LOGIN).encode()).decode()}"
            )
        return request

    def put_manifest(self, repository: str, tag: str, manifest: dict[str, Any], media_type: str) -> None:
        """Put a manifest into the registry as it is."""
        request = self._request("PUT", f"{repository}/manifests/{tag}")
        request.add_header("Content-Type", media_type)
        request.data = json.dumps(manifest).encode()
        with urllib.request.urlopen(request, timeout=5) as reply:
            assert reply.status == 201


@contextlib.contextmanager
def running_registry(folder: Path, *, closed: bool = False) -> Iterator[Registry]:
    """A registry for the time of a block."""
    folder.mkdir(parents=True, exist_ok=True)
    registry = Registry(folder, closed=closed)
    registry.start()
    try:
        yield registry
    finally:
        registry.stop()


def layer(files: dict[str, Any]) -> bytes:
    """A layer as tar: bytes are a file, (bytes, mode) one with that mode, text a symbolic link, None a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, what in files.items():
            info = tarfile.TarInfo(name)
            content, info.mode = (what, 0o644) if isinstance(what, bytes) else (b"", 0o755)
            if isinstance(what, tuple):
                content, info.mode = what
            if what is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(what, str):
                info.type, info.linkname = tarfile.SYMTYPE, what
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_layout(folder: Path, files: dict[str, Any], config: dict[str, Any], *, zstd: bool = False) -> None:
    """Write an OCI image layout with one image of one layer."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(content: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    tar = layer(files)
    body = {
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(tar).hexdigest()}"]},
        "history": [{"created": "2024-01-01T00:00:00Z", "created_by": "test"}],
    }
    layer_type = "application/vnd.oci.image.layer.v1.tar+gzip"
    packed = gzip.compress(tar, mtime=0)
    if zstd:
        layer_type = layer_type.replace("gzip", "zstd")
        packed = subprocess.run([_ZSTD, "-q", "-c"], input=tar, capture_output=True, check=True).stdout
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(json.dumps(body).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": [blob(packed, layer_type)],
    }
    entry = blob(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    index = {"schemaVersion": 2, "manifests": [entry]}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
