"""A job's certificates for libtorrent's SSL torrents, made with the program openssl.

Files in a folder: ca.pem and ca.key, the root that stands in the torrent; node.pem and node.key, which all
nodes of the job share; dh.pem, which libtorrent asks for.
"""

from __future__ import annotations

from pathlib import Path

from scripts.lib.host import run

_DAYS = "2"
_CURVE = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


def make(folder: Path) -> bytes:
    """Make the files in a folder; the root certificate. Raises ClusterError."""
    ca, ca_key = folder / "ca.pem", folder / "ca.key"
    _request("-x509", "-subj", "/CN=job", "-keyout", str(ca_key), "-out", str(ca))
    name = ["-subj", "/CN=*", "-addext", "subjectAltName=DNS:*"]  # of every torrent of this root
    signed = ["-x509", "-CA", str(ca), "-CAkey", str(ca_key)]
    _request(*signed, *name, "-keyout", str(folder / "node.key"), "-out", str(folder / "node.pem"))
    run("openssl", "dhparam", "-dsaparam", "-out", str(folder / "dh.pem"), "2048")
    return ca.read_bytes()


def _request(*arguments: str) -> None:
    run("openssl", "req", *_CURVE, "-days", _DAYS, *arguments)
