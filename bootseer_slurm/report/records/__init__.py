"""The records of all starts: a row for each, on disk, and the note of those that were collected."""
