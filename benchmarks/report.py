"""Results as JSON with everything that is needed to judge them, and as a table for people."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.peers import PEERS
from benchmarks.timing import Timing

ROOT = Path(__file__).resolve().parent.parent
MAX_ERROR = 1e-4
MAX_Z = 5.0
MAX_ROUNDING = 1e-2  # where float32 may take the other side of a ReLU for a few examples
SCHEMA = 1


@dataclass
class Row:
    """What was found about one case.

    Attributes:
        quantity: Name of the quantity.
        source: Who computed it: gradient, fisherfn or a peer.
        compiled: Whether under `torch.compile(fullgraph=True)`.
        status: "ok", "skipped", "not offered" or "failed".
        message: Why not, where the status is not "ok"; else what of the model is left out.
        error: Largest deviation from the oracle when computed in float64; where a peer draws labels
            itself, the deviation of what it computes from the observed ones.
        rounding: Distance of the timed float32 result from the oracle, relative to its norm.
        z: Deviation of the mean trace in standard errors, where a peer draws labels itself.
        agrees: Whether the value is right: error and rounding within bounds, and |z| < 5.
        first_call: Seconds of the first call: plans, tracing, compilation.
        timing: Seconds of a warm call.
        gradients: Median in multiples of the eager gradient's median.
        memory: Peak growth in bytes.
        memory_gradients: The same in multiples of the eager gradient's.
    """

    quantity: str
    source: str
    compiled: bool = False
    status: str = "ok"
    message: str = ""
    error: float | None = None
    rounding: float | None = None
    z: float | None = None
    agrees: bool | None = None
    first_call: float | None = None
    timing: Timing | None = None
    gradients: float | None = None
    memory: int | None = None
    memory_gradients: float | None = None


def environment(device: torch.device) -> dict[str, object]:
    """Return versions, machine and source state."""
    packages = ["fisherfn", "torch", "numpy", "optree", "transformers"]
    packages += [peer.distribution for peer in PEERS.values()]
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "device": {
            "type": device.type,
            "name": _device_name(device),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "settings": {"tf32": torch.backends.cudnn.allow_tf32},
    }


def write(
    directory: Path, problem: str, sizes: dict[str, int], device: torch.device, rows: Sequence[Row]
) -> Path:
    """Write `<problem>-<device>.json` and return its path."""
    content = {
        "schema": SCHEMA,
        "problem": problem,
        "sizes": sizes,
        "dtype": "float32",
        **environment(device),
        "rows": [asdict(row) for row in rows],
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{problem}-{device.type}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def table(problem: str, sizes: dict[str, int], device: torch.device, rows: Sequence[Row]) -> str:
    """Return the rows as text, times and memory as multiples of an eager gradient."""
    unit = next(row for row in rows if row.source == "gradient" and not row.compiled)
    described = ", ".join(f"{name} {value:,}" for name, value in sizes.items())
    title = f"{problem} on {_device_name(device)} ({described})"
    if unit.timing:
        title += f"\nunit: one eager gradient, {1e3 * unit.timing.median:.2f} ms"
    if unit.memory is not None:
        title += f", {unit.memory / 2**20:.1f} MiB"
    head = ("quantity", "by", "time", "memory", "error", "in float32", "agrees", "first call")
    lines = [head, *(_cells(row) for row in rows if row.status != "not offered")]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    body = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    body.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join([title, *(line.rstrip() for line in body), *_notes(rows)])


def _notes(rows: Sequence[Row]) -> list[str]:
    missing: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.message:
            missing.setdefault((row.source, row.message), []).append(row.quantity)
    return [f"{source}, {', '.join(names)}: {why}" for (source, why), names in missing.items()]


def _cells(row: Row) -> tuple[str, ...]:
    by = f"{row.source} (compiled)" if row.compiled else row.source
    if row.status != "ok":
        return row.quantity, by, row.status, "", "", "", "", ""
    return (
        row.quantity,
        by,
        _number(row.gradients, "{:.2f}"),
        _number(row.memory_gradients, "{:.2f}"),
        _number(row.error, "{:.1e}"),
        _number(row.rounding, "{:.1e}"),
        {None: "", True: "yes", False: "NO"}[row.agrees],
        _number(row.first_call, "{:.2f} s"),
    )


def _number(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
