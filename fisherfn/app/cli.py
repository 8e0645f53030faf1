"""The entry point of `fisherfn`: exit codes, and one line for each error.

0: done. 2: a `FisherError` or a wrong option. 130, 143: stopped by Ctrl-C, by SIGTERM.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from fisherfn.app.signals import Stopped
from fisherfn.core.errors import FisherError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name; default `sys.argv[1:]`.

    Returns:
        The exit code, for `sys.exit`.

    Raises:
        ModuleNotFoundError: Of a module that no extra would bring.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from fisherfn.app.commands import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        return fail(
            f"the command line needs {error.name}, which is not installed. "
            "Install it with: pip install 'fisherfn[app,lm]'"
        )
    try:
        return run(arguments)
    except FisherError as error:
        if "--verbose" in arguments:
            traceback.print_exc()
        return fail(str(error))
    except Stopped as stop:
        return fail("stopped; nothing was written.", stop.code)


def fail(message: str, code: int = 2) -> int:
    """Print one line on standard error and return the exit code."""
    print("fisherfn: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return code
