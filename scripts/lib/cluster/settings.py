"""Writes the cluster's settings, below etc/ in the state folder: Slurm, munge, users, bootseer.

The project's own pieces are taken from where they are shipped: conf/slurm.conf.d/bootseer.conf is included in
slurm.conf, prolog.d/50-bootseer is installed as prolog and epilog, and the plugin is used where `make` in
spank/ puts it. Inside the machines etc/slurm is /etc/slurm, so nothing there needs SLURM_CONF; the host does.
"""

from __future__ import annotations

import grp
import os
import pwd
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

from .layout import CONTROLLER, REPO, STORE, ClusterError, Layout

USERS = {"alice": 20001, "bob": 20002}
GROUP, GROUP_ID = "research", 20000
HOOK = REPO / "prolog.d" / "50-bootseer"
PLUGIN = REPO / "spank" / "spank_bootseer.so"
COMMAND = REPO / ".venv" / "bin" / "bootseer"
IMPORTER = COMMAND.with_name("bootseer-importer")
# Where pyxis is looked for below /usr: where its own `make install` puts it, and where a Debian package does.
PYXIS = ("local/lib/slurm/spank_pyxis.so", "lib/*/slurm*/spank_pyxis.so")

SLURM_CONF = """\
ClusterName=bootseer
SlurmctldHost={ctl}({ctl_address})
SlurmUser=slurm
AuthType=auth/munge
AuthInfo=socket={munge_socket}
StateSaveLocation={dir}/ctl/spool
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
PlugStackConfig={etc}/slurm/plugstack.conf
Include {etc}/slurm/slurm.conf.d/bootseer.conf

# Nodes are namespaces of one machine: they share its cgroups and may claim more cores than there are.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
PropagateResourceLimits=NONE

SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=500
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
ReturnToService=2
SlurmdTimeout=30
KillWait=5
MinJobAge=300

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={ctl_address}
AccountingStoragePass={munge_socket}
AccountingStoreFlags=job_comment
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none

{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={munge_socket}
DbdHost={ctl}
DbdAddr={ctl_address}
SlurmUser=slurm
PidFile=/run/slurm/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StorageLoc=slurm_acct
"""

BOOTSEER_TOML = """\
[store]
uri = "file:///shared/bootseer"

[cache]
min_free = "64MiB"

[shadow]
roots = ["/shared"]
"""


def write(layout: Layout, nodes: list[str], cpus: int, *, private_tmp: bool = False) -> None:
    """Write everything below etc/ for a cluster of these nodes, each of which claims so many cores.

    private_tmp: each job has its own /tmp.
    """
    _check_users()
    words = {
        "ctl": CONTROLLER,
        "ctl_address": layout.address(CONTROLLER),
        "dir": layout.dir,
        "etc": layout.etc,
        "munge_socket": layout.munge_socket,
        "nodes": "\n".join(
            f"NodeName={node} NodeAddr={layout.address(node)} CPUs={cpus} RealMemory=4000 State=UNKNOWN"
            for node in nodes
        ),
    }
    slurm = layout.etc / "slurm"
    _put(layout.slurm_conf, SLURM_CONF.format(**words))
    _put(slurm / "cgroup.conf", "CgroupAutomount=no\n")
    _put(slurm / "slurmdbd.conf", SLURMDBD_CONF.format(**words), owner="slurm", mode=0o600)
    shipped = (REPO / "conf/slurm.conf.d/bootseer.conf").read_text()
    if private_tmp:
        # The plugin makes a job's namespace in its extern step, which there is only with this flag.
        shipped = shipped.replace("PrologFlags=Alloc", "PrologFlags=Alloc,Contain")
        shipped += "\nJobContainerType=job_container/tmpfs\n"
        _put(slurm / "job_container.conf", "AutoBasePath=true\nBasePath=/var/spool/job_container\n")
    _put(slurm / "slurm.conf.d" / "bootseer.conf", shipped)
    _write_plugstack(slurm)
    _install_hook(slurm)
    _put(layout.bootseer_toml, BOOTSEER_TOML)
    _write_accounts(layout, nodes)
    _write_munge_key(layout)


def _check_users() -> None:
    """The users exist in the cluster only; a machine that has such numbers already cannot hold one."""
    for user, number in USERS.items():
        known = [entry.pw_name for entry in pwd.getpwall() if entry.pw_name == user or entry.pw_uid == number]
        if known:
            raise ClusterError(
                f"this machine has a user {known[0]}: the cluster needs {user} (uid {number}) for itself"
            )


def _write_plugstack(slurm: Path) -> None:
    """plugstack.conf includes plugstack.conf.d: our plugin, and pyxis when it is installed."""
    if (PLUGIN.parent / "Makefile").exists():
        done = subprocess.run(
            ["make", "-C", str(PLUGIN.parent)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            print(f"warning: make -C spank failed:\n{done.stdout[-1000:]}", file=sys.stderr)
    include = slurm / "plugstack.conf.d"
    include.mkdir(parents=True)
    _put(slurm / "plugstack.conf", f"include {include}/*.conf\n")
    if PLUGIN.exists():
        shipped = (REPO / "conf/plugstack.conf.d/bootseer.conf").read_text()
        arguments = f"bootseer={COMMAND} libexec={REPO / 'libexec'}"
        _put(include / "bootseer.conf", shipped.replace(PLUGIN.name, f"{PLUGIN} {arguments}"))
    if pyxis := pyxis_library():
        # Read after bootseer.conf: pyxis shall find what our plugin mounts. Required: with "optional", a task
        # whose container does not start is run on the node itself.
        importer = f" importer={IMPORTER}" if IMPORTER.exists() else ""
        _put(include / "pyxis.conf", f"required {pyxis} use_squashfuse=1{importer}\n")


def pyxis_library() -> Path | None:
    """Pyxis's plugin, where it is installed."""
    return next((path for pattern in PYXIS for path in Path("/usr").glob(pattern)), None)


def _install_hook(slurm: Path) -> None:
    """The hook as prolog and epilog. An empty prolog.d is a failed prolog: something is always there."""
    for name in ("prolog.d", "epilog.d"):
        (slurm / name).mkdir(parents=True)
        if HOOK.exists():
            shutil.copy(HOOK, slurm / name / HOOK.name)
            (slurm / name / HOOK.name).chmod(0o755)
        else:
            _put(slurm / name / "50-nothing", "#!/bin/sh\nexit 0\n", mode=0o755)


def _write_accounts(layout: Layout, nodes: list[str]) -> None:
    """passwd, group, shadow and hosts: the machine's, and the cluster's users."""
    passwd, group, shadow = (Path("/etc", name).read_text() for name in ("passwd", "group", "shadow"))
    group += f"{GROUP}:x:{GROUP_ID}:{','.join(USERS)}\n"
    for user, number in USERS.items():
        passwd += f"{user}:x:{number}:{number}:{user}:/shared/home/{user}:/bin/bash\n"
        group += f"{user}:x:{number}:\n"
        shadow += f"{user}:*:19000:0:99999:7:::\n"
    hosts = [
        "127.0.0.1 localhost",
        f"{layout.address(CONTROLLER)} {CONTROLLER} login",
        f"{layout.host_address} host",
    ]
    hosts += [f"{layout.address(node)} {node}" for node in [STORE, *nodes]]
    _put(layout.etc / "passwd", passwd)
    _put(layout.etc / "group", group)
    _put(layout.etc / "shadow", shadow, mode=0o600)
    _put(layout.etc / "hosts", "\n".join(hosts) + "\n")


def _write_munge_key(layout: Layout) -> None:
    """The munge key."""
    munge_key = layout.etc / "munge.key"
    munge_key.touch(mode=0o400)
    munge_key.write_bytes(secrets.token_bytes(1024))


def _put(path: Path, text: str, *, owner: str | None = None, mode: int = 0o644) -> None:
    """Write a file with exactly this mode, and its folder when it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(text)
    path.chmod(mode)
    if owner:
        os.chown(path, pwd.getpwnam(owner).pw_uid, grp.getgrnam(owner).gr_gid)
