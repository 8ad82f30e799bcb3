"""Runs a command as a user who sees an environment at its place, in a mount namespace of its own.

env_enter.py bind FOLDER TARGET UID COMMAND...     another folder at TARGET
env_enter.py agent JOB TARGET UID COMMAND...       what the agent shows of the job, as the plugin does it;
                                                   writes the time of its answer (ns since 1970) to STAMP
"""

import os
import socket
import sys
import time
from pathlib import Path

from bootseer_slurm import mounts
from bootseer_slurm.agentapi import protocol

STAMP = Path("/run/bench-attached")


def attached(job: str, target: str, uid: str) -> int:
    """The mount of `target` that the agent gives."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.connect(protocol.SOCKET)
        fields = [("OP", "attach"), ("JOB_ID", job), ("UID", uid), ("GID", uid), ("STEP_ID", "0")]
        link.sendall(protocol.encode(fields))
        link.shutdown(socket.SHUT_WR)
        reply, fds = protocol.receive(link)
    STAMP.write_text(str(time.time_ns()))
    for key, value in reply:
        if key == "BIND" and value.split(":", 3)[3] == target:
            return fds[int(value.split(":")[0])]
    sys.exit(f"the agent shows nothing at {target}: {reply}")


how, source, target, uid, *command = sys.argv[1:]
fd = attached(source, target, uid) if how == "agent" else mounts.open_tree_clone(source)
mounts.unshare_mount_namespace()
mounts.move_mount(fd, target)
os.close(fd)
os.setgroups([])
os.setgid(int(uid))
os.setuid(int(uid))
os.execvp(command[0], command)
