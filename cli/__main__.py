"""Where the program `qvl`, and `python -m qvl.cli`, begin.

Importing takes a tenth of a second, in which a Ctrl-C may come as at any other time.
"""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point of the `qvl` program."""
    try:
        from qvl.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
