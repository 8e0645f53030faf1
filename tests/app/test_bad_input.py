"""Every kind of bad input: exit code 2, one line, nothing written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fisherfn.app import job as job_module

Tiny = Callable[[str], Path]


@pytest.fixture
def refused(fim: Any, tiny: Tiny, texts: Path, tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs with good options but those given, and checks the refusal."""

    def run(**changes: object) -> str:
        options: dict[str, object] = {
            "model": tiny("llama"),
            "data": texts,
            "output": tmp_path / "out",
            **changes,
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        done = fim(*arguments)
        assert done.code == 2, done.out + done.err
        assert not done.out
        lines = [line for line in done.err.splitlines() if not line.startswith("fim: ")]
        assert len(lines) == 1
        assert lines[0].startswith("fisherfn: ")
        assert "Traceback" not in done.err
        assert not (tmp_path / "out").exists()
        return lines[0]

    return run


def file(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"expected at least one text, got none"),
        ("\n  \n\n", r"expected at least one text, got none"),
        ("def\nclass\n", r"got 2 of one token or none"),
        (b"good line\nna\xefve x\n", r"line 2 of .*data\.txt is not UTF-8"),
    ],
    ids=["empty", "blank", "one word", "latin-1"],
)
def test_data(
    refused: Callable[..., str], tmp_path: Path, content: str | bytes, message: str
) -> None:
    assert re.search(message, refused(data=file(tmp_path / "data.txt", content)))


@pytest.mark.parametrize("name", ["missing.txt", "missing.json", "missing.csv"])
def test_data_that_is_not_there(refused: Callable[..., str], tmp_path: Path, name: str) -> None:
    assert "--data: " in refused(data=tmp_path / name)


def test_models(refused: Callable[..., str], tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no config.json in" in refused(model=tmp_path / "empty")
    assert "no such directory" in refused(model=tmp_path / "nowhere")
    assert "got T5ForConditionalGeneration" in refused(model=tiny("t5"))
    assert "looks at later tokens" in refused(model=tiny("bert"))
    assert "no directory here, and the model hub" in refused(model="someone/something")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:99"}, r"--device: no device 'cuda:99' here\. This machine has: cpu"),
        (
            {"select": "nothing_like_it"},
            r"--select: expected .* There are 20, such as model\.embed",
        ),
        ({"select": "["}, r"--select: expected a regular expression"),
        ({"max-length": 1}, r"--max-length: expected at least 2"),
        ({"batch-size": 0}, r"--batch-size: expected at least 1"),
        ({"output_path": "/nowhere/t.csv"}, r"--output_path: expected a file in an existing"),
    ],
)
def test_options(refused: Callable[..., str], options: dict[str, object], message: str) -> None:
    assert re.search(message, refused(**options))


def test_sample_longer_than_the_model_reads(refused: Callable[..., str], tmp_path: Path) -> None:
    data = file(tmp_path / "data.txt", "x " * 40)
    assert re.search(r"at most 32 tokens, got a sample of 40.*--max-length 32", refused(data=data))


def test_exact_fisher_of_many_columns(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fisherfn.app.fim

    monkeypatch.setattr(fisherfn.app.fim, "EXACT_BUDGET", 100)
    message = refused(fisher="exact")
    assert re.search(
        r"exact takes \d+ columns \(\d+ positions x 64 classes but one\).*Take mc", message
    )


def test_output_that_cannot_be_written(fim: Any, tiny: Tiny, texts: Path, tmp_path: Path) -> None:
    blocked = file(tmp_path / "file", "")
    for output, message in (
        (blocked, r"file is a file\. Name a directory"),
        (blocked / "below", r"cannot write to .*: Not a directory"),
        ("/proc/fisherfn", r"cannot write to /proc/fisherfn"),
    ):
        done = fim("--model", tiny("llama"), "--data", texts, "--output", output)
        assert done.code == 2
        assert re.search(message, done.err)


def test_output_is_checked_before_the_work(
    fim: Any, tiny: Tiny, texts: Path, tmp_path: Path
) -> None:
    if os.geteuid() == 0:
        locked = Path("/proc")
    else:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
    done = fim("--model", "/nowhere", "--data", texts, "--output", locked / "out")
    assert done.code == 2
    assert "--output: cannot write to" in done.err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def exhausted(*args: object) -> None:
        raise error

    monkeypatch.setattr(job_module, "batch_tensors", exhausted)
    message = refused(**{"batch-size": 3})
    assert re.search(
        r"out of memory on cpu in batch 1 of 3 \(3 samples of up to \d+ tokens\)", message
    )
    assert (
        "Lower --batch-size (now 3) or --max-length (now 256), or use --dtype bfloat16" in message
    )


def test_a_device_without_memory(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(torch, "zeros", exhausted)
    assert "--device: no memory is left on cpu, other programs hold it." in refused(device="cpu")


@pytest.mark.parametrize("place", ["to", "forward"])
def test_a_model_that_does_not_fit(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    from transformers import LlamaForCausalLM

    def exhausted(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    monkeypatch.setattr(LlamaForCausalLM, place, exhausted)
    message = refused()
    assert "does not fit into the memory of cpu. Use --dtype bfloat16, or --device cpu" in message


def test_fisher_that_is_not_finite(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = job_module.Job.of.__func__

    def broken(*args: Any) -> job_module.Job:
        job = real(job_module.Job, *args)
        for value in job.params.values():
            value.mul_(torch.inf)
        return job

    monkeypatch.setattr(job_module.Job, "of", broken)
    assert re.search(r"the Fisher is not finite at model\..* on the samples \d, \d\. ", refused())


def test_full_disk_while_writing(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    import fisherfn.app.publish

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fisherfn.app.publish, "write_diagonal", full)
    assert re.search(r"--output: cannot write to .*out: No space left on device", refused())
