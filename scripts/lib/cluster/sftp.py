"""The server of the shared storage: one sftp-server for each connection, which sees /shared and nothing else.

    sftp.py ADDRESS PORT CLIENT...

Without ssh, so without its encryption: this is one machine, and its cores are for what is measured. As with
NFS, who may connect is known by address; the nodes' kernels check the users' rights.
"""

import signal
import socket
import subprocess
import sys

SERVER = ["/usr/lib/openssh/sftp-server", "-u", "0000"]  # the node's kernel has applied the user's umask
JAIL = "bwrap --die-with-parent --cap-add ALL --dev /dev --bind /shared /shared --ro-bind /usr /usr"
JAIL += " --symlink usr/lib /lib --symlink usr/lib64 /lib64"
JAIL += " --ro-bind /etc/passwd /etc/passwd --ro-bind /etc/group /etc/group"

signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the servers
address, port, *clients = sys.argv[1:]
with socket.create_server((address, int(port)), backlog=128) as listener:
    print("serving", flush=True)
    while True:
        link, (client, _) = listener.accept()
        with link:
            if client in clients:
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                subprocess.Popen([*JAIL.split(), *SERVER], stdin=link.fileno(), stdout=link.fileno())
            else:
                print(f"refused {client}", flush=True)
