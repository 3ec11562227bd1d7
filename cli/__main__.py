"""Entry point of the program `qvl` and of `python -m qvl.cli`.

Importing takes a tenth of a second, in which a Ctrl-C may come as at any other time.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """The entry point of the `qvl` program."""
    # Products that numpy takes are between or beside ggml's, from whose threads those of OpenBLAS, which spin
    # for a while after each, would take the cores: calibrated conversion took half as long again.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from qvl.cli.main import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
