"""``python -m vramkit``, and what the command ``vramkit`` runs."""

from __future__ import annotations

import sys

from vramkit.errors import ConfigError
from vramkit.extras import extra

__all__ = ["main"]


def main() -> int:
    """Run the command line and return its exit status."""
    try:
        with extra("cli", needed_for="the command line"):
            from vramkit import cli  # noqa: PLC0415
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
