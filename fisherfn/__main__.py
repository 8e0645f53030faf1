"""`python -m fisherfn` is the command `fisherfn`."""

from __future__ import annotations

import sys

from fisherfn.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
