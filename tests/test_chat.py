"""Conversations by chat templates: every token of a reply has its label, or the line is refused."""

import json

import chat_templates as templates
import pytest
from cli_fixtures import base  # noqa: F401
from transformers import AutoTokenizer
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.training.data import read_jsonl

CALL = {"id": "123456789", "type": "function",
        "function": {"name": "add", "arguments": {"a": 2}}}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
USER, AGAIN = ({"role": "user", "content": text} for text in ("one", "two"))


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.fixture
def read(base, tmp_path):  # noqa: F811
    """A line by a template: the whole text, and its learnt parts."""

    def read(template, messages, **more):
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = template
        file = tmp_path / "data.jsonl"
        file.write_text(json.dumps({"messages": messages} | more))
        (example,) = read_jsonl([file], tokenizer)
        parts, before = [], False
        for token, on in zip(example.ids, example.learn):
            if on:
                parts = parts if before else [*parts, []]
                parts[-1].append(token)
            before = on
        return tokenizer.decode(example.ids), [tokenizer.decode(part) for part in parts]

    return read


def refused(read, *arguments, **more):
    with pytest.raises(AdapterError) as caught:
        read(*arguments, **more)
    (problem,) = caught.value.problems
    assert "data.jsonl:1: " in problem
    return problem


SYSTEM = {"role": "system", "content": "be brief"}
TURNS = [USER, said("first reply"), AGAIN, said("second reply")]
OUT = {"role": "user", "content": "<out>3</out>"}
THOUGHT = said("<think>\nhm\n</think>\n\nfirst reply")
LEARNT = {
    "empty thought": (templates.THINKS, [SYSTEM, *TURNS],
        ["first reply<|end|>\n", "<think>\n\n</think>\n\nsecond reply<|end|>\n"]),
    "thoughts dropped": (templates.THINKS, [USER, THOUGHT, AGAIN, said("<think>ah</think>second")],
        ["first reply<|end|>\n", "<think>\nah\n</think>\n\nsecond<|end|>\n"]),
    "thought apart": (templates.THINKS, [USER, said("yes", reasoning="hm")],
        ["<think>\nhm\n</think>\n\nyes<|end|>\n"]),
    "steps": (templates.THINKS, [USER, said("", tool_calls=[CALL]), OUT, said("three")],
        ['\n<call>{"name": "add", "arguments": {"a": 2}}</call><|end|>\n',
         "<think>\n\n</think>\n\nthree<|end|>\n"]),
    "opened thought": (templates.OPENS_A_THOUGHT, [*TURNS[:3], said("<think>ah</think>second")],
        ["first reply<|end|>\n", "ah\n</think>\n\nsecond<|end|>\n"]),
    "opened thoughts dropped": (templates.OPENS_A_THOUGHT, [USER, THOUGHT, AGAIN, said("second")],
        ["first reply<|end|>\n", "\n</think>\n\nsecond<|end|>\n"]),
    "end token": (templates.ENDS_UNLESS_ASKED, [SYSTEM, *TURNS],
        ["first reply<|end|>\n", "second reply<|end|>\n<|eos|>"]),
    "plain and end token": (templates.ENDS_PLAIN, [SYSTEM, *TURNS],
        ["first reply\n\n", "second reply\n\n<|eos|>"]),
    "system last": (templates.IN_THE_LAST_TURN, [SYSTEM, *TURNS],
        [" first reply<|eos|>", " second reply<|eos|>"]),
    "system unanswered": (templates.IN_AN_UNANSWERED_TURN, [SYSTEM, *TURNS],
        [" first reply<|eos|>", " second reply<|eos|>"]),
    "equal turns": (templates.IN_THE_LAST_TURN, [SYSTEM, USER, said("a"), USER, said("b")],
        [" a<|eos|>", " b<|eos|>"]),
    "no system": (templates.NO_SYSTEM, [USER, said(" first reply\n"), AGAIN, said("second")],
        ["first reply<|end|>\n", "second<|end|>\n"]),
    "trimmed": (templates.TRIMS, [SYSTEM, USER, said("  first\n"), AGAIN, said("\nsecond")],
        ["first<|end|>", "second<|end|>"]),
    "marked": (templates.MARKS, TURNS, ["first reply<|end|>", "second reply<|end|>"]),
    "marked in parts": (templates.MARKS, [USER, said("first", reasoning="hm"), AGAIN, said("")],
        ["(hm)", "first<|end|>", "<|end|>"]),
    "parted token": (templates.PLAIN, TURNS, ["first reply\n", "second reply\n"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LEARNT)
def test_replies_are_learnt_and_nothing_else(read, case):
    template, messages, expected = LEARNT[case]
    text, learnt = read(template, messages)
    assert learnt == expected
    # A reply with weight 0 stays in the text, without loss; equal replies are told apart.
    replies = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if len(replies) > 1:
        first = messages[replies[0]] | {"weight": 0}
        again = [first if i == replies[0] else m for i, m in enumerate(messages)]
        assert read(template, again) == (text, expected[-1:])


def test_the_text_is_the_template_s(read, base):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(base)
    for template, messages, _ in LEARNT.values():
        given = [{k: v for k, v in m.items() if k != "reasoning"} for m in messages]
        if given == messages and template != templates.IN_AN_UNANSWERED_TURN:
            tokenizer.chat_template = template
            assert read(template, messages)[0] == tokenizer.apply_chat_template(
                messages, tokenize=False
            )


def test_the_last_prompt_is_what_a_server_sends(read, base):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = templates.IN_AN_UNANSWERED_TURN
    messages = [SYSTEM, *TURNS]
    text, learnt = read(tokenizer.chat_template, messages, tools=TOOLS)
    sent = tokenizer.apply_chat_template(
        messages[:-1], tools=TOOLS, tokenize=False, add_generation_prompt=True
    )
    assert "be brief" in sent and "[TOOLS]" in sent
    assert text == sent + " second reply<|eos|>"
    assert learnt == [" first reply<|eos|>", " second reply<|eos|>"]


def test_a_block_of_generation_equals_transformers_mask(read, base, tmp_path):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = templates.MARKS
    messages = [SYSTEM, *TURNS]
    wanted = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": messages}))
    (found,) = read_jsonl([tmp_path / "data.jsonl"], tokenizer)
    assert list(found.ids) == wanted["input_ids"]
    assert [int(on) for on in found.learn] == wanted["assistant_masks"]


def test_equal_turns_of_which_the_last_is_written_otherwise(read):
    turns = [SYSTEM, USER, said("a"), USER, said("b"), AGAIN, said("c")]
    _, learnt = read(templates.IN_THE_LAST_TURN, turns)
    assert learnt == [" a<|eos|>", " b<|eos|>", " c<|eos|>"]


@pytest.mark.parametrize("template, thought, blocks", [
    (templates.MARKS, {"reasoning": "hm"}, {1: ["first<|end|>"], 3: ["(hm)", "second<|end|>"]}),
    (templates.MARKS_THE_END, {"reasoning": "hm"},
     {1: ["first", "<|end|>"], 3: ["(hm)", "second", "<|end|>"]}),
    (templates.MARKS_THE_END, {}, {1: ["first", "<|end|>"], 3: ["second", "<|end|>"]}),
])  # fmt: skip
def test_blocks_around_a_reply_are_its_own(read, template, thought, blocks):
    messages = [USER, said("first"), AGAIN, said("second", **thought)]
    assert read(template, messages)[1] == blocks[1] + blocks[3]
    for left_out, other in ((1, 3), (3, 1)):
        some = [m | {"weight": 0} if i == left_out else m for i, m in enumerate(messages)]
        assert read(template, some)[1] == blocks[other]


REFUSED = {
    "no system role": (templates.NO_SYSTEM, [SYSTEM, *TURNS], ("turn 1 (system)", "no system role")),
    "not in turns": (templates.NO_SYSTEM, [USER, said("a"), said("b")],
                     ("turn 3 (assistant)", "must alternate")),
    "opened, never written": (templates.NEVER_CLOSES_IT, TURNS,
                              ("turn 4 (assistant)", 'ends in "<|assistant|><think>\\n"')),
    "reply dropped": (templates.FORGETS, TURNS,
                      ("turn 2 (assistant)", "which the chat template does not write before it")),
    "two ends": (templates.ENDS_TWICE, TURNS, ("turn 2 (assistant)", "ends it in another way")),
    "in a macro": (templates.MARKS_IN_A_MACRO, TURNS,
                   ("turn 2 (assistant)", "generation blocks leave it out")),
    "call not marked": (templates.MARKS_SOME, [*TURNS, AGAIN, said("", tool_calls=[CALL])],
                        ("turn 6 (assistant)", "generation blocks leave it out")),
    "calls not written": (templates.PLAIN, [USER, said("", tool_calls=[CALL])],
                          ("turn 2 (assistant)", "does not write it")),
    "id": (templates.IN_THE_LAST_TURN, [USER, said("", tool_calls=[CALL | {"id": "1"}])],
           ("turn 2 (assistant)", "ids have 9 letters")),
    "thought not written": (templates.PLAIN, [USER, said("a", reasoning_content="hm")],
                            ("turn 2 (assistant)", "does not write `reasoning_content`")),
    "no template": ("{% broken", TURNS, ("turn 1 (user)", "chat template refuses")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_known_is_refused_by_turn(read, case):
    template, messages, expected = REFUSED[case]
    problem = refused(read, template, messages)
    assert all(part in problem for part in expected), problem


def test_tools_are_written_as_a_server_writes_them(read):
    call = CALL | {"function": {"name": "add", "arguments": '{"a": 2}'}}  # OpenAI's are texts
    out = {"role": "tool", "content": [{"type": "text", "text": "2"}], "tool_call_id": "123456789"}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, out, said("2")]
    text, learnt = read(templates.IN_THE_LAST_TURN, messages, tools=TOOLS)
    assert '[TOOLS] [{"type": "function", "function": {"name": "add", "parameters"' in text
    assert '[OUT] {"content": "2"}[/OUT]' in text
    assert learnt == ['[CALLS] [{"name": "add", "arguments": {"a": 2}}]<|eos|>', " 2<|eos|>"]
    assert read(templates.IN_THE_LAST_TURN, messages, tools=json.dumps(TOOLS))[1] == learnt
    assert "does not write `tools`" in refused(read, templates.PLAIN, TURNS, tools=TOOLS)
    assert read(templates.PLAIN, TURNS, tools=[])[1]


def test_parts_of_content_are_joined_as_a_server_joins_them(read):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, said(parts)]
    text, learnt = read(templates.PLAIN, messages)
    assert text == "USER: a\nb\nASSISTANT: a\nb\n" and learnt == ["a\nb\n"]
    text, learnt = read(templates.TRIMS, messages)  # takes parts
    assert text.endswith("[user]\n\nab<|end|>[assistant]\n\nab<|end|>") and learnt == ["ab<|end|>"]
    tool = {"role": "tool", "content": parts, "tool_call_id": "123456789"}
    text, _ = read(templates.TRIMS, [USER, said("x"), tool, said("y")])  # a tool's is one text
    assert "[tool]\n\na\nb<|end|>" in text


def test_keys_that_servers_do_not_hand_on_are_refused_where_they_are_written(read):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.mood or '' }}{{ m.content }}<|end|>" \
        "{% endfor %}" + templates.ASK  # fmt: skip
    messages = [{"role": "user", "content": "one", "mood": "glad"}, said("first")]
    problem = refused(read, template, messages)
    assert "turn 1 (user): the chat template writes `mood`" in problem
    assert read(templates.PLAIN, messages)[1] == ["first\n"]  # changes nothing there


def test_turns_are_counted_as_in_the_file(read):
    messages = [USER, said("a"), said("b")]
    problem = refused(read, templates.THINKS, [*messages, {"role": "bot", "content": "c"}],
                      system="be brief")  # fmt: skip
    assert "turn 4: `role` is" in problem
    problem = refused(read, templates.NO_SYSTEM, TURNS, system="be brief")
    assert "turn 0 (system)" in problem
    text, _ = read(templates.THINKS, TURNS, system="be brief")
    assert text.startswith("<|system|>be brief<|end|>\n<|user|>one")
