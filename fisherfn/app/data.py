"""Read the user's texts: one sample a line, JSON, or JSON lines.

Files are read as UTF-8 (a byte order mark is understood, also that of UTF-16 and UTF-32). Anything
else is refused with the line it stands on, since a wrong guess would change the numbers in silence.
Blank samples are dropped; nothing else is altered, indentation least of all.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fisherfn.core.errors import DataError

TEXT_SUFFIXES = ("", ".txt", ".text")
LINES_SUFFIXES = (".jsonl", ".ndjson")
# UTF-32's little-endian mark begins with UTF-16's: longest first.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_texts(path: Path) -> Iterator[str]:
    """Read the samples of a file in order, blank ones dropped.

    Line formats are read lazily: a file of many gigabytes costs no more than the samples taken.

    Args:
        path: `.txt` (or no suffix): a sample a line. `.jsonl`, `.ndjson`: a string, or an object
            with `"text"`, a line. `.json`: a list of those, or one object whose `"text"` is a list.

    Yields:
        The samples.

    Raises:
        DataError: No such file, another suffix, bytes that are not UTF-8, or not the JSON expected.
    """
    suffix = path.suffix.lower()
    if suffix != ".json" and suffix not in TEXT_SUFFIXES + LINES_SUFFIXES:
        raise DataError(
            f"--data: expected .txt (one sample a line), .json or .jsonl, got {path}. "
            "If it is plain text, rename it to .txt."
        )
    if path.is_dir():
        raise DataError(f"--data: expected a file, got the directory {path}.")
    if not path.exists():
        raise DataError(f"--data: no such file: {path}.")
    reader = _json if suffix == ".json" else _json_lines if suffix in LINES_SUFFIXES else _plain
    try:
        for where, text in reader(path):
            if text.strip():
                yield _encodable(path, where, text)
    except OSError as error:
        raise DataError(f"--data: cannot read {path}: {error.strerror or error}.") from error


def _plain(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in _lines(path):
        if "\0" in line:
            raise DataError(
                f"--data: line {number} of {path} holds a NUL byte: this is not a text file, or it "
                "is UTF-16 without a byte order mark. Save it as UTF-8."
            )
        yield f"line {number}", line


def _json_lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"--data: {where} of {path} is not JSON: {error}.") from error
        yield where, _text(path, where, record)


def _json(path: Path) -> Iterator[tuple[str, str]]:
    content = "\n".join(line for _, line in _lines(path))
    if not content.strip():
        return
    try:
        records = json.loads(content)
    except (ValueError, RecursionError) as error:
        hint = " With one object a line, name it .jsonl." if "Extra data" in str(error) else ""
        raise DataError(f"--data: {path} is not JSON: {error}.{hint}") from error
    if isinstance(records, dict) and isinstance(records.get("text"), list):
        records = records["text"]
    elif isinstance(records, dict) and isinstance(records.get("text"), str):
        records = [records]
    if not isinstance(records, list):
        got = (
            f"an object with keys {sorted(records)[:5]}"
            if isinstance(records, dict)
            else f"a {type(records).__name__}"
        )
        raise DataError(
            f"--data: expected {path} to hold a list of strings, a list of objects with 'text', or "
            f"an object whose 'text' is a list, got {got}."
        )
    for index, record in enumerate(records):
        where = f"item {index}"
        yield where, _text(path, where, record)


def _text(path: Path, where: str, record: Any) -> str:
    text = record.get("text") if isinstance(record, dict) else record
    if isinstance(text, str):
        return text
    if isinstance(record, dict) and "text" not in record:
        got = f"an object with keys {sorted(record)[:5]}"
    else:
        got = f"{'text of type ' if isinstance(record, dict) else ''}{type(text).__name__}"
    raise DataError(
        f"--data: expected a string or an object with 'text' at {where} of {path}, got {got}."
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end)."""
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(0)
        encoding = next((name for mark, name in MARKS if start.startswith(mark)), None)
        if encoding is not None:
            try:
                lines = file.read().decode(encoding).split("\n")
            except UnicodeDecodeError as error:
                raise DataError(f"--data: {path} is broken {encoding}: {error}.") from error
            for number, line in enumerate(lines, 1):
                yield number, line.removesuffix("\r")
            return
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = raw[error.start]
                raise DataError(
                    f"--data: line {number} of {path} is not UTF-8 (byte 0x{byte:02x} at column "
                    f"{error.start + 1}). Convert the file, say: iconv -f latin1 -t utf-8."
                ) from error
            yield number, line.removesuffix("\n").removesuffix("\r")


def _encodable(path: Path, where: str, text: str) -> str:
    """Refuse half a surrogate pair, which JSON can spell and no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"--data: {where} of {path} holds half a surrogate pair at character {error.start}, "
            "which is no text. Remove it."
        ) from error
    return text
