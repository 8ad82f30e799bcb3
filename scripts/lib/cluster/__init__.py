"""A Slurm cluster in the namespaces of one machine: the parts of `scripts/cluster`.

Needs root and the standard library only, because it runs before anything is installed.
What each part owns:

    command     what its command line and that of scripts/hdfs share
    client      a running cluster as an object, for tests, demo and benchmarks
    layout      paths of the state folder, addresses, the record of what was started, the lock
    packages    apt packages, installed without starting their services
    namespaces  a node's namespaces and its root file system; starting and entering processes there
    network     the bridge, the links, their rates
    settings    the files below etc/: Slurm, slurmdbd, munge key, users, bootseer
    storage     /shared: sftp.py on the controller, sshfs on the nodes; dropping caches
    ending      taking all of it down
    keeper      a service manager for an agent: starts it again, with its descriptors
    daemons     munged, MariaDB, slurmdbd, slurmctld, slurmd, the node agent: start and readiness

Everything that is started lives in the PID namespace of the controller or of a node, and every mount, bridge
and address (but one veth end on the host) in its other namespaces. So killing the namespaces' first processes
takes all of it away, and nothing of the machine (/etc, /run, /var/lib) is written to.
"""
