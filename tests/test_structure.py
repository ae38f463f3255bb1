"""What the tree promises its readers, held by its syntax: few arguments, one place for limits, imports that
point down, one place that changes vLLM's modules, one that knows its versions."""

import ast
import re
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
    "tuning": {"format", "kernels", "explain"},
    "serving": {"format", "kernels", "convert"},
    "patches": {"format", "serving"},
}
# Attributes of vLLM's modules that make them compute something else when they are assigned. `patches`
# replaces functions and methods of vLLM's classes, which is another thing; `offline`, `training` and
# `experts` change models of transformers, and import no vLLM.
WRAP = "vllm_adafuse/serving/wrap/"
CHANGED = {
    "quant_method", "act_fn", "rotary_emb", "data", "weight", "bias", "forward", "reload_adapter",
    "do_kv_cache_update", "requires_unquantized_input", "make_empty_intermediate_tensors",
}  # fmt: skip
CHANGES = re.compile(r"register_\w*hook|(add|register)_module|setattr")
TRANSFORMERS = ("vllm_adafuse/offline/", "vllm_adafuse/training/", "vllm_adafuse/experts/")
# What modules of some families and kinds lack; every other look whether something is there asks
# which vLLM this is.
API = "vllm_adafuse/serving/vllm_api.py"
LACKED = {
    "act_fn", "attn", "bias", "down_proj", "full_weight_stacked", "gate_up_proj", "model", "pooler",
    "qk_norm", "qkv_proj", "quant_method", "rotary_emb", "sharded_to_full_mapping_gpu",
    "token_mapping_meta",
}  # fmt: skip
# Numbers of tokens by these names; what `len(x)` or `x.shape[0]` is compared with, too.
TOKENS = {"tokens", "num_tokens", "n_tokens", "max_tokens"}
COUNTS = {f"{of}.shape[{at}]" for of in ("x", "y", "hidden") for at in (0, -2)} | {"len(x)", "len(y)"}


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
        counted = names & TOKENS or any(ast.unparse(side) in COUNTS for side in sides)
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


def changes_modules(tree: ast.Module) -> list[str]:
    """What a file does to modules that are not its own."""
    found = []
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        for target in [t for group in targets for t in ast.walk(group)]:
            if (
                isinstance(target, ast.Attribute)
                and isinstance(target.ctx, ast.Store)
                and (target.attr in CHANGED or target.attr.startswith("adafuse_"))
                and ast.unparse(target.value) != "self"
            ):
                found.append(ast.unparse(target))
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            if CHANGES.fullmatch(name) and not ast.unparse(node).startswith("self."):
                found.append(ast.unparse(node.func))
    return found


def asks_for_versions(tree: ast.Module) -> list[str]:
    """Where a file asks which vLLM it meets."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            caught = " ".join(ast.unparse(h.type) for h in node.handlers if h.type)
            if re.search("ImportError|ModuleNotFoundError|AttributeError", caught):
                found.append(f"except {caught}")
        elif isinstance(node, (ast.Name, ast.Attribute, ast.alias)):
            name = getattr(node, "id", None) or getattr(node, "attr", None) or node.name
            if name in ("vllm_version", "importlib.metadata", "__version_tuple__"):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr"):
            name, asks = node.args[1], len(node.args) == 3 or ast.unparse(node.func) == "hasattr"
            told = name.value if isinstance(name, ast.Constant) else ""
            ours = told.startswith("adafuse_") or told == "reload_adapter"
            of_transformers = ast.unparse(node.args[0]).endswith("hf_config")
            if asks and not ours and not of_transformers and told not in LACKED:
                found.append(ast.unparse(node))
    return found


def test_wrap_alone_changes_modules():
    wrong, places = {}, set()
    for name, tree in trees("kernels", "vllm_adafuse"):
        if name.startswith(WRAP):
            places |= {change.rpartition(".")[2] for change in changes_modules(tree)}
        elif name.startswith(TRANSFORMERS):
            assert "import vllm\n" not in (text := ast.unparse(tree)) and "from vllm." not in text
        elif found := changes_modules(tree):
            wrong[name] = found
    assert wrong == {}
    assert {"quant_method", "act_fn", "rotary_emb", "data", "do_kv_cache_update"} <= places


def test_vllm_api_alone_knows_versions():
    wrong = {
        name: found
        for name, tree in trees("vllm_adafuse/serving")
        if name != API and (found := asks_for_versions(tree))
    }
    assert wrong == {}


@pytest.mark.parametrize("package", ["format", "offline", "serving", "serving/wrap"])
def test_a_package_says_what_each_of_its_files_is_for(package):
    folder = ROOT / "vllm_adafuse" / package
    told = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
    names = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
    assert names and sorted(name for name in names if name not in told) == []


def test_faults_are_seen():
    tree = ast.parse(
        "def f(a, b, c, d, e, f, g, h, i, *, j=1): return 1 if tokens > 64 else 0\n"
        "@triton.jit\ndef k(a, b, c, d, e, f, g, h, i): return n_tokens > 4\n"
        "def few(x): return 64 <= x.shape[0] or len(x) < 9 or tokens > LIMIT or 1 <= tokens\n"
    )
    assert imported(ast.parse("from vllm_adafuse.serving.bank import x")) == {"serving"}
    assert imported(ast.parse("from vllm_adafuse import tuning, __version__")) == {"tuning"}
    assert imported(ast.parse("def f():\n    import vllm_adafuse.cli.tokens")) == {"cli"}
    tree_of_faults = ast.parse(
        "layer.quant_method = a\nself.quant_method = a\nx.weight.data, y = b, c\n"
        "setattr(owner, name, norm)\nlayer.register_forward_pre_hook(f)\nmodel.adafuse_step = s\n"
        "self.register_buffer('x', y)\nsetattr(self, 'y', z)\n"
    )
    assert sorted(changes_modules(tree_of_faults)) == [
        "layer.quant_method", "layer.register_forward_pre_hook", "model.adafuse_step", "setattr",
        "setattr", "x.weight.data",
    ]  # fmt: skip
    assert asks_for_versions(ast.parse(
        "try:\n    from vllm.new import f\nexcept ImportError:\n    f = None\n"
        "hasattr(runner, 'lora_state')\ngetattr(attention, 'scales', False)\n"
        "getattr(block, 'act_fn', None)\nhasattr(layer, 'adafuse_bank')\ngetattr(layer, name)\n"
    )) == [
        "except ImportError", "hasattr(runner, 'lora_state')", "getattr(attention, 'scales', False)",
    ]  # fmt: skip
    assert long_functions(tree) == {"f"}
    assert literal_limits(tree) == ["1: tokens > 64", "4: 64 <= x.shape[0]", "4: len(x) < 9"]
