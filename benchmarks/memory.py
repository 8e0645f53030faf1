"""Peak memory growth of one call, measured in a process of its own.

Growth is counted from the state after imports, model, batch and one earlier call of the same case,
so that code, compiled kernels and cached plans do not count, but every tensor of the call does, its
result included. On the CPU it is the high-water mark of the resident set, with an allocator that
gives memory back at once; on a GPU it is what torch allocated.

    python benchmarks/memory.py PROBLEM SOURCE QUANTITY [--device cpu] [--compile] [--threads 2]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.peers import Prepared
from benchmarks.quantities import Case, prepare
from benchmarks.workloads import build

# Unless told otherwise glibc keeps freed memory, and the resident set does not follow the tensors.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def in_subprocess(problem: str, case: Case, device: str, threads: int, timeout: float) -> int:
    """Measure in a fresh process.

    Args:
        problem: Name of the workload.
        case: What to call.
        device: Where.
        threads: Threads of torch.
        timeout: Seconds after which to give up.

    Returns:
        The growth in bytes.

    Raises:
        RuntimeError: The process failed; the message is the end of its error output.
    """
    command = [sys.executable, __file__, problem, case.source, case.quantity]
    command += ["--device", device, "--threads", str(threads)]
    command += ["--compile"] if case.compiled else []
    done = subprocess.run(
        command,
        env={**os.environ, **ALLOCATOR},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr else "no output")
    return int(json.loads(done.stdout.splitlines()[-1])["growth"])


def growth(prepared: Prepared, device: torch.device) -> int:
    """Return the bytes by which one call raises memory at its peak."""
    run = prepared.run
    run()
    prepared.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    _give_back()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # lowers VmHWM to VmRSS
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status: memory on the CPU needs Linux")


def _give_back() -> None:
    ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    """Measure one case and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problem")
    parser.add_argument("source")
    parser.add_argument("quantity")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    workload = build(asked.problem, asked.device)
    prepared = prepare(workload, Case(asked.source, asked.quantity, asked.compile))
    print(json.dumps({"growth": growth(prepared, workload.device)}))


if __name__ == "__main__":
    main()
