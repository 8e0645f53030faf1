"""Reading the user's texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fisherfn as ff
from fisherfn.app.data import read_texts


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one two\nthree\n", ["one two", "three"]),
        ("a.txt", "no end", ["no end"]),
        ("a.TXT", "upper\n", ["upper"]),
        ("a", "no suffix\n", ["no suffix"]),
        ("a.txt", "\n  \none\n\t\n\ntwo\n\n", ["one", "two"]),
        ("a.txt", "    indented:\n", ["    indented:"]),
        ("a.txt", "windows\r\nends\r\n", ["windows", "ends"]),
        ("a.txt", "one \u2028line\x0c of text\n", ["one \u2028line\x0c of text"]),
        ("a.txt", b"\xef\xbb\xbfmark\nof utf-8\n", ["mark", "of utf-8"]),
        ("a.txt", "größe 日本\n".encode("utf-16"), ["größe 日本"]),
        ("a.txt", "größe 日本\n".encode("utf-32"), ["größe 日本"]),
        ("a.json", '["x", " ", "y\\n  z"]', ["x", "y\n  z"]),
        ("a.json", b'\xef\xbb\xbf["x"]', ["x"]),
        ("a.json", '[{"text": "x", "id": 1}, "y"]', ["x", "y"]),
        ("a.json", '{"text": ["x", "y"]}', ["x", "y"]),
        ("a.json", '{"text": "x"}', ["x"]),
        ("a.jsonl", '{"text": "x"}\n\n"y"\n', ["x", "y"]),
        ("a.ndjson", '{"text": "x\\ny"}', ["x\ny"]),
        ("a.txt", "", []),
        ("a.json", "", []),
        ("a.jsonl", "\n\n", []),
    ],
)
def test_samples(tmp_path: Path, name: str, content: bytes | str, expected: list[str]) -> None:
    assert list(read_texts(write(tmp_path / name, content))) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x", r"expected \.txt .*, \.json or \.jsonl, got .*a\.csv"),
        (
            "a.txt",
            b"good\nna\xefve\n",
            r"line 2 of .*a\.txt is not UTF-8 \(byte 0xef at column 3\)",
        ),
        ("a.jsonl", b'"x"\n"\xff"\n', r"line 2 of .*a\.jsonl is not UTF-8"),
        ("a.txt", b"x\x00y\x00\n", r"line 1 of .* holds a NUL byte"),
        ("a.txt", b"\xff\xfe\x00\xd8x", r"is broken utf-16"),
        ("a.json", "{", r"a\.json is not JSON: "),
        ("a.json", '{"text": "x"}\n{"text": "y"}', r"With one object a line, name it \.jsonl"),
        ("a.json", '{"data": ["x"]}', r"got an object with keys \['data'\]"),
        ("a.json", "3", r"got a int"),
        ("a.json", '["x", 3]', r"'text' at item 1 of .*a\.json, got int"),
        ("a.json", '{"text": ["x", null]}', r"at item 1 of .*, got NoneType"),
        ("a.json", '[{"body": "x"}]', r"at item 0 of .*, got an object with keys \['body'\]"),
        ("a.json", '[{"text": 3}]', r"at item 0 of .*, got text of type int"),
        ("a.json", '["\\ud800"]', r"item 0 of .* holds half a surrogate pair at character 0"),
        ("a.jsonl", '"x"\nnot json\n', r"line 2 of .*a\.jsonl is not JSON"),
        ("a.jsonl", "[" * 100_000, r"line 1 of .* is not JSON"),
    ],
)
def test_refused(tmp_path: Path, name: str, content: bytes | str, message: str) -> None:
    with pytest.raises(ff.DataError, match=r"^--data: ") as caught:
        list(read_texts(write(tmp_path / name, content)))
    assert caught.match(message)


def test_no_such_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ff.DataError, match=r"no such file: .*nowhere\.txt"):
        list(read_texts(tmp_path / "nowhere.txt"))
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(ff.DataError, match=r"expected a file, got the directory"):
        list(read_texts(tmp_path / "d.txt"))


def test_lines_are_read_as_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps("first") + "\n" + "broken\n")
    assert next(iter(read_texts(path))) == "first"
