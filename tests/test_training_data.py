"""Files and forms of training texts: what people have is read, what is not understood is named."""

import gzip
import json

import pytest
from cli_fixtures import base, run  # noqa: F401
from transformers import AutoTokenizer
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.training.data import read_jsonl
from vllm_adafuse.training.forms import Pair, Talk, understand
from vllm_adafuse.training.jsonl import Bad, read_objects

ONE, TWO = {"text": "first"}, {"text": "second"}
LINES = "\n".join(map(json.dumps, (ONE, TWO)))


def found(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(line, str(value) if isinstance(value, Bad) else value)
            for line, value in read_objects(path)]  # fmt: skip


WRITTEN = {
    "plain": (LINES, [1, 2]),
    "CRLF": (LINES.replace("\n", "\r\n"), [1, 2]),
    "CR": (LINES.replace("\n", "\r"), [1, 2]),
    "byte order mark": ("\ufeff" + LINES, [1, 2]),
    "two files put together": ("\ufeff" + LINES.replace("\n", "\n\n\ufeff"), [1, 3]),
    "empty lines": (f"\n  \n{LINES}\n\r\n\n", [3, 4]),
    "a list": (json.dumps([ONE, TWO]), [1, 1]),
    "a list over lines": (json.dumps([ONE, TWO], indent=1), [2, 5]),
    "a list with a mark": ("\ufeff\n[" + LINES.replace("\n", ",\n") + "\n]\n", [2, 3]),
    "objects over lines": ("\n".join(json.dumps(x, indent=2) for x in (ONE, TWO)), [1, 4]),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_objects_are_read_with_their_lines(tmp_path, case):
    content, lines = WRITTEN[case]
    assert found(tmp_path / "a.jsonl", content) == list(zip(lines, (ONE, TWO)))


FAULTY = {
    "half a pair of surrogates": (LINES + '\n{"text": "\\ud83d"}', [(3, "half a surrogate pair (\\ud83d)")]),
    "in a key": ('{"text": "x", "\\udc00": 1}', [(1, "half a surrogate pair (\\udc00)")]),
    "deep": ('{"messages": [{"content": ["\\udfff"]}]}', [(1, "(\\udfff)")]),
    "a whole pair": ('{"text": "\\ud83d\\ude00"}', []),
    "twice": ('{"text": "a", "text": "b"}', [(1, "has `text` twice")]),
    "not UTF-8": (b'{"text": "x"}\n{"text": "\xe9"}', [(2, "is not UTF-8")]),
    "not UTF-8, a list": (b'[{"text": "x"},\n{"text": "\xe9"}]', [(2, "is not UTF-8")]),
    "not JSON": (LINES + "\nhello", [(3, "is not JSON (Expecting value at character 1)")]),
    "nested": ("[" * 3000, [(1, "is not JSON"), (1, "within a list")]),
    "nested line": (LINES + "\n" + "[" * 9000, [(3, "nested too deep")]),
    "cut": (json.dumps([ONE, TWO], indent=1)[:-2], [(7, "the file ends within a list")]),
    "broken in a list": ('[{"text": "a"},\n{"text": }]', [(2, "nothing is read from here on")]),
    "no objects": ('[1,\n"x"]', [(1, "holds 1, expected an object"), (2, "expected an object")]),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTY)
def test_faults_are_named_with_their_lines(tmp_path, case):
    content, expected = FAULTY[case]
    faults = [(line, said) for line, said in found(tmp_path / "a.jsonl", content)
              if isinstance(said, str)]  # fmt: skip
    if case != "nested":
        assert len(faults) == len(expected), faults
    for (line, said), (at, part) in zip(faults, expected):
        assert line == at and part in said


FILES = {
    "UTF-16": (LINES.encode("utf-16"), "is in UTF-16; save it as UTF-8: iconv"),
    "UTF-16 without a mark": (LINES.encode("utf-16-le"), "holds zero bytes"),
    "UTF-32": (LINES.encode("utf-32"), "is in UTF-32"),
    "gzip": (gzip.compress(LINES.encode()), "unpack it first: gunzip a.jsonl"),
    "zip": (b"PK\x03\x04", "is a zip archive"),
    "zstd": (b"\x28\xb5\x2f\xfd", "is compressed by zstd"),
    "Parquet": (b"PAR1", "is in Parquet"),
    "empty": (b"\xef\xbb\xbf \n", "no lines; expected"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_jsonl_are_named(base, tmp_path, case):  # noqa: F811
    content, said = FILES[case]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        read_jsonl([tmp_path / "a.jsonl"], AutoTokenizer.from_pretrained(base))
    (problem,) = caught.value.problems
    assert problem.startswith(str(tmp_path / "a.jsonl")) and said in problem


def test_directories_and_missing_files_are_named(base, tmp_path, capsys):  # noqa: F811
    (tmp_path / "texts.jsonl").write_text(LINES)
    train = ("train", "--base", base, "--output", tmp_path / "out", "--data")
    for path, said in (
        (tmp_path, "is a directory, expected a jsonl file; it holds texts.jsonl; name files"),
        (tmp_path / "nowhere.jsonl", "cannot be read (no such file)"),
        ("/dev/zero", "is a pipe, socket or device"),
    ):
        code, _, err = run(capsys, *train, path)
        assert code == 1 and f"{path}: {said}" in err, err
        assert err.count("\n") == 2  # the message alone


def test_a_fault_is_said_once_with_all_its_lines(base, tmp_path):  # noqa: F811
    path = tmp_path / "a.jsonl"
    rows = [{"text": ""}, ONE, {"text": ""}, {"txt": "x"}, {"text": ""}, {"text": ""}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(AdapterError) as caught:
        read_jsonl([path], AutoTokenizer.from_pretrained(base))
    first, second = caught.value.problems
    assert first.startswith(f"{path}:1: `text` is") and first.endswith(f"(so are {path}:3, 5-6)")
    assert second.startswith(f"{path}:4: has the keys txt")


def turns(*texts, **more):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} | more for i, text in enumerate(texts)]


def test_alpaca_and_sharegpt_are_understood():
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3", "id": 7}
    assert understand(alpaca, chat=False) == Pair("Add.\n1 2\n", "3")
    assert understand(alpaca | {"system": "Be brief."}, chat=False).prompt == "Be brief.\nAdd.\n1 2\n"
    assert understand(alpaca, chat=True) == Talk(turns("Add.\n1 2", "3"), [False, True])
    for nothing in ("", None):
        assert understand(alpaca | {"input": nothing}, chat=False) == Pair("Add.\n", "3")
    shared = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "first"},
              {"from": "observation", "value": "3"}, {"from": "gpt", "value": "no", "weight": 0}]  # fmt: skip
    wanted = turns("one", "first", "3", "no")
    wanted[2]["role"] = "tool"
    assert understand({"conversations": shared}, True) == Talk(wanted, [False, True, False, False])
    talk = understand({"conversations": shared[:2], "system": "Be brief.", "id": "x"}, chat=True)
    assert talk == Talk([{"role": "system", "content": "Be brief."}, *wanted[:2]],
                        [False, False, True], first=0)  # fmt: skip
    assert understand({"conversations": turns("a", "b")}, chat=True) == Talk(
        turns("a", "b"), [False, True]
    )
    # TRL's pairs of conversations: what stands in the prompt is not learnt.
    pair = {"prompt": turns("a", "b", "c"), "completion": turns("x", "d")[1:]}
    assert understand(pair, chat=True) == Talk(turns("a", "b", "c", "d"), [False] * 3 + [True])


def test_forms_are_mixed_in_a_file(base, tmp_path):  # noqa: F811
    rows = [ONE, {"prompt": "ask ", "completion": "reply"}, {"messages": turns("one", "first")},
            {"instruction": "Add.", "input": "", "output": "3"},
            {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = read_jsonl([tmp_path / "a.jsonl"], tokenizer)
    learnt = [tokenizer.decode([i for i, on in zip(e.ids, e.learn) if on]) for e in examples]
    assert learnt == ["first<|eos|>", "reply<|eos|>", "first<|end|>\n", "3<|end|>\n", "y<|end|>\n"]
    assert [e.source for e in examples] == [f"{tmp_path / 'a.jsonl'}:{n}" for n in range(1, 6)]


REFUSED = [
    ({"text": "x", "weight": 0}, "`weight` is 0, which is not understood here"),
    ({"text": "x", "images": ["a.png"]}, "only text is learnt"),
    ({"text": "x", "tools": [{}]}, "only conversations have tools"),
    ({"prompt": "a", "completion": "b", "system": "c"}, "only conversations have a system text"),
    ({"prompt": "a", "completion": "b", "tools": [{}]}, "only conversations have tools"),
    ({"prompt": "a", "completion": "b", "label": False}, "`label` says whether"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "`completion` is missing"),
    ({"prompt": "a", "completion": "b", "rejected": "c"}, "`rejected` is"),
    ({"messages": turns("a", "b"), "functions": [{"name": "f"}]}, "write `tools`"),
    ({"messages": turns("a", "b"), "chat_template_kwargs": {"thinking": True}}, "a server would"),
    ({"messages": turns("a", "b"), "Train-On-Inputs": True}, "`Train-On-Inputs` is true"),
    ({"messages": turns("a", "b"), "tools": [{"name": "f"}]}, '"function": {"name"'),
    ({"messages": turns("a", "b"), "tools": "[{"}, "`tools` is"),
    ({"messages": turns("a", "b", weight=0)}, "every reply has `weight` 0"),
    ({"messages": turns("a", "b", weight=1)}, "turn 1 (user): `weight` is 1"),
    ({"messages": turns("a", "b", weight=0.5)}, "`weight` is 0.5, expected 0 or 1"),
    ({"messages": turns("a", "b", loss=False)}, "turn 1 (user): `loss` is false"),
    ({"messages": turns("a", "b", function_call={"name": "f"})}, "write `tool_calls`"),
    ({"messages": turns("a", None)}, "turn 2 (assistant) has no `content`"),
    ({"messages": turns("a", 3)}, "turn 2 (assistant): `content` is 3"),
    ({"messages": turns([{"type": "image_url"}], "b")}, 'a part of `content` is of type "image_url"'),
    ({"messages": turns([{"type": "text"}], "b")}, "expected a text in `text`"),
    ({"messages": turns("a", "b", tool_calls=[{}])}, "turn 1 (user) has `tool_calls`"),
    ({"messages": [*turns("a"), {"role": "assistant", "tool_calls": [{"name": "f"}]}]},
     'expected {"type": "function"'),
    ({"messages": [*turns("a"), {"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "{"}}]}]}, 'the arguments of "f" are not JSON'),
    ({"messages": [*turns("a"), {"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "[1]"}}]}]}, "expected an object"),
    ({"messages": [{"role": "Assistant", "content": "x"}]}, "turn 1: `role` is \"Assistant\""),
    ({"messages": [*turns("a"), "b"]}, "turn 2 is \"b\""),
    ({"messages": [{"role": "system", "content": "x"}], "system": "y"}, "keep one"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "turn 1: `from` is \"narrator\""),
    ({"instruction": "", "input": "", "output": "x"}, '`instruction` is ""'),
    ({"instruction": "x", "input": "", "output": ""}, '`output` is ""'),
    ({"instruction": "x", "input": 3, "output": "y"}, "`input` is 3"),
    ({"instruction": "x", "output": "y", "history": [["a", "b"]]}, "`history` is"),
    ({"instruction": "x", "output": "y", "text": "z"}, "expected exactly one of"),
]  # fmt: skip


@pytest.mark.parametrize("row,said", REFUSED)
def test_what_is_not_understood_is_refused_by_name(row, said):
    with pytest.raises(Bad) as caught:
        understand(row, chat=True)
    assert said in str(caught.value)


def test_keys_that_mean_nothing_are_let_pass():
    row = {"text": "x", "id": 3, "source": "web", "weight": 1.0, "images": [], "tools": None,
           "label": 4}  # fmt: skip
    assert understand(row, chat=False).text == "x"
    row = {"messages": turns("a", "b", name=None, refusal=None), "parallel_tool_calls": False}
    assert understand(row, chat=True) == Talk(turns("a", "b"), [False, True])
