"""The forms in which people keep training texts, brought to three: a text, a pair, a conversation.

What would change what is learnt and is not understood is refused by its name: read past, it would
leave a model trained on other texts than its maker thinks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from vllm_adafuse.text import show
from vllm_adafuse.training.jsonl import SHAPES, Bad

# The keys that tell a form, and those that may stand beside them and mean something.
FORMS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("text",): (),
    ("messages",): ("tools", "system"),
    ("prompt", "completion"): ("tools",),
    ("conversations",): ("tools", "system"),
    ("instruction", "output"): ("input", "system"),
}
_WEIGHT = (
    "lines and tokens count alike; leave the line out, or give a reply `weight` 0 in `messages`"
)
_TEXT = "only text is learnt; leave the line out"
_TEMPLATE = "a server would have to be told the same; write the text yourself as `text`"
# Beside any form: key -> the way out.
REFUSED = {
    **dict.fromkeys(("weight", "weights", "loss_weight", "sample_weight", "mask", "loss_mask",
                     "completion_mask", "assistant_masks", "train", "train_on_inputs",
                     "train_on_prompt", "mask_prompt"), _WEIGHT),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _TEXT),
    **dict.fromkeys(("documents", "chat_template", "chat_template_kwargs", "enable_thinking",
                     "add_generation_prompt", "continue_final_message"), _TEMPLATE),
    **dict.fromkeys(("functions", "function_call"), "write `tools`, and `tool_calls` in a reply"),
    **dict.fromkeys(("chosen", "rejected"), "of two answers write the better one as `completion`"),
    "history": "write the turns before as `messages`",
    "suffix": "write the whole text as `text`",
    "tools": "only conversations have tools; write `messages`",
    "system": "only conversations have a system text; write `messages`",
    "input": "it belongs to `instruction` and `output`; write `prompt` and `completion`",
}  # fmt: skip
REFUSED_IN_TURN = {
    **dict.fromkeys(("loss", "loss_mask", "mask", "train", "training", "trainable", "learn",
                     "loss_weight", "loss_scale", "train_detail", "train_on_turn"),
                    "write `weight`: 0 at a reply that is not to be learnt"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _TEXT),
    **dict.fromkeys(("prefix", "continue"), "give the whole reply"),
    "function_call": "write `tool_calls`",
    "refusal": "write it as `content`",
    "tools": "write `tools` beside `messages`",
}  # fmt: skip
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# Names of ShareGPT's `from`.
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Text:
    """All of it is learnt."""

    text: str


@dataclass(frozen=True)
class Pair:
    """The completion is learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Talk:
    """A conversation.

    Attributes:
        messages: `role`, `content` (a text, or several in a list), and what else a template may
            write: `tool_calls` with their arguments as objects, `name`, …
        learn: for each message, whether it is a reply to learn.
        tools: as OpenAI's, or None.
        first: number of the first message as its maker counts: 0 where it was not in the list.
    """

    messages: list[dict[str, Any]]
    learn: list[bool]
    tools: list[dict[str, Any]] | None = None
    first: int = 1


def understand(value: dict[str, Any], chat: bool) -> Text | Pair | Talk:
    """One line's object.

    Args:
        value: from a file.
        chat: whether there is a chat template: Alpaca's keys are a conversation then, else a pair.

    Raises:
        Bad: with what is wrong.
    """
    forms = [form for form in FORMS if any(key in value for key in form)]
    if len(forms) != 1:
        keys = ", ".join(show(key)[1:-1] for key in value) or "none"
        raise Bad(f"has the keys {keys}; expected exactly one of {SHAPES}")
    (form,) = forms
    if missing := [key for key in form if key not in value]:
        raise Bad(f"`{missing[0]}` is missing; expected {SHAPES}")
    for key, found in value.items():
        name = key.lower().replace("-", "_")
        neutral = _empty(found) or ("weight" in name and found == 1)
        if name in REFUSED and key not in FORMS[form] and not neutral:
            raise Bad(f"`{show(key)[1:-1]}` is {show(found)}, which is not understood here: "
                      f"{REFUSED[name]}")  # fmt: skip
    if form != ("text",) and isinstance(value.get("label"), bool):
        raise Bad("`label` says whether the answer is good; leave out the line, or the key")
    if form == ("text",):
        return Text(_string(value, "text"))
    if form == ("instruction", "output"):
        return _alpaca(value, chat)
    if not chat and isinstance(value[form[0]], list):
        raise Bad(f"`{form[0]}` needs a tokenizer with a chat template, and this one has none; "
                  "write the text yourself as `text`, or as `prompt` and `completion`")  # fmt: skip
    if form == ("prompt", "completion"):
        if not isinstance(value["prompt"], list):
            if not _empty(value.get("tools")):
                raise Bad(f"`tools` is {show(value['tools'])}, which is not understood here: "
                          f"{REFUSED['tools']}")  # fmt: skip
            return Pair(_string(value, "prompt"), _string(value, "completion"))
        before, after = (_turns(value, key) for key in form)
        return _talk(before + after, len(before), value)
    return _talk(_turns(value, form[0]), 0, value)


def _empty(found: Any) -> bool:
    return found is None or found in ("", [], {})


def _string(value: dict[str, Any], key: str) -> str:
    if not isinstance(value[key], str) or not value[key]:
        raise Bad(f"`{key}` is {show(value[key])}, expected a text that is not empty")
    return value[key]


def _alpaca(value: dict[str, Any], chat: bool) -> Pair | Talk:
    given = {key: "" if value.get(key) is None else value[key]
             for key in ("instruction", "input", "system")}  # fmt: skip
    for key, found in given.items():
        if not isinstance(found, str):
            raise Bad(f"`{key}` is {show(found)}, expected a text")
    asked = "\n".join(text for key, text in given.items() if text and key != "system")
    if not asked:
        raise Bad('`instruction` is "", expected a text that is not empty')
    answer = _string(value, "output")
    if not chat:
        head = f"{given['system']}\n" if given["system"] else ""
        return Pair(f"{head}{asked}\n", answer)
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return _talk(turns, 0, value)


def _turns(value: dict[str, Any], key: str) -> list[dict[str, Any]]:
    turns = value[key]
    if not isinstance(turns, list) or not turns:
        raise Bad(f"`{key}` is {show(turns)}, expected a list of objects with the texts `role` and "
                  "`content`")  # fmt: skip
    return turns


def _talk(turns: list[Any], before: int, value: dict[str, Any]) -> Talk:
    """Checks turns; replies among the first `before` are not learnt."""
    system, first = value.get("system"), 1
    if not _empty(system):
        if not isinstance(system, str):
            raise Bad(f"`system` is {show(system)}, expected a text")
        if isinstance(turns[0], dict) and "system" in (turns[0].get("role"), turns[0].get("from")):
            raise Bad("there is a `system` and a first turn of that role; keep one")
        turns, first = [{"role": "system", "content": system}, *turns], 0
    messages, learn = [], []
    for number, turn in enumerate(turns, first):
        message, counts = _message(turn, number)
        messages.append(message)
        learn.append(counts and number > before)
    if all(m["role"] != "assistant" for m in messages):
        raise Bad("`messages` has none of role assistant; there is nothing to learn")
    if not any(learn):
        raise Bad("every reply has `weight` 0; there is nothing to learn")
    return Talk(messages, learn, _tools(value.get("tools")), first)


def _message(turn: Any, number: int) -> tuple[dict[str, Any], bool]:
    """A turn as a template wants it, and whether it is learnt."""
    if not isinstance(turn, dict):
        raise Bad(f"turn {number} is {show(turn)}, expected a list of objects with the texts "
                  "`role` and `content`")  # fmt: skip
    turn = {key: found for key, found in turn.items() if found is not None}
    if "from" in turn and "role" not in turn:
        speaker = turn.pop("from")
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise Bad(f"turn {number}: `from` is {show(speaker)}, expected one of "
                      f"{', '.join(SPEAKERS)}; write other turns as `messages`")  # fmt: skip
        turn = {"role": SPEAKERS[speaker]} | turn
        if "value" in turn and "content" not in turn:
            turn["content"] = turn.pop("value")
    role = turn.get("role")
    if role not in ROLES:
        found = f"`role` is {show(role)}" if "role" in turn else "`role` is missing"
        raise Bad(f"turn {number}: {found}, expected one of {', '.join(ROLES)}")
    at = f"turn {number} ({role})"
    for key, found in turn.items():
        if key in REFUSED_IN_TURN and not _empty(found):
            raise Bad(f"{at}: `{key}` is {show(found)}, which is not understood: "
                      f"{REFUSED_IN_TURN[key]}")  # fmt: skip
    weight = turn.pop("weight", 1 if role == "assistant" else 0)
    if weight not in (0, 1):
        raise Bad(f"{at}: `weight` is {show(weight)}, expected 0 or 1")
    if weight and role != "assistant":
        raise Bad(f"{at}: `weight` is 1, and only replies of role assistant are learnt")
    turn = {key: found for key, found in turn.items() if key not in REFUSED_IN_TURN}
    if calls := turn.pop("tool_calls", None):
        if role != "assistant":
            raise Bad(f"{at} has `tool_calls`, which only role assistant can have")
        turn["tool_calls"] = _calls(calls, at)
        turn.setdefault("content", "")  # what a server makes of null
    if "content" not in turn:
        raise Bad(f"{at} has no `content`, expected a list of objects with the texts `role` and "
                  "`content`")  # fmt: skip
    turn["content"] = _content(turn["content"], at)
    return turn, bool(weight)


def _content(content: Any, at: str) -> str | list[dict[str, str]]:
    """A text, or several as parts of type text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise Bad(f"{at}: `content` is {show(content)}, expected a text or a list of parts")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, dict) or part.get("type") not in TEXT_PARTS:
            kind = part.get("type") if isinstance(part, dict) else part
            raise Bad(f"{at}: a part of `content` is of type {show(kind)}; {_TEXT}")
        elif not isinstance(part.get("text"), str):
            raise Bad(f"{at}: a part of `content` is {show(part)}, expected a text in `text`")
        else:
            texts.append(part["text"])
    return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


def _calls(calls: Any, at: str) -> list[dict[str, Any]]:
    """Calls of tools, with their arguments as objects: servers parse them before the template."""
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Bad(f'{at}: `tool_calls` holds {show(call)}, expected {{"type": "function", '
                      '"function": {"name": …, "arguments": …}}')  # fmt: skip
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as e:
                raise Bad(f"{at}: the arguments of {show(function['name'])} are not JSON: "
                          f"{show(arguments)}") from e  # fmt: skip
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            raise Bad(f"{at}: the arguments of {show(function['name'])} are {show(arguments)}, "
                      "expected an object")  # fmt: skip
        made.append(call | {"function": function | {"arguments": arguments}})
    return made


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if _empty(tools):
        return None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as e:
            raise Bad(f"`tools` is {show(tools)}, expected a list of objects") from e
    fine = isinstance(tools, list) and all(
        isinstance(t, dict) and t.get("type") == "function" and isinstance(t.get("function"), dict)
        for t in tools
    )
    if not fine:
        raise Bad(f'`tools` is {show(tools)}, expected a list of {{"type": "function", '
                  '"function": {"name": …, "parameters": …}}')  # fmt: skip
    return tools
