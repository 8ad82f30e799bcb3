"""All that a start leaves for the next one: traces, events, snapshots; much of it made in the background."""
