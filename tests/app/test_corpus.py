"""The default texts."""

from __future__ import annotations

import sysconfig
from itertools import islice
from pathlib import Path

import pytest

import fisherfn as ff
from fisherfn.app import corpus


def test_passages_are_real_code_of_several_lines() -> None:
    texts = list(islice(corpus.standard_library_texts(), 40))
    assert len(set(texts)) == 40
    for text in texts:
        lines = text.splitlines()
        assert corpus.MIN_LINES // 2 < len(lines) <= corpus.MAX_LINES
        assert any(line.startswith("    ") for line in lines), "indentation is part of the text"
        assert corpus.OPENING.match(text)


def test_passages_come_from_different_modules_in_a_fixed_order() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    texts = list(islice(corpus.standard_library_texts(), 20))
    assert texts == list(islice(corpus.standard_library_texts(), 20))
    for name, text in zip(corpus.FIRST[:20], texts, strict=True):
        assert text.rstrip() in (root / f"{name}.py").read_text("utf-8")


def test_there_are_plenty() -> None:
    assert sum(1 for _ in corpus.standard_library_texts()) >= 500


def test_split_begins_at_definitions_and_loses_short_ends() -> None:
    body = "\n".join(f"    x = {i}" for i in range(30))
    source = (
        f"import os\n\n@cache\ndef f():\n{body}\n\nclass A:\n{body}\n\ndef short():\n    pass\n"
    )
    first, second = corpus.split(source)
    assert first.startswith("@cache\ndef f():")
    assert second.startswith("class A:")


def test_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ff.DataError, match=r"there is none in .*Give a file of your own"):
        next(corpus.standard_library_texts())
