"""Options, aliases, help and exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fisherfn as ff
from fisherfn.app import cli, commands
from fisherfn.app.options import FimOptions


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[FimOptions]:
    """Replace the work by a list of the options it was asked for."""
    import fisherfn.app.fim

    asked: list[FimOptions] = []

    def take(options: FimOptions, *rest: Any) -> int:
        asked.append(options)
        return 0

    monkeypatch.setattr(fisherfn.app.fim, "fim", take)
    return asked


def test_defaults(parsed: list[FimOptions]) -> None:
    assert cli.main(["fim"]) == 0
    assert parsed == [FimOptions()]
    assert (parsed[0].fisher, parsed[0].num_samples, parsed[0].batch_size) == ("mc", 20, 2)
    assert (parsed[0].max_length, str(parsed[0].output)) == (256, "fisher_results")


def test_every_option(parsed: list[FimOptions]) -> None:
    line = (
        "fim --model m --data d.txt --fisher curvature_prop --unit position --num-samples 3 "
        "--label-samples 4 --batch-size 5 --max-length 6 --device cpu --dtype bfloat16 --output o "
        "--granularity 7 --select mlp --seed 8 --top 9 --resume --save-every 1.5 --format pt "
        "--verbose"
    )
    assert cli.main(line.split()) == 0
    expected = FimOptions(
        model="m",
        data=Path("d.txt"),
        fisher="curvature_prop",
        unit="position",
        num_samples=3,
        label_samples=4,
        batch_size=5,
        max_length=6,
        device="cpu",
        dtype="bfloat16",
        output=Path("o"),
        granularity=7,
        select="mlp",
        seed=8,
        top=9,
        resume=True,
        save_every=1.5,
        format="pt",
        verbose=True,
    )
    assert parsed == [expected]


def test_older_spellings(parsed: list[FimOptions]) -> None:
    line = (
        "fim --model_path m --calibration_data=d.txt --num_samples 3 --batch_size 5 --max_length 6 "
        "--output_dir o --use_fp16 --granularity 7 --top_n 9 --save_fisher_dict --output_path t.csv"
    )
    assert cli.main(line.split()) == 0
    expected = FimOptions(
        model="m",
        data=Path("d.txt"),
        num_samples=3,
        batch_size=5,
        max_length=6,
        output=Path("o"),
        dtype="float16",
        granularity=7,
        top=9,
        format="pt",
        csv=Path("t.csv"),
    )
    assert parsed == [expected]


def test_help_shows_public_names_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fim", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--num-samples" in text
    assert "--save-every" in text
    assert "curvature_prop" in text
    for hidden in ("model_path", "model-path", "fp16", "output-path", "fisher-dict", "Raises"):
        assert hidden not in text


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) in (0, 2)
    printed = capsys.readouterr()
    assert "fim" in printed.out + printed.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fisherfn ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fim --unheard-of", "No such option"),
        ("fim --num-samples many", "integer"),
        ("fim --fisher true", "true"),
        ("fim --num-samples 0", "--num-samples: expected at least 1, got 0"),
        ("fly", "fly"),
    ],
)
def test_wrong_options(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(line.split()) == 2
    assert message in capsys.readouterr().err


def fail(*arguments: Any) -> None:
    raise ff.DataError("two\nlines   of it.")


def test_an_error_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "run", fail)
    assert cli.main(["fim"]) == 2
    assert capsys.readouterr().err == "fisherfn: two lines of it.\n"


def test_verbose_shows_where_it_came_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "run", fail)
    assert cli.main(["fim", "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_without_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "fisherfn.app.commands")
    monkeypatch.setitem(sys.modules, "typer", None)
    assert cli.main(["fim"]) == 2
    assert "needs typer" in capsys.readouterr().err


def test_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fisherfn", "fim", "--data", "/nowhere.csv", "--top", "-1"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "fisherfn: --top: expected at least 0, got -1.\n"
    assert not done.stdout
