"""The node agent, and the client of it that jobs, hooks and people use."""
