"""The peer process of one job on one node: it gets chunks from other nodes, and gives them to others."""
