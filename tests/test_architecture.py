"""The floors of the library, read from its source: who imports whom, and what a file may hold."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fisherfn

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fisherfn"
FILES = sorted(PACKAGE.rglob("*.py"))
OWN_CODE = [*FILES, *sorted((ROOT / "tests").rglob("*.py")), *sorted(ROOT.glob("benchmarks/*.py"))]

FLOORS = {
    "core": 0,
    "batch": 1,
    "models": 1,
    "likelihoods": 1,
    "linalg": 1,
    "states": 1,
    "groups": 1,
    "layers": 2,
    "capture": 2,
    "curvature": 3,
    "estimators": 4,
    "optim": 5,
    "tasks": 5,
    "io": 5,
    "distributed": 5,
    "testing": 5,
    "app": 6,
}
ROOT_UNIT = "fisherfn"  # hands on the names of floors 0 to 5; only the application may import it
NEIGHBOURS = {("capture", "layers"), ("states", "batch"), ("distributed", "io")}  # within a floor
NOT_HANDED_ON = {"app", "testing"}  # need extras, so the root does not import them
LIGHT = {"torch", "numpy", "optree"}  # what may be imported when a module is loaded
HEAVY = (
    "transformers",
    "scipy",
    "hypothesis",
    "matplotlib",
    "rich",
    "typer",
    "safetensors",
    "gguf",
)
MAX_LINES = 400
MAX_SUPPRESSIONS = 5
MAX_IMPORT_SECONDS = 0.3


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def unit_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return {"__init__": ROOT_UNIT, "__main__": "app"}.get(first, first)


def imported_names(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Give the dotted names that one import statement loads; for `from a import b`, `a.b`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def units_imported(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for name in imported_names(node):
            top, _, rest = name.partition(".")
            unit = rest.split(".")[0]
            if top == ROOT_UNIT:
                yield unit if unit in FLOORS else ROOT_UNIT, node.lineno


def may_import(importer: str, imported: str) -> bool:
    if importer == imported or (importer, imported) in NEIGHBOURS:
        return True
    if importer == ROOT_UNIT:
        return imported not in NOT_HANDED_ON
    if imported == ROOT_UNIT:
        return importer == "app"
    return FLOORS[imported] < FLOORS[importer]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_unit_is_on_a_floor_and_imports_lower_floors_only(path: Path) -> None:
    unit = unit_of(path)
    assert unit == ROOT_UNIT or unit in FLOORS, f"{unit} has no floor: add it to FLOORS on purpose"
    wrong = [
        f"line {line}: {unit} imports {imported}"
        for imported, line in units_imported(path)
        if not may_import(unit, imported)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_unit_of_the_table_exists_and_is_in_the_guide() -> None:
    found = {unit_of(path) for path in FILES} - {ROOT_UNIT}
    assert set(FLOORS) == found
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)(?:/|\.py)`", guide.split("| floor |")[1].split("\n\n")[0]))
    assert named == found


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("curvature", "core", True),
        ("core", "curvature", False),
        ("capture", "layers", True),
        ("layers", "capture", False),
        ("states", "linalg", False),
        ("estimators", "curvature", True),
        ("curvature", "models", True),
        ("estimators", "fisherfn", False),
        ("app", "fisherfn", True),
        ("fisherfn", "io", True),
        ("fisherfn", "app", False),
        ("fisherfn", "testing", False),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed


def loaded_with_the_module(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Give the statements that run when a module is imported: no bodies, no type checking."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from loaded_with_the_module(node.orelse)
            continue
        yield node
        for field in ("body", "orelse", "handlers", "finalbody"):
            yield from loaded_with_the_module(getattr(node, field, []))


@pytest.mark.parametrize("path", [p for p in FILES if unit_of(p) not in NOT_HANDED_ON], ids=name_of)
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    allowed = LIGHT | {ROOT_UNIT} | set(sys.stdlib_module_names)
    loaded = {
        name.split(".")[0]
        for node in loaded_with_the_module(parsed(path).body)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported_names(node)
    }
    assert loaded <= allowed, f"imported with the module: {sorted(loaded - allowed)}"


@pytest.mark.parametrize("path", OWN_CODE, ids=name_of)
def test_file_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", OWN_CODE, ids=name_of)
def test_checkers_are_rarely_silenced(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    silenced = re.findall(r"# (?:noqa|type: ignore|pyright: ignore).*", text)
    deliberate = [s for s in silenced if "tests" in path.parts and "[arg-type]" in s]
    assert len(silenced) - len(deliberate) <= MAX_SUPPRESSIONS, silenced
    blanket = [s for s in silenced if re.fullmatch(r"# (?:noqa|type: ignore|pyright: ignore)", s)]
    assert not blanket, "name the rule that is silenced"


def only_hands_on(node: ast.stmt) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    if isinstance(node, ast.Assign):  # __all__, __version__, or another name for a thing
        dunder = all(isinstance(t, ast.Name) and t.id.startswith("__") for t in node.targets)
        return dunder or isinstance(node.value, ast.Name | ast.Attribute)
    # what needs an extra is handed on when it is asked for
    return isinstance(node, ast.FunctionDef) and node.name == "__getattr__"


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=name_of)
def test_init_only_hands_names_on(path: Path) -> None:
    work = [f"line {n.lineno}: {ast.unparse(n)}" for n in parsed(path).body if not only_hands_on(n)]
    assert not work, "\n".join(work)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_library_does_not_print_and_logs_under_its_name(path: Path) -> None:
    wrong: list[str] = []
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called == "print" and unit_of(path) != "app":
            wrong.append(f"line {node.lineno}: print")
        if called in {"logging.getLogger", "getLogger"}:
            name = ast.unparse(node.args[0]) if node.args else ""
            if name != "__name__" and not re.match(r"""['"]fisherfn(\.|['"])""", name):
                wrong.append(f"line {node.lineno}: logger {name or 'root'}")
        if re.fullmatch(r"logging\.(debug|info|warning|error|critical|exception|log)", called):
            wrong.append(f"line {node.lineno}: {called} logs under the root")
    assert not wrong, "\n".join(wrong)


def exported(module: types.ModuleType) -> list[str]:
    """List what a module offers: `__all__`, what `import x as x` hands on, or what it defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    path = Path(module.__file__ or "")
    if path.name == "__init__.py":
        imports = [n for n in parsed(path).body if isinstance(n, ast.ImportFrom)]
        return [a.name if a.asname is None else a.asname for n in imports for a in n.names]
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
    ]


def documented(thing: object) -> bool:
    doc = inspect.getdoc(thing) or ""
    generated = isinstance(thing, type) and doc.startswith(f"{thing.__name__}(")  # by @dataclass
    return bool(doc.strip()) and not generated


def test_every_public_name_is_documented() -> None:
    bare: list[str] = []
    namespaces: list[types.ModuleType] = [fisherfn]
    for namespace in namespaces:
        assert documented(namespace), f"{namespace.__name__} has no docstring"
        names = exported(namespace)
        assert names
        assert len(names) == len(set(names)), f"{namespace.__name__} names a thing twice"
        for name in names:
            thing = getattr(namespace, name)
            if isinstance(thing, types.ModuleType):
                namespaces.append(thing)
            elif callable(thing) and not documented(thing):
                bare.append(f"{namespace.__name__}.{name}")
    assert not bare, f"without docstring: {bare}"


def test_import_is_light(tmp_path: Path) -> None:
    script = (
        "import json, sys, time, torch\n"
        "start = time.process_time()\n"  # unlike the clock, the same on a busy machine
        "import fisherfn\n"
        "seconds = time.process_time() - start\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(json.dumps([seconds, loaded]))\n"
    )
    best = float("inf")
    # bytecode is what users import; some machines forbid to write it beside the source
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    for _ in range(5):  # caches may be cold: what counts is the best of five
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        seconds, loaded = json.loads(done.stdout)
        assert not loaded, f"`import fisherfn` loads {loaded}"
        best = min(best, seconds)
        if best <= MAX_IMPORT_SECONDS:
            break
    assert best <= MAX_IMPORT_SECONDS


def test_testing_is_there_when_it_is_asked_for() -> None:
    import fisherfn as ff

    assert ff.testing.assert_close
    with pytest.raises(AttributeError, match="module 'fisherfn' has no attribute 'nothing'"):
        _ = ff.nothing
