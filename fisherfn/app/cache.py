"""A directory that is made once: complete or absent, and made anew when it turns out broken."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fisherfn.app.errors import OutputError

MANIFEST = "manifest.json"
LEFT_OVER = 3600.0  # seconds


@dataclass(frozen=True)
class Cache:
    """One cached directory; its manifest holds the digest of every file."""

    directory: Path

    def is_sound(self) -> bool:
        """Return True iff every file has the content it was made with."""
        try:
            manifest = json.loads((self.directory / MANIFEST).read_text("utf-8"))
            return bool(manifest) and all(
                digest(self.directory / name) == expected for name, expected in manifest.items()
            )
        except (OSError, ValueError, AttributeError):
            return False

    def build(self, fill: Callable[[Path], None]) -> None:
        """Fill a temporary directory beside the final one, then rename it: all or nothing.

        Args:
            fill: Called with an empty directory to write to.

        Raises:
            OutputError: The cache cannot be written.
        """
        root = self.directory.parent
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._sweep()
            temporary = Path(tempfile.mkdtemp(dir=root, prefix=f".{self.directory.name}-"))
        except OSError as error:
            _cannot_write(root, error)
        made = temporary / "made"
        try:
            made.mkdir()
            fill(made)
            manifest = {path.name: digest(path) for path in sorted(made.iterdir())}
            (made / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
            self._install(made, temporary / "old")
        except OSError as error:
            _cannot_write(root, error)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what killed processes left: hundreds of megabytes, older than any conversion."""
        for path in self.directory.parent.glob(f".{self.directory.name}-*"):
            if time.time() - path.stat().st_mtime > LEFT_OVER:
                shutil.rmtree(path, ignore_errors=True)

    def _install(self, made: Path, old: Path) -> None:
        """Move `made` into place; another process that was faster wins if its copy is sound."""
        for _ in range(2):
            if self.directory.exists():
                if self.is_sound():
                    return
                self.directory.rename(old)
            try:
                made.rename(self.directory)
            except OSError:
                if not self.directory.exists():
                    raise
                continue
            return


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _cannot_write(root: Path, error: OSError) -> NoReturn:
    raise OutputError(
        f"cannot write the model cache {root}: {error.strerror or error}. "
        "Set XDG_CACHE_HOME to a directory with 600 MB free."
    ) from error
