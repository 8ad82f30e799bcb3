"""The errors that a person sees.

Libraries raise these; only the command line turns them into a message and an exit status.
"""

from __future__ import annotations


class BootseerError(Exception):
    """Something failed that a person can act on.

    message: one line that says what failed, on which object, and why.
    hint: the next command or step, when there is one.
    """

    exit_status = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @staticmethod
    def of_class(name: str, message: str, *, hint: str | None = None) -> BootseerError:
        """The error of this class, as another process named it; a StoreError where there is no such class."""
        ours = (each for each in BootseerError.__subclasses__() if each.__module__ == __name__)
        classes = {each.__name__: each for each in ours}
        return classes.get(name, StoreError)(message, hint=hint)


class InputError(BootseerError):
    """A value that a person gave is not usable."""

    exit_status = 2


class ConfigError(BootseerError):
    """The configuration cannot be used."""

    exit_status = 3


class NotFound(BootseerError):
    """The named blob, job or file is not there."""

    exit_status = 4


class StoreError(BootseerError):
    """The shared store cannot be reached or written."""

    exit_status = 5


class IntegrityError(BootseerError):
    """Bytes are not the ones that a digest promises."""

    exit_status = 6


class AgentUnavailable(BootseerError):
    """No node agent answers on this node."""

    exit_status = 7
