"""Who may read whose events: files read as their owner, and the service for operators."""
