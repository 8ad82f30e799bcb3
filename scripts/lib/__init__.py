"""The parts of the commands in scripts/. They are not installed: they run from a clone's root.

Each part owns:

    cluster   a Slurm cluster in namespaces (scripts/cluster), and how tests and benchmarks use one (client)
    hdfs      an HDFS in namespaces (scripts/hdfs)
    host      commands on this host
    node      an agent without Slurm, for tests and benchmarks of one node
    demo      the main job (scripts/demo)
    sizes     the check that classes, functions and modules stay small (scripts/check)
    bench     the benchmarks (scripts/bench), which may use the others

Some modules are programs for another Python: a job's, or that of a cluster's machine. They are run by their
path and import nothing of this package.
"""
