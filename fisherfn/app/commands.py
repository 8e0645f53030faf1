"""The options of the command line, as typer sees them.

The spellings of older calculators (`--model_path`, `--calibration_data`, `--output_dir`, ...) are
accepted and not shown. Of these, `--output_path FILE` puts a copy of `fisher.csv` there.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Option

from fisherfn.app.options import DType, FimOptions, Fisher, Format, Unit

HELP = """Fisher information diagonal of a causal language model: which parts of it matter.

Writes layer_importance.json, component_importance.json, summary.json, fisher.csv and the diagonal
itself to --output, in place of those of an earlier run, when everything is done, and prints the
tables. Ctrl-C keeps what is finished for --resume.
"""
ALIASES = {
    "model-path": "model",
    "calibration-data": "data",
    "output-dir": "output",
    "top-n": "top",
}


NAMES = {field.name.replace("_", "-") for field in fields(FimOptions)}
HIDDEN = {"output-path", "use-fp16", "save-fisher-dict"}


def normalize(name: str) -> str:
    """Return the public spelling of an option: hyphens for underscores, and no old names.

    Typer also asks it about values; these stay as they are.
    """
    hyphened = name.replace("_", "-")
    return ALIASES.get(hyphened, hyphened if hyphened in NAMES | HIDDEN else name)


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": normalize, "help_option_names": ["-h", "--help"]},
)


def run(arguments: Sequence[str]) -> int:
    """Parse the arguments, run the command, and return its exit code."""
    command = typer.main.get_command(app)
    try:
        command.main(list(arguments), prog_name="fisherfn", obj=list(arguments))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def _show_version(wanted: bool) -> None:
    if wanted:
        from fisherfn.app.versions import version

        typer.echo(f"fisherfn {version('fisherfn')}")
        raise typer.Exit


@app.callback()
def fisherfn(
    version: Annotated[
        bool, Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Fisher information of neural networks."""


@app.command(help=HELP)
def fim(
    context: typer.Context,
    model: Annotated[
        str | None,
        Option(
            help="Directory with config.json, weights and tokenizer, or a hub id. "
            "[default: the packaged SmolLM2-135M-Instruct]"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        Option(
            help="Texts: .txt (one sample a line), .json or .jsonl (strings, or objects with "
            "'text'). [default: source of Python's standard library]"
        ),
    ] = None,
    fisher: Annotated[
        Fisher,
        Option(
            help="Which labels: drawn from the model (mc), random signs (curvature_prop), the "
            "text's own tokens (empirical), or the expectation (exact; tiny vocabularies only)."
        ),
    ] = "mc",
    unit: Annotated[Unit, Option(help="What N counts: samples, or predicted tokens.")] = "example",
    num_samples: Annotated[int, Option(help="Texts to take, from the first.")] = 20,
    label_samples: Annotated[int, Option(help="Draws of the labels a text.")] = 1,
    batch_size: Annotated[int, Option(help="Texts computed at a time.")] = 2,
    max_length: Annotated[int, Option(help="Tokens kept of a text.")] = 256,
    device: Annotated[
        str, Option(help="cpu, cuda, cuda:1, ... (auto: cuda if there is one).")
    ] = "auto",
    dtype: Annotated[
        DType, Option(help="What the model computes in; sums are float32 at least.")
    ] = "float32",
    output: Annotated[Path, Option(help="Directory of the results.")] = Path("fisher_results"),
    granularity: Annotated[int, Option(help="Chunks that each component is cut into.")] = 1,
    select: Annotated[
        str | None, Option(help="Only parameters whose name this regular expression finds.")
    ] = None,
    seed: Annotated[int, Option(help="Seed of the random labels.")] = 0,
    top: Annotated[int, Option(help="Rows of the printed tables.")] = 20,
    resume: Annotated[
        bool, Option("--resume", help="Go on with an interrupted run in --output.")
    ] = False,
    save_every: Annotated[
        float, Option(help="Seconds of work that a kill may cost: how often progress is saved.")
    ] = 60.0,
    format: Annotated[Format, Option(help="File format of the diagonal.")] = "safetensors",
    verbose: Annotated[bool, Option("--verbose", help="Log, and show tracebacks.")] = False,
    output_path: Annotated[Path | None, Option(hidden=True)] = None,
    use_fp16: Annotated[bool, Option("--use-fp16", hidden=True)] = False,
    save_fisher_dict: Annotated[bool, Option("--save-fisher-dict", hidden=True)] = False,
) -> None:
    """Compute the Fisher diagonal of a causal language model."""
    options = FimOptions(
        model=model,
        data=data,
        fisher=fisher,
        unit=unit,
        num_samples=num_samples,
        label_samples=label_samples,
        batch_size=batch_size,
        max_length=max_length,
        device=device,
        dtype="float16" if use_fp16 else dtype,
        output=output,
        granularity=granularity,
        select=select,
        seed=seed,
        top=top,
        resume=resume,
        save_every=save_every,
        format="pt" if save_fisher_dict else format,
        csv=output_path,
        verbose=verbose,
    )
    from fisherfn.app.fim import fim as compute

    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("fisherfn").setLevel(logging.DEBUG)
    for stream in (sys.stdout, sys.stderr):  # a terminal without bars must not spoil a finished run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    out, err = Console(), Console(stderr=True)
    raise typer.Exit(compute(options, context.obj, out, err))
