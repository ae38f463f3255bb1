"""The API of a real `vllm serve` process, asked by the official client, equals the reference."""

import asyncio
import json
import shutil
import socket
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import torch
from engines import (
    MAX_LOGPROB_ERROR,
    assert_greedy_equals,
    assert_greedy_tokens,
    assert_same_completions,
    load_reference,
    logprobs_of,
    make_pair,
)
from serve_forks import session_members
from transformers import AutoTokenizer, PreTrainedModel
from vllm_adafuse.format.compose import compose
from vllm_adafuse.server import Server, running_server, vllm_serve
from vllm_adafuse.tiny import real_prompts

MAX_MODEL_LEN, TOKENS = 256, 12
PROMPTS = real_prompts(64)
CHATS = [
    [{"role": "user", "content": "Which experts does this token need?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": PROMPTS[1]},
        {"role": "assistant", "content": "Why?"},
        {"role": "user", "content": "Because."},
    ],
]
IDS = {"return_token_ids": True}
GREEDY = {"max_tokens": TOKENS, "temperature": 0, "extra_body": IDS | {"ignore_eos": True}}
CPU = (
    f"--enforce-eager --dtype float32 --max-model-len {MAX_MODEL_LEN} --gpu-memory-utilization 0.2"
).split()


@dataclass(frozen=True)
class Served:
    server: Server
    name: str
    client: openai.OpenAI
    reference: PreTrainedModel
    tokenizer: object

    def complete(self, prompt, **options):
        options = GREEDY | {"logprobs": 1} | options
        return self.client.completions.create(model=self.name, prompt=prompt, **options)

    def chat(self, messages, **options):
        create = self.client.chat.completions.create
        return create(model=self.name, messages=messages, **GREEDY | options)

    def steps(self) -> float:
        """Steps that the engine has made."""
        with urllib.request.urlopen(f"{self.server.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        name = "vllm:iteration_tokens_total_count"
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def shared_memory(processes: list[int]) -> set[Path]:
    """Files of /dev/shm that processes have mapped."""
    lines = [line for pid in processes for line in Path(f"/proc/{pid}/maps").open()]
    return {Path(line.split(maxsplit=5)[5].strip()) for line in lines if "/dev/shm/" in line}


# One server after the other: pytest runs all tests of one parameter first.
@pytest.fixture(scope="module", params=["hf-overrides", "composed"])
def served(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    if request.param == "composed":
        options = {"seed": 1, "top_k": 3, "router_input": "embedding", "router_bias": True}
        base, adapter = make_pair(root, **options)
        model, flags = compose(base, adapter, root / "composed"), []
        reference = load_reference(base, adapter)
        shutil.rmtree(base), shutil.rmtree(adapter)  # the composed directory needs neither
    else:
        base, adapter = make_pair(root)
        model, flags = base, ["--hf-overrides", json.dumps({"adafuse_adapter": str(adapter)})]
        reference = load_reference(base, adapter)
    before, log = contents(model), tmp_path_factory.mktemp("log") / "serve.log"
    sockets = tmp_path_factory.mktemp("s")
    env = {"VLLM_RPC_BASE_PATH": str(sockets), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = vllm_serve(model, *flags, *CPU)
    with running_server(command, log, env=env) as server:
        http = openai.DefaultHttpxClient(trust_env=False)
        with openai.OpenAI(
            base_url=server.api, api_key="none", max_retries=0, timeout=120, http_client=http
        ) as client:
            tokenizer = AutoTokenizer.from_pretrained(model)
            yield Served(server, str(model), client, reference, tokenizer)
        processes = session_members(server.process.pid)
        memory = shared_memory(processes)
        assert len(processes) >= 2 and server.healthy()
    assert server.process.returncode == 0
    assert not session_members(server.process.pid)
    assert not [path for path in memory if path.exists()]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(server.url.rpartition(":")[2]))) != 0
    assert "Traceback" not in log.read_text(errors="replace")
    assert contents(model) == before


def as_output(prompt, prompt_ids, tokens, logprobs):
    """A request's output in the shape of `LLM.generate`'s, for the comparisons of engines.py."""
    at = [{token: SimpleNamespace(logprob=value)} for token, value in zip(tokens, logprobs)]
    sequence = SimpleNamespace(token_ids=tokens, logprobs=at)
    return SimpleNamespace(prompt=prompt, prompt_token_ids=prompt_ids, outputs=[sequence])


def completed(prompt, answer, index=0):
    choice = answer.choices[index]
    assert len(choice.token_ids) == len(choice.logprobs.token_logprobs) == TOKENS
    ids, logprobs = choice.prompt_token_ids, choice.logprobs.token_logprobs
    return as_output(prompt, ids, choice.token_ids, logprobs)


def streamed_tokens(chunks) -> list[int]:
    choices = [choice for chunk in chunks for choice in chunk.choices]
    # A chat's first chunk, which only names the role, has none.
    return [token for choice in choices for token in getattr(choice, "token_ids", None) or ()]


def assert_text_is(text: str, tokens: list[int], tokenizer):
    """vLLM holds the last bytes back while they are not yet a character."""
    decoded = tokenizer.decode(tokens, skip_special_tokens=True)
    assert text == decoded or (decoded[-1] == "\ufffd" and text == decoded.rstrip("\ufffd"))


def test_models_lists_the_model(served):
    (model,) = served.client.models.list().data
    assert (model.id, model.root) == (served.name, served.name)
    assert model.max_model_len == MAX_MODEL_LEN


def test_completion_equals_the_reference(served):
    answers = [served.complete(prompt) for prompt in PROMPTS[:8]]
    outputs = [completed(prompt, answer) for prompt, answer in zip(PROMPTS, answers)]
    for prompt, output, answer in zip(PROMPTS, outputs, answers):
        assert output.prompt_token_ids == served.tokenizer(prompt).input_ids
        assert_text_is(answer.choices[0].text, output.outputs[0].token_ids, served.tokenizer)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == TOKENS
    assert_greedy_equals(outputs, served.reference)


def test_prompt_of_token_ids(served):
    ids = served.tokenizer(PROMPTS[0]).input_ids
    by_ids, by_text = served.complete(ids), served.complete(PROMPTS[0])
    assert by_ids.choices[0].prompt_token_ids == ids
    assert_same_completions([completed(ids, by_ids)], [completed(PROMPTS[0], by_text)])


def test_top_and_prompt_logprobs(served):
    extra = GREEDY["extra_body"] | {"return_tokens_as_token_ids": True}
    choice = served.complete(PROMPTS[0], logprobs=5, echo=True, extra_body=extra).choices[0]
    tops, at_tokens = choice.logprobs.top_logprobs, choice.logprobs.token_logprobs
    whole = [int(token.removeprefix("token_id:")) for token in choice.logprobs.tokens]
    assert whole[:-TOKENS] == choice.prompt_token_ids
    assert at_tokens[0] is None and tops[0] is None
    expected = logprobs_of(served.reference, whole[:1], whole[1:])
    rows = zip(whole[1:], at_tokens[1:], tops[1:], expected, strict=True)
    for token, at_token, top, row in rows:
        top = {int(name.removeprefix("token_id:")): value for name, value in top.items()}
        ids = list(top)
        assert top[token] == at_token and len(ids) in (5, 6)  # 6: a prompt's token besides
        assert (row[ids] - torch.tensor(list(top.values()))).abs().max() <= MAX_LOGPROB_ERROR
        best = torch.tensor(sorted(top.values(), reverse=True)[:5])
        assert (best - row.topk(5).values).abs().max() <= MAX_LOGPROB_ERROR


def test_chat_equals_the_reference_on_the_rendered_template(served):
    outputs = []
    for messages in CHATS:
        answer = served.chat(messages, logprobs=True, top_logprobs=1)
        text = served.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert text.endswith("<|end|>\n<|assistant|>") and messages[0]["content"] in text
        ids = served.tokenizer(text).input_ids
        choice = answer.choices[0]
        assert answer.prompt_token_ids == ids and len(choice.token_ids) == TOKENS
        assert choice.message.role == "assistant"
        assert_text_is(choice.message.content, choice.token_ids, served.tokenizer)
        logprobs = [token.logprob for token in choice.logprobs.content]
        outputs.append(as_output(text, ids, choice.token_ids, logprobs))
    assert_greedy_equals(outputs, served.reference)


def assert_streamed(served, prompt, chunks, texts):
    """As an answer in one piece, they are the reference's own choices, and the tokens' text."""
    tokens = streamed_tokens(chunks)
    assert len(tokens) == TOKENS
    assert_greedy_tokens(served.reference, prompt, tokens)
    assert_text_is("".join(texts), tokens, served.tokenizer)


def test_streamed_completion_equals_the_unstreamed(served):
    pieces = []
    for prompt in PROMPTS[:4]:
        chunks = list(served.complete(prompt, stream=True))
        texts = [choice.text for chunk in chunks for choice in chunk.choices]
        assert_streamed(served, served.tokenizer(prompt).input_ids, chunks, texts)
        pieces.append(sum(map(bool, texts)))
    assert max(pieces) > 2, pieces  # vLLM joins pieces that a busy machine is slow to send


def test_streamed_chat_equals_the_unstreamed(served):
    pieces = []
    for messages in CHATS:
        chunks = list(served.chat(messages, stream=True))
        texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
        assert_streamed(served, served.chat(messages).prompt_token_ids, chunks, texts)
        pieces.append(sum(map(bool, texts)))
    assert max(pieces) > 2, pieces


def test_64_concurrent_requests_equal_the_reference_and_those_alone(served):
    async def ask_together():
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(
            base_url=served.server.api, api_key="none", max_retries=0, http_client=http
        ) as client:
            create = client.completions.create
            requests = [
                create(model=served.name, prompt=p, logprobs=1, **GREEDY) for p in PROMPTS
            ]
            return await asyncio.gather(*requests)

    answers = asyncio.run(ask_together())
    together = [completed(prompt, answer) for prompt, answer in zip(PROMPTS, answers)]
    assert len({tuple(output.outputs[0].token_ids) for output in together}) == 64
    assert_greedy_equals(together, served.reference)
    alone = [completed(prompt, served.complete(prompt)) for prompt in PROMPTS[:16]]
    assert_same_completions(together[:16], alone)


def test_64_prompts_of_one_request_are_one_batch(served):
    """They come to the engine together, however slowly this machine lets a client ask."""
    before = served.steps()
    answer = served.complete(PROMPTS)
    assert served.steps() - before < len(PROMPTS) * TOKENS / 4, "they were not batched"
    together = [completed(prompt, answer, i) for i, prompt in enumerate(PROMPTS)]
    assert_greedy_equals(together, served.reference)


def test_past_the_context_length(served):
    expected = completed(PROMPTS[0], served.complete(PROMPTS[0]))
    long = " ".join(real_prompts(1, words=400) + PROMPTS)
    for ask in (
        lambda: served.complete([5] * (MAX_MODEL_LEN + 1)),
        lambda: served.complete(long),
        lambda: served.chat([{"role": "user", "content": long}]),
    ):
        with pytest.raises(openai.BadRequestError, match=f"length is {MAX_MODEL_LEN} tokens") as e:
            ask()
        assert e.value.status_code == 400
        again = completed(PROMPTS[0], served.complete(PROMPTS[0]))
        assert_same_completions([again], [expected])
    assert served.server.healthy()


def test_seeded_samples_are_reproducible(served):
    def samples(seed):
        answer = served.complete(PROMPTS[0], n=4, seed=seed, temperature=1.0)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        return [(choice.token_ids, choice.logprobs.token_logprobs) for choice in answer.choices]

    first, again, other = samples(7), samples(7), samples(8)
    tokens = [tuple(sample) for sample, _ in first]
    assert tokens == [tuple(sample) for sample, _ in again]
    assert len(set(tokens)) == 4 and tokens != [tuple(sample) for sample, _ in other]
    prompt = served.tokenizer(PROMPTS[0]).input_ids
    for sample, logprobs in first:  # sampled from the reference's own distribution
        expected = logprobs_of(served.reference, prompt, sample)
        expected = expected.gather(1, torch.tensor(sample)[:, None])[:, 0]
        assert (torch.tensor(logprobs) - expected).abs().max() <= MAX_LOGPROB_ERROR
