"""Environments: Python environments, saved once as a squashfs and shown where they were saved."""
