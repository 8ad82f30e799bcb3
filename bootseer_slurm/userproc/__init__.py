"""The boundary between root and a user: the process with a job user's rights, and all that crosses to it."""
