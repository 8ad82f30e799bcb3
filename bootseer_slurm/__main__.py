"""The command `bootseer`."""

from __future__ import annotations

import sys

from bootseer_slurm.errors import BootseerError
from bootseer_slurm.text import escaped


def main() -> None:
    """Run the command line; a BootseerError becomes one clear line and an exit status."""
    from bootseer_slurm.cli import app

    try:
        app()
    except BootseerError as error:
        print(f"bootseer: {escaped(error.message)}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {escaped(error.hint)}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
