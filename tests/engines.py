"""vLLM engines in the test's process, tiny backbones, and the comparison with the reference."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.offline import reference
from vllm_adafuse.tiny import make_tiny_backbone

MAX_LOGPROB_ERROR = 1e-3
# Logprobs closer than this are a tie, which rounding decides: otherwise on another CPU, in steps of
# other sizes, with other threads.
TIE = 1e-4

_alive: list[object] = []  # engines of this process


@contextmanager
def quick_collections():
    """What was there before an engine is no garbage: vLLM collects nine times from start to end, and
    each time would walk through all modules. It may freeze nothing itself meanwhile, what it made
    must go at its end, and nothing that is frozen here may thaw."""
    if not _alive:  # else the other engine would be frozen, and never freed
        gc.collect()
        gc.freeze()
    with patch.multiple(gc, freeze=lambda: None, unfreeze=lambda: None):
        yield


@contextmanager
def engine(base: Path, adapter: Path | None = None, **options):
    """A vLLM engine; its distributed state is torn down at the end."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.models import registry

    options = {
        "gpu_memory_utilization": 0.2,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 256,
        "seed": 0,
    } | options
    if adapter is not None:
        options["hf_overrides"] = {"adafuse_adapter": str(adapter)}
    with quick_collections():
        if torch.cuda.is_available():
            llm = LLM(str(base), **options)
        else:  # vLLM asks a process of its own about a class, lest CUDA start in this one: 10 s each
            with patch.object(registry, "_run_in_subprocess", lambda inspect: inspect()):
                llm = LLM(str(base), **options)
        _alive.append(key := object())
        try:
            yield llm
        finally:
            _alive.remove(key)
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()


def make_pair(root: Path, architecture="LlamaForCausalLM", config=None, **adapter) -> tuple:
    """A tiny backbone and a random float32 adapter under `root`: (base, adapter)."""
    base = make_tiny_backbone(root / "base", architecture, **config or {})
    adapter = {"num_experts": 4, "top_k": 2, "r": 4, "dtype": torch.float32} | adapter
    return base, make_random_adapter(base, root / "adapter", **adapter)


def greedy(max_tokens: int = 12, **options):
    from vllm import SamplingParams

    defaults = {"temperature": 0, "max_tokens": max_tokens, "logprobs": 1, "ignore_eos": True}
    return SamplingParams(**defaults | options)


def completion(output) -> tuple[list[int], list[float]]:
    """Tokens of a request's first sequence and their logprobs."""
    sequence = output.outputs[0]
    tokens = list(sequence.token_ids)
    return tokens, [at[token].logprob for token, at in zip(tokens, sequence.logprobs)]


@torch.no_grad()
def logprobs_of(model, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [len(tokens), V] that a Hugging Face model gives at each of `tokens`."""
    logits = model(torch.tensor([prompt + tokens], device=model.device)).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1].float(), -1).cpu()


def assert_greedy_tokens(model, prompt: list[int], tokens: list[int], about="") -> torch.Tensor:
    """Every token is the model's own greedy choice after the tokens before it, or ties with it.

    Returns their logprobs [len(tokens)].
    """
    expected = logprobs_of(model, prompt, tokens)
    chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    lost = (expected.amax(-1) - chosen).tolist()
    assert max(lost) <= TIE, (about, tokens, expected.argmax(-1).tolist())
    return chosen


def assert_greedy_equals(outputs, model) -> None:
    """Every token is the model's own greedy choice after the tokens before it, logprobs agree."""
    worst = 0.0
    for output in outputs:
        tokens, logprobs = completion(output)
        expected = assert_greedy_tokens(model, output.prompt_token_ids, tokens, output.prompt)
        worst = max(worst, (torch.tensor(logprobs) - expected).abs().max().item())
    assert worst <= MAX_LOGPROB_ERROR


def assert_logprobs_equal(output, model) -> None:
    """Of every sequence of a request the logprobs are the model's own, whatever was drawn."""
    for sequence in output.outputs:
        tokens = list(sequence.token_ids)
        expected = logprobs_of(model, output.prompt_token_ids, tokens)
        expected = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        found = torch.tensor([at[t].logprob for t, at in zip(tokens, sequence.logprobs)])
        torch.testing.assert_close(found, expected, rtol=0, atol=MAX_LOGPROB_ERROR)


def assert_best_beam(output, model, prompt: list[int], max_tokens: int) -> None:
    """The best of a beam search of width 3 is the one that transformers finds."""
    ids = torch.tensor([prompt])
    expected = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=3, do_sample=False,
        max_new_tokens=max_tokens, eos_token_id=None, pad_token_id=1, use_cache=False,
    )  # fmt: skip
    assert output.sequences[0].tokens == expected[0].tolist()


def assert_same_completions(outputs, others, tolerance: float = 1e-4) -> None:
    """Greedy tokens that begin alike, as far as the other's go, and logprobs within a tolerance.

    In one of the pairs tokens may part where two are equally likely: after it nothing is compared.
    """
    parted = 0
    for one, other in zip(outputs, others, strict=True):
        (tokens, logprobs), (other_tokens, other_logprobs) = completion(one), completion(other)
        assert len(tokens) >= len(other_tokens), one.prompt
        for at, (a, b) in enumerate(zip(logprobs, other_logprobs)):
            assert abs(a - b) <= tolerance, (one.prompt, at, tokens, other_tokens)
            if tokens[at] != other_tokens[at]:
                parted += 1
                break
    assert parted <= 1


def load_reference(base: Path, adapter: Path, **options):
    return reference.load(base, adapter, **{"dtype": torch.float32} | options)
