"""Which libraries compute the Kronecker factors that are defined, in absolute value?

    python benchmarks/agreement.py                    all cases, all libraries that are installed
    python benchmarks/agreement.py --case mlp --library fisherfn curvlinops

Small problems in float64. Each library is asked for K-FAC ("expand") and EKFAC with labels that it
does not draw: the observed ones ("empirical"), and all of them by their probability ("exact"). In
one case it draws four labels for each example, and the mean trace of many calls is looked at.

The product A ⊗ G of each layer is compared with `kronecker_blocks`, since scale may sit in either
factor. EKFAC is compared in the library's own bases if these diagonalise the factors. Values are
read as each library documents them; `agreement_libraries.CONVENTIONS` says how. The findings are
written to benchmarks/results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import agreement_cases, agreement_draws, kronecker_blocks, report
from benchmarks.agreement_cases import Case
from benchmarks.agreement_causes import causes
from benchmarks.agreement_libraries import CONVENTIONS, LIBRARIES, installed
from benchmarks.kronecker_blocks import Layer, Reading
from benchmarks.oracle import Values
from benchmarks.prepared import NotOffered
from benchmarks.workloads import Workload

DIAGONAL = "the exact diagonal where a layer is used twice"
TOLERANCE = 1e-7  # relative; some libraries keep constants in float32
STRUCTURES = ("kfac", "ekfac")
LEGEND = """
exact/empirical, where they differ; × what blocks are too large by; * some layers have no block;
diagonal: of a layer that is used twice, exact; -: not offered
"""
FISHERS = ("exact", "empirical")
READINGS = {
    "": Reading(),
    "all rows are inputs": Reading(all_rows=True),
    "each label has its own score": Reading(apart=True),
    "all rows are inputs, each label has its own score": Reading(all_rows=True, apart=True),
    "weights in G alone": Reading(weighted_inputs=False),
    "weights squared, in G alone": Reading(weighted_inputs=False, power=2),
}


@dataclass
class Finding:
    """What a library says about one case.

    Attributes:
        case: Name of the problem.
        library: Who was asked.
        structure: "kfac" or "ekfac".
        fisher: "exact", "empirical" or "mc".
        verdict: "right", "off", "wrong", "not offered" or "raises".
        text: The verdict in words.
        error: Largest error of a block relative to its norm.
        errors: For each block, its error relative to its norm.
        ratios: For each block, what it would have to be divided by, where one number is enough.
        layers: How many of the model's layers the library has a block for, and how many there are.
        reading: Which reading of the definition was met, if not the plain one.
        cause: Why it is not right, as far as the library's source shows.
    """

    case: str
    library: str
    structure: str
    fisher: str
    verdict: str = ""
    text: str = ""
    error: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    layers: tuple[int, int] = (0, 0)
    reading: str = ""
    cause: str = ""


def ask(case: Case, library: str, structure: str, fisher: str) -> Finding:
    """Ask a library, and judge its answer."""
    found = Finding(case.workload.name, library, structure, fisher)
    try:
        with _quiet():
            found = _answered(case, found)
    except NotOffered as error:
        found.verdict, found.text = "not offered", f"not offered: {error}"
    except Exception as error:
        found.verdict = "raises"
        found.text = f"raises {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    if found.verdict in ("off", "wrong"):
        found.cause = causes(library, found.case, structure, fisher)
    return found


def _answered(case: Case, found: Finding) -> Finding:
    """Return the finding by the first reading of the definition that is met, or nearly so."""
    workload, prepare = case.workload, LIBRARIES[found.library]
    if case.options.draws > 1:
        ratio, spread = agreement_draws.ratio(case, prepare, found.structure)
        found.verdict, found.text = agreement_draws.verdict(ratio, spread)
        found.error, found.ratios = abs(ratio - 1.0), {"trace": ratio}
        return found
    prepared = prepare(workload, f"{found.structure}/{found.fisher}", case.options)
    values = prepared.values(prepared.run())
    tried = [judged(found, values, workload, found.fisher, name) for name in _readings(workload)]
    for wanted in ("right", "off"):
        for finding in tried:
            if finding.verdict == wanted:
                return finding
    return min(tried, key=lambda f: f.error or 0.0)


def judged(
    finding: Finding, values: Values, workload: Workload, fisher: str, reading: str
) -> Finding:
    """Return a finding with the comparison of values with one reading of the definition."""
    known = kronecker_blocks.layers(workload, fisher, READINGS[reading])
    errors: dict[str, float] = {}
    ratios: dict[str, float] = {}
    covered: set[str] = set()
    exact_diagonals = 0
    for name, got, wanted in _pairs(values, known, finding.structure):
        covered.add(name.rpartition(".")[0])
        exact_diagonals += got.dim() == 1
        errors[name], ratios[name] = _error(got, wanted)
    text, verdict = _verdict(errors, ratios)
    notes = [reading] if reading else []
    if exact_diagonals:
        notes.append(DIAGONAL)
    if covered and len(covered) < len(known):
        notes.append(f"{len(covered)} of {len(known)} layers")
    text += f" ({', '.join(notes)})" if notes else ""
    return Finding(
        finding.case,
        finding.library,
        finding.structure,
        fisher,
        verdict,
        text,
        max(errors.values(), default=None),
        errors,
        ratios,
        (len(covered), len(known)),
        reading,
    )


def _readings(workload: Workload) -> list[str]:
    """Return the readings that make a difference."""
    names = [""]
    if workload.positions > 1:
        names.append("each label has its own score")
    if workload.batch.mask is not None:
        names += ["all rows are inputs", "all rows are inputs, each label has its own score"]
    if workload.batch.weights is not None:
        names += ["weights in G alone", "weights squared, in G alone"]
    return names


def _pairs(
    values: Values, known: dict[str, Layer], structure: str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield blocks of a library, or diagonals, with what they should be."""
    prefix = "A/" if structure == "kfac" else "S/"
    for name in sorted(k.removeprefix(prefix) for k in values if k.startswith(prefix)):
        path, _, kind = name.rpartition(".")
        layer = known[path]
        width = _grouped(values[f"{'A' if structure == 'kfac' else 'QA'}/{name}"]).shape[-1]
        if kind == "bias" or (layer.bias and width < layer.A.shape[-1]):
            layer = layer.part(kind)
        if structure == "kfac":
            A, G = _grouped(values[f"A/{name}"]), _grouped(values[f"G/{name}"])
            got, wanted = kronecker_blocks.dense(A, G), layer.kfac()
            if kind == "bias" and _error(got, wanted)[0] > TOLERANCE:
                wanted = _second_moment(layer)  # a bias alone may have its exact block
        else:
            QA, QG = _grouped(values[f"QA/{name}"]), _grouped(values[f"QG/{name}"])
            got = kronecker_blocks.spectral(QA, QG, _grouped(values[f"S/{name}"]))
            if not (_diagonalises(QA, layer.A) and _diagonalises(QG, layer.G)):
                QA, QG = torch.linalg.eigh(layer.A)[1], torch.linalg.eigh(layer.G)[1]
            wanted = layer.ekfac(QA, QG)
        yield name, got, wanted
    for name in (k.removeprefix("rest/") for k in values if k.startswith("rest/")):
        path, _, kind = name.rpartition(".")
        if path in known:
            layer = known[path].part(kind) if known[path].bias else known[path]
            yield name, values[f"rest/{name}"].flatten(), layer.diagonal().flatten()


def _second_moment(layer: Layer) -> Tensor:
    """Return the exact block of a layer whose inputs are all one."""
    return torch.stack([w * torch.outer(s.flatten(), s.flatten()) for w, s in layer.scores]).sum(0)


def _grouped(x: Tensor) -> Tensor:
    x = x.detach().double()
    return x if x.dim() == 3 else x.unsqueeze(0)


def _diagonalises(Q: Tensor, M: Tensor) -> bool:
    if Q.shape[-2:] != M.shape[-2:]:
        return False
    turned = Q.mT @ M @ Q
    off = turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))
    return float(off.norm()) <= TOLERANCE * float(M.norm())


def _error(got: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Return the relative error, and the ratio if there is one (else NaN)."""
    if got.shape != wanted.shape or not bool(got.isfinite().all()):
        return float("inf"), float("nan")
    error = float((got - wanted).norm() / wanted.norm())
    ratio = float((got * wanted).sum() / wanted.square().sum())
    proportional = float((got - ratio * wanted).norm()) <= TOLERANCE * float(got.norm())
    return error, ratio if proportional else float("nan")


def _verdict(errors: dict[str, float], ratios: dict[str, float]) -> tuple[str, str]:
    worst = max(errors.values(), default=float("inf"))
    if not errors:
        return "wrong (no block)", "wrong"
    if worst <= TOLERANCE:
        return "right", "right"
    if all(math.isfinite(x) for x in ratios.values()):
        distinct = sorted({float(f"{x:.4g}") for x in ratios.values()})
        shown = ", ".join(f"×{x:.4g}" for x in distinct)
        where = "" if len(distinct) == 1 else ", not the same for all layers"
        return f"off by {shown}{where}", "off"
    good = sum(e <= TOLERANCE for e in errors.values())
    some = f"; {good} of {len(errors)} blocks right" if good else ""
    if worst == float("inf"):
        return f"wrong (a block of another size, or not finite{some})", "wrong"
    return f"wrong (relative error {worst:.2g}{some})", "wrong"


def _fishers(case: str) -> tuple[str, ...]:
    return FISHERS if agreement_cases.build(case).options.draws == 1 else ("mc",)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let libraries warn, draw, and make constants of the default dtype, unnoticed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)


def table(findings: Sequence[Finding]) -> str:
    """Return the findings as text: a paragraph for each case and structure, a line a library."""
    lines: list[str] = []
    grouped: dict[tuple[str, str], dict[str, dict[str, Finding]]] = {}
    for f in findings:
        grouped.setdefault((f.structure, f.case), {}).setdefault(f.library, {})[f.fisher] = f
    for (structure, case), libraries in grouped.items():
        lines.append(f"{structure}, {case}")
        for library, cells in libraries.items():
            had = {k: f for k, f in cells.items() if f.verdict != "not offered"} or cells
            texts = {k: f.text for k, f in had.items()}
            if len(set(texts.values())) == 1:
                texts = {"": next(iter(texts.values()))}
            shown = "; ".join(f"{k}: {x}" if k else x for k, x in texts.items())
            lines.append(f"  {library:12}{shown}")
            lines += [
                f"  {'':12}because {x}" for x in dict.fromkeys(f.cause for f in had.values()) if x
            ]
    return "\n".join(lines)


def summary(findings: Sequence[Finding]) -> str:
    """Return a table of cases by libraries with a word for each kind of labels.

    Two words are about all labels and about the observed ones; a ratio is what a result, or some of
    its blocks, is too large by; with a star, some layers have no block.
    """
    libraries = list(dict.fromkeys(f.library for f in findings))
    lines = []
    for structure in dict.fromkeys(f.structure for f in findings):
        mine = [f for f in findings if f.structure == structure]
        rows = [[structure, *libraries]]
        for case in dict.fromkeys(f.case for f in mine):
            row = [case]
            for library in libraries:
                found = [f for f in mine if f.case == case and f.library == library]
                words = [_word(f) for f in found if f.verdict != "not offered"]
                row.append("/".join(dict.fromkeys(words)) or "-")
            rows.append(row)
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        pairs = [zip(row, widths, strict=True) for row in rows]
        lines += ["  ".join(c.ljust(w) for c, w in pair).rstrip() for pair in pairs]
        lines.append("")
    return "\n".join(lines)


def _word(found: Finding) -> str:
    if found.verdict != "off":
        diagonal = found.verdict == "right" and DIAGONAL in found.text
        some = "*" if found.layers[0] < found.layers[1] else ""
        return "diagonal" if diagonal else found.verdict + some
    ratios = sorted({float(f"{x:.2g}") for x in found.ratios.values()})
    return "×" + ",".join(f"{x:g}" for x in ratios)


def write(directory: Path, findings: Sequence[Finding]) -> Path:
    """Write `kronecker-agreement.json` and return its path."""
    content = {
        "schema": report.SCHEMA,
        **report.environment(torch.device("cpu")),
        "conventions": CONVENTIONS,
        "tolerance": TOLERANCE,
        "findings": [_finite(asdict(f)) for f in findings],
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "kronecker-agreement.json"
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _finite(x: Any) -> Any:
    """Return a tree with null in place of what JSON has no number for."""
    if isinstance(x, dict):
        return {k: _finite(v) for k, v in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and write all findings; return 1 if this package is not right everywhere."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases = list(agreement_cases.PROBLEMS)
    parser.add_argument("--case", nargs="+", choices=cases, default=cases)
    parser.add_argument("--library", nargs="+", choices=list(LIBRARIES), help="default: installed")
    parser.add_argument(
        "--output",
        type=Path,
        default=report.ROOT / "benchmarks" / "results",
        help="folder of the results",
    )
    asked = parser.parse_args(arguments)
    findings = [
        ask(agreement_cases.build(name), library, structure, fisher)
        for structure in STRUCTURES
        for name in asked.case
        for library in asked.library or installed()
        for fisher in _fishers(name)
    ]
    print(table(findings))
    print(LEGEND)
    print(summary(findings))
    print(f"written: {write(asked.output, findings)}")
    return int(any(f.library == "fisherfn" and f.verdict != "right" for f in findings))


if __name__ == "__main__":
    sys.exit(main())
