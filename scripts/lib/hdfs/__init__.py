"""An HDFS on one machine: the parts of `scripts/hdfs`. Needs root and the standard library only."""
