"""One job on this node, from its prolog to its epilog."""
