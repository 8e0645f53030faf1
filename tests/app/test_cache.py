"""A cached directory is sound or made anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fisherfn.app.cache import MANIFEST, Cache
from fisherfn.app.errors import OutputError


def fill(directory: Path) -> None:
    (directory / "a").write_text("content")
    (directory / "b").write_bytes(bytes(range(256)))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "root" / "model")


def test_built_once(cache: Cache) -> None:
    assert not cache.is_sound()
    cache.build(fill)
    assert cache.is_sound()
    assert sorted(path.name for path in cache.directory.iterdir()) == ["a", "b", MANIFEST]
    assert [path.name for path in cache.directory.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: (d / "a").unlink(),
        lambda d: (d / "b").write_bytes(bytes(256)),
        lambda d: (d / "b").write_bytes(b"short"),
        lambda d: (d / MANIFEST).unlink(),
        lambda d: (d / MANIFEST).write_text("{}"),
        lambda d: (d / MANIFEST).write_text("[1]"),
        lambda d: (d / MANIFEST).write_text("not json"),
    ],
    ids=["missing", "altered", "truncated", "no manifest", "empty", "list", "not json"],
)
def test_broken_is_rebuilt(cache: Cache, damage: object) -> None:
    cache.build(fill)
    assert callable(damage)
    damage(cache.directory)
    assert not cache.is_sound()
    cache.build(fill)
    assert cache.is_sound()
    assert [path.name for path in cache.directory.parent.iterdir()] == ["model"]


def test_failure_leaves_nothing(cache: Cache) -> None:
    def fail(directory: Path) -> None:
        fill(directory)
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        cache.build(fail)
    assert not any(cache.directory.parent.iterdir())


def test_another_process_may_be_faster(cache: Cache) -> None:
    def slow(directory: Path) -> None:
        fill(directory)
        cache.build(fill)
        (directory / "late").touch()

    cache.build(slow)
    assert cache.is_sound()
    assert not (cache.directory / "late").exists()


def test_what_killed_processes_left_is_removed(cache: Cache) -> None:
    old, new = (cache.directory.parent / f".model-{name}" for name in ("old", "new"))
    for path in (old, new):
        path.mkdir(parents=True)
    os.utime(old, (0, 0))
    cache.build(fill)
    assert (old.exists(), new.exists()) == (False, True)


def test_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write the model cache .*Set XDG_CACHE_HOME"):
        Cache(tmp_path / "file" / "model").build(fill)
