"""No code of a model or adapter ever runs: every call says so, and a file that it would write stays
away."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from test_hostile import Runner, make_lora
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.tiny import make_tiny_backbone

ROOT = Path(__file__).parents[1]
FOLDERS = ("vllm_adafuse", "kernels", "patches", "benchmarks")
# What loads a config, a model or a tokenizer by a name or path, of transformers or vLLM.
LOADERS = ("from_pretrained", "from_config", "get_config", "get_tokenizer", "pipeline")
# Of ours, and of PEFT, which is given a model that is there already.
OTHERS = ("AdaFuseModel", "PeftModel", "SwitchRuntime", "MixLoraConfig", "llm")


def loading_calls(source: str) -> list[ast.Call]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        call
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in LOADERS
        and ast.unparse(call.func.value) not in OTHERS
    ]


def trusts(call: ast.Call) -> bool:
    said = [k.value for k in call.keywords if k.arg == "trust_remote_code"]
    return not (len(said) == 1 and isinstance(said[0], ast.Constant) and said[0].value is False)


def test_every_call_says_that_it_trusts_no_code():
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    calls = [(file, call) for file in files for call in loading_calls(file.read_text("utf-8"))]
    assert len(calls) >= 10
    found = [f"{file}:{call.lineno}" for file, call in calls if trusts(call)]
    assert not found, f"without trust_remote_code=False: {found}"


def test_nothing_switches_trust_on():
    """Not by an option either, nor on what vLLM is told."""
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text("utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                    assert ast.unparse(node.value) == "False", (file, node.value.lineno)
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert "--trust-remote-code" not in node.value.split(), (file, node.lineno)


@pytest.mark.parametrize(
    "call, expected",
    [
        ("AutoConfig.from_pretrained(p)", True),
        ("AutoConfig\\\n  .from_pretrained(\n p, trust_remote_code=x)", True),
        ("AutoConfig.from_pretrained(p, **{'trust_remote_code': False})", True),
        ("AutoConfig.from_pretrained(p, trust_remote_code=False)", False),
    ],
)
def test_the_test_sees_calls(call, expected):
    (found,) = loading_calls(call)
    assert trusts(found) == expected


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("no_code")
    base = make_tiny_backbone(root / "base", "LlamaForCausalLM")
    make_random_adapter(base, root / "adapter", num_experts=2, r=2, dtype=torch.float32)
    make_random_adapter(
        base, root / "wise", num_experts=2, r=2, routing="layer_wise", dtype=torch.float32
    )
    make_lora(base, root / "lora")
    lines = [{"text": f"hello there, {i} words to train on"} for i in range(20)]
    chats = [
        {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(20)
    ]
    for name, made in (("data", lines), ("chat", chats)):
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, made)))
    return root


@pytest.fixture(scope="module")
def runner(place):
    runner = Runner(place / "adapter")
    yield runner
    runner.process.stdin.close()
    runner.process.wait()


CODE = """
open({marker!r}, "a").write(__name__)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class C(LlamaConfig):
    model_type = {model_type!r}
class T(PreTrainedTokenizerFast):
    pass
class M(LlamaForCausalLM):
    config_class = C
"""
MAPS = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
TOKENIZER = {"AutoTokenizer": ["evil.T", "evil.T"]}


def change(file: Path, **keys) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def another_type(base: Path) -> None:
    change(base / "config.json", model_type="evil", auto_map=MAPS)


def known_type(base: Path) -> None:
    change(base / "config.json", auto_map=MAPS)


def tokenizer(base: Path) -> None:
    change(base / "config.json", auto_map=TOKENIZER)
    change(base / "tokenizer_config.json", auto_map=TOKENIZER, tokenizer_class="T")


def kernel(base: Path) -> None:
    """transformers gets an attention of that name from a hub."""
    change(base / "config.json", attn_implementation="evil/kernel")


def template(base: Path) -> None:
    """Jinja that leads to Python's own classes, were it not for the sandbox."""
    marker = base.parent / "marker"
    change(
        base / "tokenizer_config.json",
        chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"
        f"{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}}",
    )


EVIL = {f.__name__: f for f in (another_type, known_type, tokenizer, kernel, template)}


@pytest.mark.parametrize("answers", ["", "y\n" * 20], ids=["closed", "yes"])
@pytest.mark.parametrize("evil", EVIL.values(), ids=EVIL)
def test_code_beside_a_backbone_never_runs(runner, place, tmp_path, evil, answers):
    """The backbone lies inside the adapter, which names it."""
    marker, data = tmp_path / "marker", place / "data.jsonl"
    adapter, wise = (
        Path(shutil.copytree(place / name, tmp_path / name)) for name in ("adapter", "wise")
    )
    base = Path(shutil.copytree(place / "base", tmp_path / "base"))
    model_type = "evil" if evil is another_type else "llama"
    (base / "evil.py").write_text(CODE.format(marker=str(marker), model_type=model_type))
    evil(base)
    for path in (adapter, wise):
        change(path / "adapter_config.json", base_model_name_or_path="../base")
    chat = place / "chat.jsonl" if evil is template else data
    texts = ("--data", chat, "--output")
    commands = {
        "check": (adapter,),
        "inspect": (adapter,),
        "route": (adapter, "--text", "hello you"),
        "merge": (adapter, "--experts", "0", "OUT"),
        "compose": (base, adapter, "OUT"),
        "random": (base, "OUT"),
        "convert": (place / "lora", "OUT", "--base", base),
    }
    if answers:  # these take seconds
        short = ("--length", "16", "--steps", "1", *texts, "OUT")
        commands |= {"train": ("--base", base, *short), "distill": (wise, *short)}
    for name, argv in commands.items():
        out = tmp_path / name
        done = runner(name, *(out if part == "OUT" else part for part in argv), answers=answers)
        assert not marker.exists(), (name, marker.read_text())
        assert done["code"] in (0, 1), (name, done)
        if name == "check" and evil is not another_type:  # all else is a usual backbone's
            assert done["code"] == 0, done
        assert "Traceback" not in done["text"] and "[y/N]" not in done["text"], (name, done["text"])
        assert len(done["text"]) < 6000, done["text"]


def model_config(base: Path, adapter: Path, **options):
    from vllm.engine.arg_utils import EngineArgs

    overrides = {"adafuse_adapter": str(adapter)}
    arguments = EngineArgs(str(base), hf_overrides=overrides, dtype="float32", **options)
    return arguments.create_model_config()


def evil_adapter(place: Path, path: Path) -> Path:
    """An adapter that names a backbone inside it, with code of its own and beside it."""
    shutil.copytree(place / "adapter", path)
    evil = Path(shutil.copytree(place / "base", path / "evil"))
    change(path / "adapter_config.json", base_model_name_or_path="evil")
    shutil.copy(evil / "config.json", path / "config.json")
    shutil.copy(evil / "tokenizer_config.json", path / "tokenizer_config.json")
    for folder in (path, evil):
        code = CODE.format(marker=str(path / "marker"), model_type="llama")
        (folder / "evil.py").write_text(code)
        change(folder / "config.json", auto_map=MAPS | TOKENIZER)
        change(folder / "tokenizer_config.json", auto_map=TOKENIZER, tokenizer_class="T")
    return path


@pytest.mark.parametrize("trust", [False, True])
def test_serving_runs_nothing_beside_the_adapter(place, tmp_path, trust):
    """Also where the user trusts the backbone's code."""
    from vllm.tokenizers import get_tokenizer

    adapter = evil_adapter(place, tmp_path / "adapter")
    made = model_config(place / "base", adapter, trust_remote_code=trust)
    assert made.trust_remote_code is trust
    assert made.hf_config.architectures == ["AdaFuseLlamaForCausalLM"]
    get_tokenizer(made.tokenizer, trust_remote_code=made.trust_remote_code)
    assert not (adapter / "marker").exists()


def test_a_backbone_whose_code_the_user_trusts_is_served(place, tmp_path):
    """vLLM has run it; here its config is read as one of transformers' own class."""
    base = Path(shutil.copytree(place / "base", tmp_path / "base"))
    (base / "evil.py").write_text(CODE.format(marker=str(tmp_path / "marker"), model_type="llama"))
    change(base / "config.json", auto_map={"AutoConfig": "evil.C"})
    adapter = evil_adapter(place, tmp_path / "adapter")
    made = model_config(base, adapter, trust_remote_code=True)
    assert type(made.hf_config).__module__.startswith("transformers_modules")
    assert made.hf_config.architectures == ["AdaFuseLlamaForCausalLM"]
    assert (tmp_path / "marker").exists() and not (adapter / "marker").exists()


def test_composing_takes_no_code_of_the_adapter(place, tmp_path):
    from vllm_adafuse.format.compose import compose

    adapter = evil_adapter(place, tmp_path / "adapter")
    out = compose(place / "base", adapter, tmp_path / "out")
    assert not list(out.rglob("evil*"))
    assert sorted(f.name for f in (out / "adafuse").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
