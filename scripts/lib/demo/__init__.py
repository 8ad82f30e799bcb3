"""The main job, as it is today and with --bootseer: the parts of `scripts/demo` (docs/demo.md)."""
