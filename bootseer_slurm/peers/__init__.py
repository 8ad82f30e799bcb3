"""Peers: the nodes of one job read about one copy from the store, and give it to one another."""
