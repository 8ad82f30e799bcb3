"""One run of a job: its nodes' events, joined with its accounting record."""
