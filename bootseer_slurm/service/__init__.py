"""The node agent as a service: its supervisor, its sockets, its sessions, its figures."""
