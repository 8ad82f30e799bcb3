"""The repository's commands. Their library is `scripts.lib`."""
