"""The parts of `scripts/bench peers-engines` that need no network namespace: its store, its torrent, its rows."""

from __future__ import annotations

import hashlib
import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.lib.bench import engines, engines_store
from scripts.lib.bench.engines_arms import ARMS, Result
from scripts.lib.bench.engines_engine import get_range
from scripts.lib.bench.engines_torrent import PIECE_BYTES, bencode, info_hash, information, metainfo
from scripts.lib.bench.rows import Row


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store that serves tmp_path."""
    monkeypatch.setattr(engines_store, "folder", tmp_path)
    monkeypatch.setattr(engines_store, "swarm", set())
    server = engines_store.Server(("127.0.0.1", 0), engines_store.Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def get(address: str, path: str, **headers: str) -> tuple[int, bytes]:
    link = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    link.request("GET", path, headers=headers)
    with link.getresponse() as reply:
        return reply.status, reply.read()


def test_bencode_writes_keys_in_order() -> None:
    assert bencode({"b": [1, b"x"], "a": "é"}) == "d1:a2:é1:bli1e1:xee".encode()
    with pytest.raises(TypeError):
        bencode(1.5)


def test_a_torrent_has_a_digest_of_each_piece(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * PIECE_BYTES + b"b")
    info = information(path)
    assert info["pieces"] == hashlib.sha1(b"a" * PIECE_BYTES).digest() + hashlib.sha1(b"b").digest()
    assert info_hash(info) == hashlib.sha1(bencode(info)).hexdigest()
    assert metainfo(info, "http://t").startswith(b"d8:announce8:http://t4:infod")
    assert b"8:url-list3:u/f" in metainfo(info, "http://t", "u/f")


def test_the_store_serves_ranges(tmp_path: Path, address: str) -> None:
    content = bytes(range(256)) * 40
    (tmp_path / "file").write_bytes(content)
    assert get_range(f"{address}/file", 300, 1000) == content[300:1300]
    assert get(address, "/file") == (200, content)
    assert get(address, "/file", Range="bytes=10200-") == (206, content[10200:])
    assert get(address, "/file", Range="bytes=99999-")[0] == 416
    assert get(address, "/../etc/passwd")[0] == 404


def test_the_tracker_tells_of_the_others(address: str) -> None:
    assert b"5:peers0:" in get(address, "/announce?port=6881&event=started")[1]
    body = get(address, "/announce?port=6882")[1]
    assert body.endswith(b"5:peers6:" + bytes([127, 0, 0, 1]) + (6881).to_bytes(2, "big") + b"e")
    get(address, "/announce?port=6881&event=stopped")
    assert b"5:peers0:" in get(address, "/announce?port=6882")[1]


def test_rows_are_medians_and_have_the_targets() -> None:
    size = engines.SIZE_BYTES
    arms = [arm for arm in ARMS if arm.name in ("store alone", "libtorrent, seed")]
    alone = [Result(0.01, [0.1] * 4, 8.0, 8.5, 4 * size, 1.0, 0.5, None)] * 3
    shared = [
        Result(0.02, [0.2] * 4, 2.0, last_s, round(copies * size), 2.0, 0.9, True)
        for last_s, copies in ((3.0, 1.0), (4.0, 1.2), (9.0, 2.0))
    ]
    rows = by_metric(
        engines.rows_of("1gbit", arms, {arms[0].name: alone, arms[1].name: shared}, {"direct": ""})
    )
    row = rows["1gbit, libtorrent, seed: read from the store"]
    assert (row.value, row.target, row.met) == (pytest.approx(1.2), 1.05, False)
    row = rows["1gbit, libtorrent, seed: last node"]
    assert (row.value, row.limit, row.target) == (
        4.0,
        engines.floor_s("1gbit"),
        1.1 * engines.floor_s("1gbit") + 1,
    )
    assert rows["1gbit, libtorrent, seed: bytes given to another user who asks"].met is False
    assert rows["1gbit, store alone: last node"].target is None
    assert "1gbit, store alone: bytes given to another user who asks" not in rows


def by_metric(rows: list[Row]) -> dict[str, Row]:
    found = {row.metric: row for row in rows}
    assert len(found) == len(rows)
    return found
