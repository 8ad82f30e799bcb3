"""What the start of a job cost: events joined with accounting, analysed, shown."""
