"""The sockets of the agent: connections are taken, requests checked (SO_PEERCRED), replies sent.

Three sockets: root's, which the hook and the plugin use, and two for everybody. A thread for each takes
connections and never waits for anything else. Root's requests are read and answered by a few threads; a
step's, which has to wait, is parked without one (parking.py). A user's connection has a thread, and beyond
their limits (limits.py) connections are closed at once. A client has 2 s in all to send its request. So no
user can keep the hook, the plugin or another user from being answered.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from bootseer_slurm.agentapi import protocol
from bootseer_slurm.agentapi.operations import OPERATIONS, Asker, Operation
from bootseer_slurm.agentapi.protocol import Message, first
from bootseer_slurm.errors import BootseerError, InputError
from bootseer_slurm.service.sockets.limits import ConnectionLimits
from bootseer_slurm.service.sockets.parking import MOST_WAITING, Parked, Parking, Waiting

_log = logging.getLogger(__name__)

_REQUEST_TIMEOUT_S = 2.0
_ACCEPT_PAUSE_S = 0.2  # after an error, which is a lack of descriptors or memory
# After each connection of a user who makes too many: a tenth of a core is all that a flood of them takes.
# Others wait a quarter of a second, for what lies in the backlog before them.
_FLOOD_PAUSE_S = 0.001
_ROOT_THREADS = 16
# A descriptor each. Half of them is more than can be parked: steps that wait leave room for the hook.
_ROOT_CONNECTIONS = 2 * MOST_WAITING

# Gives the reply to a user's message, or what it waits for; descriptors of a reply are appended to the list.
Answer = Callable[[Message, int, list[int]], Message | Waiting]


@dataclass(frozen=True, slots=True)
class _Client:
    """A connection. door: the socket that it came by. release: is called when it is closed."""

    link: socket.socket
    door: str
    uid: int
    release: Callable[[], object]

    def reply(self, message: Message, fds: list[int]) -> None:
        """Send the reply. Raises OSError, ValueError."""
        content = protocol.encode(message)
        sent = socket.send_fds(self.link, [content], fds)
        self.link.sendall(content[sent:])

    @property
    def is_gone(self) -> bool:
        """Whether the other end is closed: nobody reads a reply."""
        poll = select.poll()
        poll.register(self.link, 0)
        return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))

    def close(self) -> None:
        self.link.close()
        self.release()


class Server:
    """Serves the agent's sockets."""

    def __init__(
        self, answers: Mapping[str, Answer], slow_s: Mapping[str, float], stop: threading.Event
    ) -> None:
        """answers: of each operation. slow_s: how long each slow one may take. stop: set at the end."""
        self._answers = answers
        self._slow_s = slow_s
        self._stop = stop
        self._limits = ConnectionLimits()
        self._root_slots = threading.Semaphore(_ROOT_CONNECTIONS)
        self._root_threads = ThreadPoolExecutor(_ROOT_THREADS, thread_name_prefix="root")
        self._parking = Parking()

    def start(self, listeners: Mapping[str, socket.socket]) -> None:
        """Take connections of these sockets: "root", "path", and "abstract", which may be another's."""
        for door, listener in listeners.items():
            threading.Thread(target=self._accept, args=(listener, door), daemon=True).start()

    def _accept(self, listener: socket.socket, door: str) -> None:
        while not self._stop.is_set():
            try:
                link, _ = listener.accept()
                _, uid, _ = protocol.peer(link)
                self._admit(link, door, uid)
                if door != "root" and self._limits.connects_too_often(uid):
                    self._stop.wait(_FLOOD_PAUSE_S)
            except (OSError, RuntimeError, MemoryError) as error:  # RuntimeError: no thread can be started
                if not self._stop.is_set():
                    _log.warning("connection not taken: %s", error)
                self._stop.wait(_ACCEPT_PAUSE_S)

    def _admit(self, link: socket.socket, door: str, uid: int) -> None:
        """Have a connection served, or close it where there are too many."""
        of_root = door == "root"
        if of_root:  # the socket's mode says already who may
            has_room = uid == 0 and self._root_slots.acquire(blocking=False)
        else:
            has_room = self._limits.take(uid)
        if not has_room:
            link.close()
            return
        release = self._root_slots.release if of_root else lambda: self._limits.give_back(uid)
        client = _Client(link, door, uid, release)
        if of_root:  # it is queued even where this says that no further thread can be started
            self._root_threads.submit(self._serve, client)
            return
        try:
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()
        except BaseException:
            client.close()
            raise

    def _serve(self, client: _Client) -> None:
        """Read a request; answer it, or park it."""
        fds: list[int] = []
        try:
            answer = _answered(lambda: self._ask(client, fds))
            if isinstance(answer, Waiting):
                waiting = answer
                parked = Parked(waiting, lambda: self._finish(client, waiting), client.close)
                if self._parking.add(parked):
                    return
                answer = _failed(InputError("too many steps wait on this node"))
        except BaseException:
            client.close()
            raise
        self._send(client, answer, fds)

    def _finish(self, client: _Client, waiting: Waiting) -> None:
        """Answer a request that was parked, unless its step has gone."""
        if client.is_gone:
            client.close()
            return
        fds: list[int] = []
        self._send(client, _answered(lambda: waiting.answer(fds)), fds)

    def _send(self, client: _Client, reply: Message | Waiting | None, fds: list[int]) -> None:
        """Send a reply, if there is one, and close the connection and the descriptors."""
        try:
            if isinstance(reply, list):
                client.reply(reply, fds)
        except (OSError, ValueError) as error:
            _log.debug("client went away: %s", error)
        finally:
            client.close()
            for fd in fds:
                os.close(fd)

    def _ask(self, client: _Client, fds: list[int]) -> Message | Waiting:
        message = protocol.receive_request(client.link, _REQUEST_TIMEOUT_S)
        client.link.settimeout(_REQUEST_TIMEOUT_S)  # for the reply
        op = first(message, "OP")
        operation = OPERATIONS.get(op)
        if not _may_ask(operation, client.door == "abstract", client.uid):
            raise InputError(f"{op[:40]!r} is for root on this node")
        if operation is None:
            raise InputError(f"unknown request {op[:40]!r}")
        # So that its client can tell this from an agent that hangs. It fails where the client went.
        if operation.slow:
            client.link.sendall(protocol.encode([("WAIT", str(int(self._slow_s[op] * 1000)))]))
        return self._answers[op](message, client.uid, fds)


def _answered(answer: Callable[[], Message | Waiting]) -> Message | Waiting | None:
    """An answer, or the reply that says why there is none; None where the client went away."""
    try:
        reply = answer()
        return reply if isinstance(reply, Waiting) else [("STATUS", "ok"), *reply]
    except (BootseerError, ValueError) as error:
        return _failed(error)
    except OSError as error:
        _log.debug("client went away: %s", error)
        return None
    except Exception:
        _log.exception("request failed")
        return [("STATUS", "error"), ("MESSAGE", "the agent failed; its log says where")]


def _failed(error: Exception) -> Message:
    return [("STATUS", "error"), ("MESSAGE", str(error).replace("\0", " ")[:500])]


def _may_ask(operation: Operation | None, public: bool, uid: int) -> bool:
    """Whether a user may ask this by one of the sockets; root may ask what is not known, to be told so."""
    if operation is not None and operation.asker is Asker.ANYONE:
        return True
    if public:  # the abstract name may be another process's
        return False
    return uid == 0 or (operation is not None and operation.asker is Asker.USER)
