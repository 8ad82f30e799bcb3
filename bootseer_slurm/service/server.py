"""The sockets of the agent: connections are taken, requests checked (SO_PEERCRED), replies sent.

One thread answers one connection. A client has 2 s in all to send its request. Connections beyond their
limits (limits.py) are closed at once: no user can keep the hook, the plugin or another user from being
answered.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping

from bootseer_slurm.agentapi import protocol
from bootseer_slurm.agentapi.operations import OPERATIONS, Asker, Operation
from bootseer_slurm.agentapi.protocol import Message, first
from bootseer_slurm.errors import BootseerError, InputError
from bootseer_slurm.service.limits import ConnectionLimits

_log = logging.getLogger(__name__)

_REQUEST_TIMEOUT_S = 2.0
_ACCEPT_PAUSE_S = 0.2  # after an error, which is a lack of descriptors or memory

# Gives the reply to a user's message; descriptors that go with it are appended to the list.
Answer = Callable[[Message, int, list[int]], Message]


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

    def start(self, listeners: Mapping[str, socket.socket]) -> None:
        """Take connections of these sockets, in a thread each: "path", and "abstract", which may be faked."""
        for name, listener in listeners.items():
            public = name == "abstract"
            threading.Thread(target=self._accept, args=(listener, public), daemon=True).start()

    def _accept(self, listener: socket.socket, public: bool) -> None:
        while not self._stop.is_set():
            try:
                link, _ = listener.accept()
                self._admit(link, public)
            except (OSError, RuntimeError, MemoryError) as error:  # RuntimeError: no thread can be started
                if not self._stop.is_set():
                    _log.warning("connection not taken: %s", error)
                self._stop.wait(_ACCEPT_PAUSE_S)

    def _admit(self, link: socket.socket, public: bool) -> None:
        """Have a connection served, or close it where its user has too many."""
        _, uid, _ = protocol.peer(link)
        if not self._limits.take(uid):
            link.close()
            return
        try:
            threading.Thread(target=self._serve, args=(link, public, uid), daemon=True).start()
        except BaseException:
            self._limits.give_back(uid)
            link.close()
            raise

    def _serve(self, link: socket.socket, public: bool, uid: int) -> None:
        fds: list[int] = []
        try:
            with link:
                reply = self._reply(link, public, uid, fds)
                content = protocol.encode(reply)
                sent = socket.send_fds(link, [content], fds)
                link.sendall(content[sent:])
        except (OSError, ValueError) as error:
            _log.debug("client went away: %s", error)
        finally:
            for fd in fds:
                os.close(fd)
            self._limits.give_back(uid)

    def _reply(self, link: socket.socket, public: bool, uid: int, fds: list[int]) -> Message:
        try:
            message = protocol.receive_request(link, _REQUEST_TIMEOUT_S)
            link.settimeout(_REQUEST_TIMEOUT_S)  # for the reply
            op = first(message, "OP")
            operation = OPERATIONS.get(op)
            if not _may_ask(operation, public, uid):
                raise InputError(f"{op[:40]!r} is for root on this node")
            if operation is None:
                raise InputError(f"unknown request {op[:40]!r}")
            if operation.slow:  # so that its client can tell this from an agent that hangs
                link.sendall(protocol.encode([("WAIT", str(int(self._slow_s[op] * 1000)))]))
            return [("STATUS", "ok"), *self._answers[op](message, uid, fds)]
        except (BootseerError, ValueError) as error:
            return [("STATUS", "error"), ("MESSAGE", _line(error))]
        except OSError:
            raise
        except Exception:
            _log.exception("request failed")
            return [("STATUS", "error"), ("MESSAGE", "the agent failed; its log says where")]


def _may_ask(operation: Operation | None, public: bool, uid: int) -> bool:
    """Whether a user may ask this by one of the sockets; root may ask what is not known, to be told so."""
    if operation is not None and operation.asker is Asker.ANYONE:
        return True
    if public:  # the abstract name may be another process's
        return False
    return uid == 0 or (operation is not None and operation.asker is Asker.USER)


def _line(error: Exception) -> str:
    return str(error).replace("\0", " ")[:500]
