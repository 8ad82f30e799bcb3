"""The agent's end of a job's peers: the process, and the source of blocks that it is to a blob's reader."""
