"""Where HDFS keeps a file's blocks, asked of the NameNode's WebHDFS: hdfs-native does not show it.

Owns the address and the question. Nothing depends on the answer but where objects are placed, so a NameNode
that gives none (WebHDFS closed off, Kerberos, TLS only) is not asked again for ten minutes. Thread-safe.
"""

from __future__ import annotations

import functools
import getpass
import http.client
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode
from xml.etree import ElementTree

_PORT = 9870  # of Hadoop 3, where hdfs-site.xml names none
_TIMEOUT_S = 2.0
_SILENT_S = 600.0
_LIMIT_BYTES = 2**24
_log = logging.getLogger(__name__)


class WebHdfs:
    """The WebHDFS of one file system."""

    def __init__(self, authority: str) -> None:
        """authority: <host>:<port> of a NameNode, or a nameservice of HADOOP_CONF_DIR."""
        self._authority = authority
        self.addresses = _addresses(authority, _settings())  # host and port; that of the active one in front
        self._lock = threading.Lock()
        self._silent_until_s = 0.0

    def locations(self, path: str) -> dict[str, int] | None:
        """How many bytes of a file lie on which DataNode, all replicas together its size; None: not told.

        A block that is being written counts too; its bytes are then not known, and 0.
        """
        if time.monotonic() < self._silent_until_s:
            return None
        failure: Exception | None = None
        for address in list(self.addresses):
            try:
                found = _locations(_ask(address, path))
            except Exception as error:  # also an answer of another shape
                failure = error
            else:
                self._prefer(address)
                return found
        self._give_up(failure)
        return None

    def _prefer(self, address: tuple[str, int]) -> None:
        """The active NameNode is asked first from now on."""
        if self.addresses[0] != address:
            self.addresses = [address, *(each for each in self.addresses if each != address)]

    def _give_up(self, failure: Exception | None) -> None:
        with self._lock:
            if time.monotonic() < self._silent_until_s:
                return
            self._silent_until_s = time.monotonic() + _SILENT_S
        _log.info(
            "hdfs://%s: placement is not looked at, for WebHDFS gives none: %s", self._authority, failure
        )


@functools.cache
def of_authority(authority: str) -> WebHdfs:
    """The one of this process, so that it is known once whether it answers."""
    return WebHdfs(authority)


def _ask(address: tuple[str, int], path: str) -> Any:
    """The located blocks of a file, as the NameNode has them; raises whatever goes wrong."""
    user = os.environ.get("HADOOP_USER_NAME") or getpass.getuser()
    query = urlencode({"op": "GET_BLOCK_LOCATIONS", "user.name": user})
    connection = http.client.HTTPConnection(*address, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", f"/webhdfs/v1{quote(path)}?{query}")
        reply = connection.getresponse()
        if reply.status != http.client.OK:
            raise OSError(f"{address[0]}:{address[1]}: {reply.status} {reply.reason}")
        return json.loads(reply.read(_LIMIT_BYTES))["LocatedBlocks"]
    finally:
        connection.close()


def _locations(answer: Any) -> dict[str, int]:
    blocks = {each["block"]["blockId"]: each for each in answer["locatedBlocks"]}
    if last := answer.get("lastLocatedBlock"):  # an open one is not always among the others
        blocks[last["block"]["blockId"]] = last
    found: Counter[str] = Counter()
    for each in blocks.values():
        replicas = each["locations"]
        share_bytes = each["block"]["numBytes"] // max(1, len(replicas))
        for replica in replicas:
            found[f"{replica['hostName']}:{replica['xferPort']}"] += share_bytes
    return dict(found)


def _addresses(authority: str, settings: Mapping[str, str]) -> list[tuple[str, int]]:
    """Of each NameNode's web server."""
    names = settings.get(f"dfs.ha.namenodes.{authority}", "").replace(",", " ").split()
    pairs = [
        (settings.get(f"dfs.namenode.rpc-address.{authority}.{name}", ""),
         settings.get(f"dfs.namenode.http-address.{authority}.{name}", ""))
        for name in names
    ] or [(authority, settings.get("dfs.namenode.http-address", ""))]  # fmt: skip
    found = []
    for rpc, web in pairs:
        host, _, port = web.rpartition(":")
        # A NameNode's own configuration may have 0.0.0.0 there.
        if not names or host in ("", "0.0.0.0"):
            host = rpc.rpartition(":")[0] or rpc
        found.append((host, int(port) if port.isdecimal() else _PORT))
    return found


def _settings() -> dict[str, str]:
    """The properties in hdfs-site.xml, found as hdfs-native finds it; none where it is not there."""
    folder = os.environ.get("HADOOP_CONF_DIR")
    if folder is None and "HADOOP_HOME" in os.environ:
        folder = f"{os.environ['HADOOP_HOME']}/etc/hadoop"
    if not folder:
        return {}
    try:
        root = ElementTree.parse(Path(folder) / "hdfs-site.xml").getroot()
    except (OSError, ElementTree.ParseError):  # hdfs-native says what is wrong with it
        return {}
    return {
        each.findtext("name", "").strip(): each.findtext("value", "").strip()
        for each in root.iter("property")
    }
