"""What the tree promises its readers, held by its syntax: few arguments, one place for limits,
imports that point down."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_ARGUMENTS = 8
# Which of our packages each may import, besides itself and the leaves `errors` and `text`. What is
# not named here (commands, demo, benchmarks' helpers) stands above and may import all.
BELOW = {
    "errors": set(),
    "text": set(),
    "format": set(),
    "kernels": set(),
    "convert": {"format"},
    "offline": {"format", "kernels"},
    "experts": {"format", "convert", "training"},
    "training": {"format", "offline"},
    "explain": {"format", "kernels"},
    "tuning": {"format", "kernels"},
    "serving": {"format", "kernels", "convert", "compat"},
    "patches": {"format", "serving"},
}
# Numbers of tokens by these names; what `len(x)` or `x.shape[0]` is compared with, too.
TOKENS = {"tokens", "num_tokens"}


def trees(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text("utf-8"))


def is_device_code(function: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def arguments(function: ast.FunctionDef) -> list[str]:
    a = function.args
    names = [argument.arg for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def long_functions(tree: ast.Module) -> set[str]:
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and not is_device_code(node)
        and len(arguments(node)) > MAX_ARGUMENTS
    }


def literal_limits(tree: ast.Module) -> list[str]:
    """Comparisons of a number of tokens with a number above one."""
    device = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and is_device_code(n)]
    inside = {id(node) for function in device for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare) or id(node) in inside:
            continue
        sides = [node.left, *node.comparators]
        names = {n.id for side in sides for n in ast.walk(side) if isinstance(n, ast.Name)}
        counted = names & TOKENS or any(ast.unparse(side) == "x.shape[0]" for side in sides)
        numbers = [s.value for s in sides if isinstance(s, ast.Constant)]
        if counted and any(type(n) is int and n > 1 for n in numbers):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_host_functions_take_few_arguments():
    found = {name: set(long) for name, tree in trees("kernels", "vllm_adafuse")
             if (long := long_functions(tree))}  # fmt: skip
    assert found == {}


@pytest.mark.parametrize("folder", ["kernels", "vllm_adafuse"])
def test_limits_on_tokens_stand_in_dispatch(folder):
    found = {name: limits for name, tree in trees(folder) if (limits := literal_limits(tree))}
    assert found == {}


def ours(name: str) -> str:
    """The package, or module on top, of ours that a file or an imported module belongs to."""
    parts = name.removesuffix(".py").replace("/", ".").split(".")
    return parts[1] if parts[0] == "vllm_adafuse" and len(parts) > 1 else parts[0]


def imported(tree: ast.Module) -> set[str]:
    """The packages of ours that a file imports, at its top or later."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "vllm_adafuse":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm_adafuse."):
            found.add(ours(node.module))
        elif isinstance(node, ast.Import):
            found |= {ours(a.name) for a in node.names if a.name.startswith("vllm_adafuse.")}
    return found - {"__version__"}


def test_imports_point_down():
    wrong = {
        name: upward
        for name, tree in trees("kernels", "patches", "vllm_adafuse")
        if ours(name) in BELOW
        and (upward := imported(tree) - BELOW[ours(name)] - {ours(name), "errors", "text"})
    }
    assert wrong == {}


def test_faults_are_seen():
    tree = ast.parse(
        "def f(a, b, c, d, e, f, g, h, i, *, j=1): return 1 if tokens > 64 else 0\n"
        "@triton.jit\ndef k(a, b, c, d, e, f, g, h, i): return n_tokens > 4\n"
        "def few(x): return 64 <= x.shape[0] or tokens > LIMIT or 1 <= tokens\n"
    )
    assert imported(ast.parse("from vllm_adafuse.serving.bank import x")) == {"serving"}
    assert imported(ast.parse("from vllm_adafuse import tuning, __version__")) == {"tuning"}
    assert imported(ast.parse("def f():\n    import vllm_adafuse.cli.tokens")) == {"cli"}
    assert long_functions(tree) == {"f"}
    assert literal_limits(tree) == ["1: tokens > 64", "4: 64 <= x.shape[0]"]
