"""Reading with the rights of a job's user: the fetch process (child), and the agent's end of it (process)."""
