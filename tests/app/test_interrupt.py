"""Stopped runs go on, to the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fisherfn as ff
from fisherfn.app import checkpoint
from fisherfn.app.job import Job

Tiny = Callable[[str], Path]


@pytest.fixture
def arguments(tiny: Tiny, texts: Path) -> tuple[object, ...]:
    return ("--model", tiny("llama"), "--data", texts, "--label-samples", 2)


@pytest.fixture
def uninterrupted(fim: Any, arguments: tuple[object, ...], tmp_path: Path) -> Path:
    out = tmp_path / "whole"
    assert fim(*arguments, "--output", out).code == 0
    return out


def interrupt_in_batch(monkeypatch: pytest.MonkeyPatch, index: int, number: signal.Signals) -> None:
    real = Job.batch

    def batch(self: Job, at: int) -> Any:
        if at == index:
            signal.raise_signal(number)
        return real(self, at)

    monkeypatch.setattr(Job, "batch", batch)


def same(a: Path, b: Path) -> None:
    x, y = (load_file(path / "fisher_diagonal.safetensors") for path in (a, b))
    assert x.keys() == y.keys()
    assert all(torch.equal(x[name], y[name]) for name in x)
    for name in ("fisher_diagonal.safetensors", "layer_importance.json", "fisher.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_all_but_the_running_batch_is_kept(
    fim: Any,
    arguments: tuple[object, ...],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_in_batch(patch, 2, number)
        done = fim(*arguments, "--output", out)
    assert done.code == code
    assert [path.name for path in out.iterdir()] == [checkpoint.FILE]
    assert "stopped after 2 of 4 batches" in done.err
    assert f"--output {out} --resume" in done.err.replace("\n", " ")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    done = fim(*arguments, "--output", out, "--resume", "--top", 3)
    assert done.code == 0, done.err
    assert "resuming after 2 of 4 batches" in done.err
    assert not (out / checkpoint.FILE).exists()
    same(out, uninterrupted)


def test_stopped_in_the_first_batch(
    fim: Any, arguments: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_in_batch(monkeypatch, 0, signal.SIGINT)
    done = fim(*arguments, "--output", tmp_path / "out")
    assert done.code == 130
    assert "nothing was written" in done.err
    assert not (tmp_path / "out").exists()


def test_stopped_before_the_first_batch(
    fim: Any, arguments: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fisherfn.app.fim

    def stop(*args: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(fisherfn.app.fim, "load_weights", stop)
    done = fim(*arguments, "--output", tmp_path / "out")
    assert done.code == 130
    assert "fisherfn: stopped; nothing was written." in done.err
    assert not (tmp_path / "out").exists()


def test_stopped_while_writing_keeps_every_batch(
    fim: Any,
    arguments: tuple[object, ...],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import fisherfn.app.publish

    def stop(*args: object) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(fisherfn.app.publish, "write_diagonal", stop)
        assert fim(*arguments, "--output", tmp_path / "out").code == 130
    done = fim(*arguments, "--output", tmp_path / "out", "--resume")
    assert done.code == 0
    assert "resuming after 4 of 4 batches" in done.err
    same(tmp_path / "out", uninterrupted)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--fisher", "curvature_prop"), "--fisher was mc, is curvature_prop"),
        (("--seed", 7), "--seed was 0, is 7"),
        (("--batch-size", 3), "--batch-size was 2, is 3"),
        (("--num-samples", 5), "--num-samples was 20, is 5"),
        (("--dtype", "bfloat16"), "--dtype was float32, is bfloat16"),
        (("--select", "mlp"), "--select was None, is mlp"),
        (("--unit", "position"), "--unit was example, is position"),
    ],
)
def test_another_setup_is_not_resumed(
    fim: Any,
    arguments: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changed: tuple[object, ...],
    message: str,
) -> None:
    with monkeypatch.context() as patch:
        interrupt_in_batch(patch, 1, signal.SIGINT)
        assert fim(*arguments, "--output", tmp_path / "out").code == 130
    done = fim(*arguments, *changed, "--output", tmp_path / "out", "--resume")
    assert done.code == 2
    assert message in done.err
    assert (tmp_path / "out" / checkpoint.FILE).exists()


def test_other_texts_and_other_weights_are_not_resumed(
    fim: Any, tiny: Tiny, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_in_batch(patch, 1, signal.SIGINT)
        assert fim("--model", tiny("llama"), "--data", texts, "--output", out).code == 130
    done = fim("--model", tiny("gpt2"), "--data", texts, "--output", out, "--resume")
    assert (done.code, "digest of its weights" in done.err) == (2, True)
    texts.write_text(texts.read_text("utf-8") + "x = y\n", "utf-8")
    done = fim("--model", tiny("llama"), "--data", texts, "--output", out, "--resume")
    assert (done.code, "digest of their tokens" in done.err) == (2, True)


def test_resume_without_a_checkpoint_begins(
    fim: Any, arguments: tuple[object, ...], uninterrupted: Path, tmp_path: Path
) -> None:
    done = fim(*arguments, "--output", tmp_path / "out", "--resume")
    assert done.code == 0
    assert "no unfinished run" in done.err
    same(tmp_path / "out", uninterrupted)


def test_without_resume_an_unfinished_run_is_replaced_and_that_is_said(
    fim: Any,
    arguments: tuple[object, ...],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_in_batch(patch, 1, signal.SIGINT)
        assert fim(*arguments, "--output", out).code == 130
    done = fim(*arguments, "--output", out)
    assert done.code == 0
    assert "holds an unfinished run, which this one replaces" in done.err
    assert not (out / checkpoint.FILE).exists()
    same(out, uninterrupted)


def test_saved_as_often_as_promised(
    fim: Any, arguments: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fisherfn.app.run

    saved: list[int] = []
    real = checkpoint.save

    def save(directory: Path, now: checkpoint.FimCheckpoint) -> None:
        saved.append(now.done)
        real(directory, now)

    monkeypatch.setattr(fisherfn.app.run.checkpoint, "save", save)
    assert fim(*arguments, "--output", tmp_path / "a", "--save-every", 0).code == 0
    assert saved == [1, 2, 3]  # after the last come the results
    saved.clear()
    assert fim(*arguments, "--output", tmp_path / "b", "--save-every", 1000).code == 0
    assert saved == []


def test_a_checkpoint_that_cannot_be_saved_does_not_end_the_run(
    fim: Any, arguments: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: object) -> None:
        raise ff.FisherError("No space left on device")

    monkeypatch.setattr(ff.io, "save", full)
    done = fim(*arguments, "--output", tmp_path / "out", "--save-every", 0)
    assert done.code == 0
    assert "progress could not be saved" in done.err


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_real_signals_and_real_processes(
    start: Callable[..., subprocess.Popen[str]], fim: Any, tiny: Tiny, tmp_path: Path
) -> None:
    data = tmp_path / "many.txt"
    lines = (f"x = {i % 4} + y * {(i // 4) % 4} return z" for i in range(600))
    data.write_text("\n".join(lines), "utf-8")
    options = ("--model", tiny("gpt2"), "--data", data, "--num-samples", 600, "--batch-size", 20)
    out = tmp_path / "out"
    arguments = (*options, "--output", out, "--save-every", 0)

    killed = start(*arguments)
    wait_for(lambda: checkpoint.exists(out), killed)
    killed.kill()
    assert killed.wait(timeout=60) == -signal.SIGKILL
    first = checkpoint.load(out, torch.device("cpu")).done
    assert 0 < first < 30

    interrupted = start(*arguments, "--resume")
    wait_for(lambda: checkpoint.load(out, torch.device("cpu")).done > first, interrupted)
    interrupted.send_signal(signal.SIGINT)
    _, printed = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130
    second = checkpoint.load(out, torch.device("cpu")).done
    assert f"resuming after {first} of 30 batches" in printed
    assert f"stopped after {second} of 30 batches" in printed

    done = fim(*arguments, "--resume")
    assert done.code == 0, done.err
    assert f"resuming after {second} of 30 batches" in done.err
    assert {path.suffix for path in out.iterdir()} == {".json", ".csv", ".safetensors"}
    assert json.loads((out / "summary.json").read_text("utf-8"))["count"] == 600
    assert fim(*options, "--output", tmp_path / "whole").code == 0
    same(out, tmp_path / "whole")
