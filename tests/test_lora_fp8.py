"""A pool in fp8: served tokens and logprobs are those of plain transformers with the rounded experts."""

import json
import shutil
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from engines import assert_greedy_equals, completion, engine, greedy, load_reference, make_pair
from loras import (
    FEW,
    LORAS,
    MIXTURES,
    PROMPTS,
    Served,
    engine_config,
    fuse_as_on_a_gpu,
    make_lora,
    manager_of,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry
from vllm.platforms import current_platform
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.fp8 import round_pair, widened
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.serving import manager as managers
from vllm_adafuse.serving.fits import in_fp8
from vllm_adafuse.serving.page_bank import Packer
from vllm_adafuse.serving.projections import Shard

OPTION = {"adafuse": {"lora_dtype": "fp8"}}
TOGETHER = ["base", "mix", "mix8", "few", "third"]


def rounded(path, base):
    """A copy of an adapter beside it, whose experts are those that fp8 leaves; its reference."""
    left = path.with_name(f"{path.name}-rounded")
    shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(path, left)
    file = left / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".lora_A" in name]:
        b = name.replace(".lora_A", ".lora_B")
        tensors[name], tensors[b] = map(torch.Tensor.contiguous, widened(tensors[name], tensors[b]))
    save_file(tensors, file, {"format": "pt"})
    if "num_experts" in json.loads((left / "adapter_config.json").read_text()):
        return load_reference(base, left)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, left).eval()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root, said = tmp_path_factory.mktemp("fp8"), []
    base, _ = make_pair(root, num_experts=2, r=2)
    references = {"base": AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()}
    for name in ("mix", "mix8"):
        make_random_adapter(base, root / name, **{"dtype": torch.float32} | MIXTURES[name])
    for seed, name in enumerate(("few", "third", "other")):
        make_lora(base, root / name, seed, **LORAS.get(name, FEW))
    references |= {name: rounded(root / name, base) for name in [*TOGETHER[1:], "other"]}
    options = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 128, "additional_config": OPTION}
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        fuse_as_on_a_gpu(patch)
        patch.setattr(managers.logger, "info", lambda text, *of: said.append(text % of))
        llm = stack.enter_context(engine(base, max_num_batched_tokens=256, **options))
        served = Served(llm, root, references, [*TOGETHER, "other"], True)
        served.said, served.base = said, base
        yield served


def test_one_batch_of_base_mixtures_and_loras(served):
    outputs = served.generate(TOGETHER)
    served.check(TOGETHER, outputs)
    said = [[completion(o)[0] for o in outputs[i :: len(TOGETHER)]] for i in range(len(TOGETHER))]
    assert all(said.count(one) == 1 for one in said)


def test_the_pool_takes_half(served):
    banks = manager_of(served.llm).banks
    assert all(bank.fp8 and bank.is_fused for bank in banks)
    numbers = sum(bank.lora_a.numel() + bank.lora_b.numel() for bank in banks)
    factors = sum(4 * bank.lora_scale.numel() for bank in banks)
    taken = sum(bank.nbytes for bank in banks)
    assert taken == numbers + factors and factors < numbers / 16
    (line,) = [line for line in served.said if "on a pool of 32 pages" in line]
    assert f": {taken} bytes in fp8, and" in line
    # A x is in the model's dtype.
    needed = max(64 * bank.lora_scale.numel() * 4 for bank in banks)
    assert banks[0].step.workspace.lora_a_out.numel() >= needed
    # Memory of a bank: W, and not twice that of its experts.
    bank = banks[0]
    used = bank.fused_weight.untyped_storage().nbytes() - bank.fused_weight.nbytes
    assert used < 1.1 * bank.nbytes + 512


def test_an_adapter_that_is_replaced_is_rounded_anew(served):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(served.root / "other" / name, served.root / "few" / name)
    again = served.llm.generate(
        PROMPTS[:4], lora_request=served.request("few", load_inplace=True), use_tqdm=False,
        sampling_params=greedy(),
    )  # fmt: skip
    assert_greedy_equals(again, served.references["other"])


def test_pages_that_are_given_up_hold_no_factor(served):
    served.generate(["third"], PROMPTS[:1])
    manager = manager_of(served.llm)
    place = list(manager.pool.placed[served.request("third").lora_int_id].pages)
    bank = next(b for b in manager.banks if len(b.names) == 3)
    assert (bank.lora_scale[:, place] > 0).all()
    bank.write(torch.tensor(place), None)
    for of in (bank.lora_scale, bank.lora_a.float(), bank.lora_b.float()):
        assert (of[:, place] == 0).all()


def test_ranks_that_share_a_linear_round_alike():
    """By the largest numbers of all of it, of which a rank may have none."""
    a, b = torch.randn(2, 20, 12), torch.randn(2, 8, 20)
    a[:, :, 0], b[:, 7] = 100.0, 100.0
    whole_a, whole_b, scale = round_pair(a, b)
    e4m3 = {"dtype": torch.float8_e4m3fn}
    for part, inputs in ((0, slice(6, 12)), (4, slice(0, 6))):
        bank = SimpleNamespace(
            fp8=True, names=["q"], linear_shards=[[Shard(8, part, 4)]], input_slice=inputs,
            lora_a=torch.zeros(1, 9, 16, 6, **e4m3), lora_b=torch.zeros(4, 9, 16, **e4m3),
        )  # fmt: skip
        packer = Packer([bank], [1, 3], 5)
        packer.add("q", 0, a, b)
        (packed,) = packer.packed
        of_a = packed.a[0, 1:].view(torch.float8_e4m3fn).view(2, 32, 6)[:, :20]
        of_b = packed.b[:, 1:].view(torch.float8_e4m3fn).view(4, 2, 32)[..., :20].transpose(0, 1)
        assert torch.equal(of_a.float(), whole_a[..., inputs].float())
        assert torch.equal(of_b.float(), whole_b[:, part : part + 4].float())
        assert torch.equal(packed.scale[0, 1:].view(2, 32)[:, :20], scale)
        assert (packed.scale[0, 0] == 0).all() and packed.nbytes == 5 * 16 * (6 + 4 + 4)


def refusal(model, **options):
    with pytest.raises(AdapterError) as error:
        in_fp8(engine_config(model, **options))
    return str(error.value)


def test_what_cannot_be_in_fp8_is_refused_with_the_way_out(monkeypatch):
    model = SimpleNamespace(hf_config=SimpleNamespace(), dtype=torch.bfloat16)
    fine, wanted = {}, {"lora_dtype": "fp8"}
    assert not in_fp8(engine_config(model, **fine)) and in_fp8(engine_config(model, **wanted))
    assert in_fp8(engine_config(model, lora="both", **wanted))
    assert "without `adafuse.lora` \"vllm\"" in refusal(model, lora="vllm", **wanted)
    model.dtype = torch.float16
    assert "the model is in float16" in refusal(model, **wanted)
    assert "--dtype bfloat16" in refusal(model, **wanted)
    model = SimpleNamespace(hf_config=SimpleNamespace(adafuse={"adapter": "x"}), dtype=torch.float32)
    assert "name it by --lora-modules" in refusal(model, **wanted)
    model.hf_config = SimpleNamespace()
    for is_cuda, capability, taken in ((True, 80, False), (False, 90, False), (True, 89, True)):
        monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
        monkeypatch.setattr(type(current_platform), "is_cuda", lambda self, c=is_cuda: c)
        monkeypatch.setattr(
            type(current_platform), "has_device_capability", lambda self, n, c=capability: n <= c
        )
        if taken:
            assert in_fp8(engine_config(model, **wanted))
        else:
            assert "compute capability 8.9" in refusal(model, **wanted)


@pytest.mark.parametrize("pinned", [True, False])
def test_an_engine_is_refused_before_it_starts(served, pinned, monkeypatch):
    # vLLM asks a process of its own about a class, lest CUDA start in this one.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda inspect: inspect())
    options = {"hf_overrides": {"adafuse_adapter": str(served.root / "mix")}} if pinned else {}
    args = EngineArgs(str(served.base), additional_config=OPTION, **options)
    with pytest.raises(AdapterError, match="serve with --enable-lora") as error:
        args.create_engine_config()
    assert ("an adapter that is everybody's" in str(error.value)) == pinned
    args.additional_config = {"adafuse": {"lora_dtype": "int4"}}
    with pytest.raises(AdapterError, match='expected one of "auto", "fp8"'):
        args.create_engine_config()
