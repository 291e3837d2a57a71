"""The shape of the code base: imports run one way, files stay small, nothing is a drawer for everything."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "ops",
    "models",
    "matchers",
    "losses",
    "datasets",
    "engine",
    "analysis",
    "experiments",
    "tools",
    "benchmarks",
)
MODULES = ("main", "config", "schema", "strict_yaml", "former_keys", "structures")
ALLOWED = {
    "structures": set(),
    "ops": {"structures"},
    "models": {"structures", "ops"},
    "matchers": {"structures", "ops"},
    "datasets": {"structures", "ops"},
    "losses": {"structures", "ops", "matchers"},
    "engine": {"structures", "ops"},
    "analysis": {"structures", "ops", "engine"},
    "experiments": {"structures", "strict_yaml", "ops", "engine", "analysis"},
    "tools": {*PACKAGES, *MODULES} - {"benchmarks"},
    "schema": set(),
    "strict_yaml": {"schema"},
    "former_keys": set(),
    "config": {
        "structures",
        "schema",
        "strict_yaml",
        "former_keys",
        "ops",
        "models",
        "matchers",
        "losses",
        "datasets",
        "engine",
    },
}
SOURCES = [ROOT / f"{name}.py" for name in MODULES] + sorted(
    p for name in PACKAGES for p in (ROOT / name).rglob("*.py")
)


def part(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names & ({*PACKAGES, *MODULES})


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_imports_run_one_way(path):
    own = part(path)
    if own in ALLOWED:
        foreign = imported(ast.parse(path.read_text())) - ALLOWED[own] - {own}
        assert not foreign, f"{path.name} imports {', '.join(sorted(foreign))}"


def test_only_main_and_tools_import_config():
    users = {part(path) for path in SOURCES if "config" in imported(ast.parse(path.read_text()))}
    assert users <= {"main", "tools", "benchmarks"}


def test_structures_import_torch_only():
    tree = ast.parse((ROOT / "structures.py").read_text())
    modules = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    modules |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert modules <= {"torch", "typing", "collections", "__future__"}


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 320, "split the file"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= 70, f"{node.name} has {length} lines"


def test_no_drawer_for_everything():
    assert not [p for p in SOURCES if p.stem in ("utils", "util", "misc", "helpers", "common")]


def test_commands_run_where_docstrings_are_stripped():
    """As by ``python -OO``: whoever calls a method of one fails."""
    for path in sorted((ROOT / "tools").glob("*.py")):
        users = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        assert not [node for node in users if isinstance(node.value, ast.Name) and node.value.id == "__doc__"], (
            path.name
        )
