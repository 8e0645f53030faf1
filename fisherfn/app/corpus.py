"""The default texts: passages of the Python standard library's own source.

They are on every machine, need no network, and are real multi-line code. The choice is fixed: the
passages of well-known modules first, then those of every other single-file module by name, the
first passage of each, then the second of each, and so on. It changes with the Python version only
as far as the sources do.
"""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path

from fisherfn.core.errors import DataError

FIRST = (
    "textwrap heapq bisect json/decoder statistics argparse csv collections/__init__ fractions "
    "random shutil tempfile difflib contextlib functools calendar configparser inspect "
    "urllib/parse email/message logging/__init__ dataclasses ast string"
).split()
MIN_LINES, MAX_LINES = 25, 60
# A statement that opens a passage: it begins in the first column.
OPENING = re.compile(r"def |class |async def |@")


def standard_library_texts() -> Iterator[str]:
    """Yield passages of `MIN_LINES` to `MAX_LINES` lines, in an order that never changes.

    Raises:
        DataError: This Python has no source files of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    others = sorted(sys.stdlib_module_names - {name.split("/")[0] for name in FIRST})
    files = [root / f"{name}.py" for name in chain(FIRST, others)]
    passages = [list(split(path.read_text("utf-8"))) for path in files if path.is_file()]
    passages = [of_file for of_file in passages if of_file]
    if not passages:
        raise DataError(
            f"--data: the default text is the source of Python's library, and there is none in "
            f"{root}. Give a file of your own."
        )
    for nth in zip_longest(*passages):
        yield from (text for text in nth if text is not None)


def split(source: str) -> Iterator[str]:
    """Cut a module into passages that begin at a top-level definition."""
    lines = source.splitlines()
    start = None
    for number, line in enumerate([*lines, "@end"]):
        if not OPENING.match(line):
            continue
        if start is None:
            start = number
        elif number - start >= MIN_LINES:
            yield "\n".join(lines[start : min(number, start + MAX_LINES)]).rstrip() + "\n"
            start = number
