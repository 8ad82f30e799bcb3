"""libtorrent, by its Python binding, in a node's or the seed's own process.

The other nodes are named to it, since a job knows its nodes: no tracker, no DHT, no local discovery.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import libtorrent as lt

from scripts.lib.bench.engines_engine import FIRST_BYTES, PATIENCE_S, Engine, Task
from scripts.lib.bench.engines_torrent import PIECE_BYTES

PORT, TLS_PORT = 6881, 6882
_SETTINGS = {
    "enable_dht": False,
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    "enable_outgoing_utp": False,
    "enable_incoming_utp": False,
    "allow_multiple_connections_per_ip": True,
    "unchoke_slots_limit": 16,
    "connection_speed": 100,
    "send_buffer_watermark": 4 * 2**20,
    "max_out_request_queue": 1500,
    "urlseed_max_request_bytes": 4 * 2**20,
    "out_enc_policy": 2,  # disabled: obfuscation is no protection, and costs
    "in_enc_policy": 2,
}


class Libtorrent(Engine):
    """A session. mode "node" gets the file; "seed" and "super" serve what lies in the folder of the task."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        mask = lt.alert.category_t.status_notification | lt.alert.category_t.storage_notification
        mask |= lt.alert.category_t.error_notification
        listen = f"{task.address}:{PORT},{task.address}:{TLS_PORT}s"
        settings: Any = {**_SETTINGS, "listen_interfaces": listen, "alert_mask": int(mask)}
        self.session = lt.session(settings)
        self.handle: Any = None

    def start(self) -> None:
        if self.task.mode != "node":
            self.add()
            deadline = time.monotonic() + PATIENCE_S
            while not self.handle.status().is_seeding:
                if time.monotonic() > deadline:
                    raise OSError("the seed does not seed")
                time.sleep(0.05)

    def add(self) -> None:
        """Add the file to the session, and name the others to it."""
        params = lt.add_torrent_params()
        params.ti = lt.torrent_info(self.task.torrent)
        params.trackers = []
        params.save_path = self.task.folder
        params.flags &= ~(lt.torrent_flags.paused | lt.torrent_flags.auto_managed)
        if self.task.mode != "node":
            params.flags |= lt.torrent_flags.seed_mode
        if self.task.mode == "super":
            params.flags |= lt.torrent_flags.super_seeding
        if self.task.mode == "node":
            params.url_seeds = [each["url"] for each in params.ti.web_seeds()]
        self.handle = self.session.add_torrent(params)
        if self.task.certificates:
            place = Path(self.task.certificates)
            files = [str(place / name) for name in ("node.pem", "node.key", "dh.pem")]
            self.handle.set_ssl_certificate(*files)
        for peer in self.task.peers:
            self.handle.connect_peer((peer, TLS_PORT if self.task.certificates else PORT))

    def quiet(self, offset: int) -> float | None:
        start_s = time.monotonic()
        self.add()
        piece = offset // PIECE_BYTES
        wanted = [0] * (self.task.size_bytes // PIECE_BYTES)
        wanted[piece] = 7
        self.handle.prioritize_pieces(wanted)
        self.want(piece)
        while True:
            for alert in self.alerts(start_s):
                if isinstance(alert, lt.read_piece_alert) and alert.piece == piece:
                    assert len(alert.buffer) == FIRST_BYTES
                    return time.monotonic() - start_s

    def all(self, offset: int, wait_s: float) -> tuple[float, float | None]:
        start_s = time.monotonic()
        self.add()
        piece, asked_s, first_s, done_at = offset // PIECE_BYTES, 0.0, None, None
        while done_at is None or first_s is None:
            if not asked_s and time.monotonic() >= start_s + wait_s:
                asked_s = time.monotonic()
                self.want(piece)
            for alert in self.alerts(start_s):
                if isinstance(alert, lt.read_piece_alert) and alert.piece == piece:
                    first_s = time.monotonic() - asked_s
                elif isinstance(alert, lt.torrent_finished_alert):
                    done_at = time.monotonic()
        return done_at, first_s

    def want(self, piece: int) -> None:
        """Ask for a piece before all others; its bytes come as an alert."""
        self.handle.set_piece_deadline(piece, 0, lt.deadline_flags_t.alert_when_available)

    def alerts(self, start_s: float) -> list[Any]:
        """What has happened, within 20 ms. Raises OSError when it takes too long or no file can be made."""
        if time.monotonic() > start_s + PATIENCE_S:
            progress = self.handle.status().progress
            raise OSError(f"libtorrent did not get it within {PATIENCE_S:.0f} s, but {progress:.0%} of it")
        self.session.wait_for_alert(20)
        found: list[Any] = self.session.pop_alerts()
        for alert in found:
            if isinstance(alert, lt.file_error_alert):
                raise OSError(alert.message())
        return found
