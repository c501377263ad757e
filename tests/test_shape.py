"""The house keeps its shape: imports point one way, the web side is free of torch, files and functions stay small."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "textmill"
GENERATED = {SOURCE / "wire" / "engine_pb2.py"}
FILES = sorted(set(SOURCE.rglob("*.py")) - GENERATED)
FALLBACK = SOURCE / "runner" / "hub_model.py"  # imports it when it is needed
LONGEST_FUNCTION = 60
LONGEST_FILE = 400

# A part may import parts of lower rank, itself, and what everybody may import.
RANK = {
    "__main__": 11,
    "cli": 10,
    "api": 9,
    "bench": 9,
    "wire": 8,
    "engine": 7,
    "runner": 6,
    "speculate": 5,
    "lora": 5,
    "models": 5,
    "layers": 4,
    "text": 3,
    "images": 3,
    "weights": 2,
    "attention": 1,
    "quant": 1,
    "parallel": 1,
    "sampling": 1,
    "kernels": 0,
    "_native": -1,
}
EVERYBODYS = {"core", "config", "errors", "observe"}
# Everything that a router, the launcher or the scheduler is made of. `wire.server` lives in the engine's process.
FREE_OF_TORCH = ("api", "cli", "config", "core", "engine", "errors", "observe", "text", "wire")
HEAVY = {"torch", "transformers", "triton"}
FAMILIES = re.compile(  # `llama3` is a value of `rope_type`, used by many families
    r"(?<![a-z])(llama(?!3(?![\d.]))|mistral|mixtral|qwen|gemma|phi[-_]?[1-4]|falcon|bloom|gpt[-_]?2|gpt[-_]?neox|opt[-_]1|mamba|"
    r"deepseek|starcoder|cohere|olmo|granite|smollm(?!2-135m)|chatml)"
)


def name_of(file: Path) -> str:
    """`textmill.cli.main` of its file."""
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


BY_NAME = {name_of(file): file for file in FILES}


def part_of(module: str) -> str:
    """`cli` of `textmill.cli.main`; nothing for the package itself."""
    return module.split(".")[1] if "." in module else ""


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The modules that the given nodes import; `from package import module` gives the module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in BY_NAME or inner == "textmill._native" else node.module


def at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: no function bodies, nothing under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from at_import_time(ast.Module(child.orelse, []))
            continue
        yield child
        yield from at_import_time(child)


def ids(files: list[Path]) -> list[str]:
    return [str(file.relative_to(SOURCE)) for file in files]


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_imports_point_one_way(file: Path) -> None:
    here = part_of(name_of(file))
    for module in imports(ast.walk(tree_of(file))):
        there = part_of(module)
        if not module.startswith("textmill.") or there in EVERYBODYS or there == here:
            continue
        assert here not in EVERYBODYS, f"{here} is imported by all and may not import {module}"
        assert RANK[there] < RANK[here], f"{here} may not import {module}"


@pytest.mark.parametrize("root", [name for name in BY_NAME if part_of(name) in FREE_OF_TORCH])
def test_nothing_heavy_is_imported_with(root: str) -> None:
    """Follows what is imported at import time, through our own modules."""
    seen, waiting = {root: root}, [root]
    while waiting:
        name = waiting.pop()
        for module in imports(at_import_time(tree_of(BY_NAME[name]))):
            path = f"{seen[name]} → {module}"
            assert module.split(".")[0] not in HEAVY, path
            if module in BY_NAME and module not in seen:
                seen[module] = path
                waiting.append(module)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("textmill.api.router", {"torch", "transformers", "PIL"}),
        ("textmill.wire.client", {"torch", "transformers"}),
        ("textmill.engine.engine", {"torch", "transformers", "grpc"}),
        ("textmill.weights.source", {"torch", "transformers"}),
        ("textmill.runner.native_executor", {"torch", "transformers", "grpc"}),
        ("textmill.models.llama", {"torch", "transformers"}),
        ("textmill.cli.launch", {"torch", "grpc", "starlette", "tokenizers", "huggingface_hub", "rich"}),
        ("textmill.cli.launcher", {"torch", "grpc", "starlette", "tokenizers", "huggingface_hub", "rich"}),
    ],
)
def test_a_real_import_brings_nothing_heavy(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_transformers_is_for_tests_and_the_fallback_only(file: Path) -> None:
    if file == FALLBACK:
        return
    assert not [module for module in imports(ast.walk(tree_of(file))) if module.split(".")[0] == "transformers"]


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_files_and_functions_are_small_and_say_what_they_promise(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.startswith('"""'), "the first line is a docstring"
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_a_broad_except_gives_its_reason(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.ExceptHandler) and is_broad(node) and not raises_again(node):
            near = [re.sub(r"#\s*noqa[:\sA-Z0-9]*", "#", line) for line in lines[node.lineno - 2 : node.lineno + 1]]
            assert any(re.search(r"#.*\w", line) for line in near), f"line {node.lineno}"


def is_broad(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or bool(
        {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} & {"Exception", "BaseException"}
    )


def raises_again(handler: ast.ExceptHandler) -> bool:
    """It only tidies up: its last statement is a bare `raise`."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_nothing_is_left_undone(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", text)
    assert "trust_remote_code=True" not in text.replace(" ", "")


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_family_names_stay_in_models_and_name_tables(file: Path) -> None:
    """Names and strings of the code count; comments and docstrings may give examples."""
    if part_of(name_of(file)) in ("models", "text", "weights"):
        return
    docstrings = {
        node.value.lineno
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for token in tokenize.generate_tokens(io.StringIO(file.read_text(encoding="utf-8")).readline):
        if token.type in (tokenize.NAME, tokenize.STRING) and token.start[0] not in docstrings:
            assert not FAMILIES.search(token.string.lower()), f"line {token.start[0]}: {token.string[:60]}"


def test_no_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "helpers", "misc", "common"}
    assert not [file for file in FILES if file.stem in drawers or file.parent.name in drawers]
