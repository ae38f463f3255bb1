"""Conversations as a tokenizer's chat template writes them, and which of their tokens are replies.

A reply to learn is what the model has to say: it begins where the prompt ends that a server sends
for it, and ends where the next turn begins. Templates write a turn anew when others follow it, so
the text up to a reply need not be a prefix of the whole. A mark put into a turn's own words shows
where it stands in each text; what stands after the mark is compared.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from vllm_adafuse.text import clip, show
from vllm_adafuse.training.forms import Talk
from vllm_adafuse.training.jsonl import Bad
from vllm_adafuse.training.labels import Span, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
# What a template may be given in a message, as servers give it.
MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning",
                "reasoning_content")  # fmt: skip
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def tokens_of(talk: Talk, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """A conversation's token ids, and for each whether it has loss.

    Raises:
        Bad: the template refuses it, or which tokens are a reply's cannot be known.
    """
    written = _Written(talk, tokenizer)
    spans = written.marked() if written.has_marks else written.compared()
    learn = [span for i, turn in spans.items() if talk.learn[i] for span in turn]
    if not learn:
        raise Bad("`messages` begins with the only reply to learn; put what it answers first")
    return written.tokens.label(learn)


class _Written:
    """A conversation's whole text, and where its replies stand in it.

    Attributes:
        messages: as the template gets them.
        text: all that it writes.
        whole: the messages of that text, or of its beginning, and whether it asks for a reply.
        has_marks: whether it says itself what is generated.
    """

    def __init__(self, talk: Talk, tokenizer: PreTrainedTokenizerBase):
        self.talk, self.tokenizer, self.tools = talk, tokenizer, talk.tools
        self.messages = [self._plain(message) for message in talk.messages]
        try:
            self.template = tokenizer.get_chat_template(None, self.tools)
        except ValueError as e:
            raise Bad(f"the tokenizer has no chat template for this line ({e})") from e
        self.has_marks = bool(_GENERATION.search(self.template))
        self.text, self.whole = self._all(), (self.messages, False)
        self.replies = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        self._refuse_unwritten()

    def name(self, i: int) -> str:
        """ "turn 2 (user)", as its maker counts."""
        return f"turn {i + self.talk.first} ({self.messages[i]['role']})"

    # -- what the template writes ----------------------------------------------------------------

    def write(self, messages: Messages, ask: bool = False, **changes: Any) -> str:
        """The template's text.

        Raises:
            Bad: it refuses the messages.
        """
        options: dict[str, Any] = {"tools": self.tools} | changes
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask, **options
            )
        except Exception as e:  # templates are programs of the tokenizer's makers
            raise Bad(f"the chat template refuses `messages` ({clip(str(e), 200)})") from e

    def _all(self) -> str:
        try:
            return self.write(self.messages)
        except Bad as e:
            for count in range(1, len(self.messages) + 1):
                try:
                    self.write(self.messages[:count])
                except Bad:
                    break
            raise Bad(f"{self.name(count - 1)}: {e}") from e

    def _plain(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message as a server hands it to the template, without keys that it does not know."""
        made = {key: message[key] for key in MESSAGE_KEYS if key in message}
        thought = made.pop("reasoning", made.pop("reasoning_content", None))
        if thought is not None:
            made |= {"reasoning": thought, "reasoning_content": thought}
        if isinstance(made["content"], list) and (
            made["role"] == "tool" or not self._takes_parts
        ):
            made["content"] = "\n".join(part["text"] for part in made["content"])
        return made

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the template writes the texts of content that is a list of parts."""
        part = {"type": "text", "text": "Zq7Xk"}
        try:
            text = self.write([{"role": "user", "content": [part]}])
        except Bad:
            return False
        return part["text"] in text and not re.search(r"""['"]type['"]""", text)

    def _refuse_unwritten(self) -> None:
        """Refuses what the template does not write and its maker may think that it does."""
        asked = (self.messages[:-1], self.messages[-1]["role"] == "assistant")
        if self.tools and all(
            self.write(*of) == self.write(*of, tools=None)
            for of in ((self.messages,), asked)
            if of[0]
        ):
            raise Bad("the chat template does not write `tools`; leave them out, or use a template "
                      "that does")  # fmt: skip
        for i, (given, message) in enumerate(zip(self.talk.messages, self.messages)):
            for key in given.keys() - set(MESSAGE_KEYS):
                if self.write(self._with(i, message | {key: given[key]})) != self.text:
                    raise Bad(f"{self.name(i)}: the chat template writes `{show(key)[1:-1]}`, "
                              "which servers do not hand to it; leave the key out")  # fmt: skip
        last = self.messages[-1]
        if "reasoning" in last:
            bare = {k: v for k, v in last.items() if not k.startswith("reasoning")}
            if self.write(self._with(-1, bare)) == self.text:
                raise Bad(f"{self.name(len(self.messages) - 1)}: the chat template does not write "
                          "`reasoning_content`; leave it out, or put it into `content` as the "
                          "model says it")  # fmt: skip

    def _with(self, i: int, message: dict[str, Any]) -> Messages:
        changed = list(self.messages)
        changed[i] = message
        return changed

    @cached_property
    def tokens(self) -> Tokens:
        """Of the whole text."""
        return Tokens(self.text, self.tokenizer)

    # -- where a turn stands ----------------------------------------------------------------------

    @cached_property
    def mark(self) -> str:
        """A word that the text does not hold."""
        mark = "Zq7Xk"
        while mark in self.text:
            mark += "w"
        return mark

    def find(self, i: int, *texts: tuple[Messages, bool]) -> list[int] | None:
        """Where one place within a message's own words stands in each of some texts.

        Args:
            i: the message.
            *texts: the messages of each text, and whether it asks for a reply.

        Returns:
            Positions in characters; None where no place is found in all.
        """
        wanted = [self.write(*text) for text in texts]
        for change in _insertions(self.messages[i], self.mark):
            places = []
            for (messages, ask), text in zip(texts, wanted):
                # Equal messages are marked alike: templates compare them to find the last one.
                equal = [j for j, m in enumerate(messages) if m == self.messages[i]]
                marked = [change() if j in equal else m for j, m in enumerate(messages)]
                try:
                    pieces = self.write(marked, ask).split(self.mark)
                except Bad:
                    break
                if len(pieces) != len(equal) + 1 or "".join(pieces) != text:
                    break
                places.append(sum(map(len, pieces[: equal.index(i) + 1])))
            else:
                return places
        return None

    def compared(self) -> dict[int, list[Span]]:
        """Reply -> its span, by comparing the texts of the conversation's beginnings.

        Raises:
            Bad: a reply's beginning or end cannot be known.
        """
        spans = {}
        for i in reversed(self.replies):
            if i == 0:  # nothing was asked
                continue
            first, last = self._start(i), self._end(i)
            self._refuse_missing(i, first, last)
            if i + 1 == len(self.messages):
                # Where the template writes it without what a server sends before it (a system text
                # that only a last user turn has), what a server sends takes its place.
                before = self.write(self.messages[:i], True)
                if not self.text.startswith(before):
                    self.text, self.whole = before + self.text[first:], (self.messages[:i], True)
                    first, last = len(before), len(self.text)
            spans[i] = [(first, last)]
        return spans

    def _refuse_missing(self, i: int, first: int, last: int) -> None:
        """Refuses a span that does not hold the words of reply i."""
        content = self.messages[i]["content"]
        plain = isinstance(content, str) and "tool_calls" not in self.messages[i]
        if plain and content.strip() in self.text[first:last]:
            return
        place = self.find(i, self.whole)
        if place is None or not first <= place[0] <= last:
            raise Bad(f"{self.name(i)}: the chat template does not write it as it is given; write "
                      "the text yourself as `text`")  # fmt: skip

    def _start(self, i: int) -> int:
        """Where the prompt ends that a server sends for reply i."""
        before = self.write(self.messages[:i], True)
        if self.text.startswith(before):
            return len(before)
        places = self.find(i - 1, self.whole, (self.messages[:i], True))
        if places is None:
            raise Bad(f"{self.name(i - 1)}: the chat template does not write it as it is given; "
                      "where the reply to it begins cannot be known")  # fmt: skip
        here, there = places
        asked = before[there:]
        if self.text.startswith(asked, here):
            return here + len(asked)
        if i + 1 < len(self.messages):  # as if the reply had not thought
            messages, ask = self.whole
            changed = self._with(i, self.messages[i] | {"content": self.mark})
            bare = self.write(changed[: len(messages)], ask)
            own = bare.find(self.mark)
            same = own >= here and self.text[:own] == bare[:own]
            if same and asked.startswith(self.text[here:own]):
                return own
        raise Bad(
            f"{self.name(i)}: the prompt that a server sends for it ends in {show(asked[-40:])}, "
            "which the chat template does not write before it; write the text yourself as "
            "`prompt` and `completion`"
        )

    def _end(self, i: int) -> int:
        """Where reply i ends: before what the next turn begins with."""
        upto = self.messages[: i + 1]
        if len(upto) == len(self.messages):
            return len(self.text)
        after = self.write(upto)
        if self.text.startswith(after):
            return len(after)
        texts = [(upto, False)]
        try:
            asked = self.write(upto, True)
            texts.append((upto, True))
        except Bad:
            asked = ""
        places = self.find(i, self.whole, *texts)
        if places is None:
            raise Bad(f"{self.name(i)}: the chat template does not write it as it is given; where "
                      "it ends cannot be known")  # fmt: skip
        here, *there = places
        tails = [text[place:] for text, place in zip((after, asked), there)]
        if self.text.startswith(tails[0], here):
            return here + len(tails[0])
        # Whole tokens: the next turn's header may begin with the characters of an end token.
        ends = [self.tokens.floor(here + _common(self.text[here:], tail)) for tail in tails]
        ends = [max(here, end) for end in ends]
        if min(ends) == here < max(ends):
            raise Bad(f"{self.name(i)}: the chat template ends it in another way when a turn "
                      "follows; end `messages` there")  # fmt: skip
        return min(ends)

    def marked(self) -> dict[int, list[Span]]:
        """Reply -> its spans, as the template's `{% generation %}` blocks mark them.

        Raises:
            Bad: a reply is left out.
        """
        _, found = self._blocks(self.messages)
        main = {i: self._block_with(i, len(found)) for i in self.replies}
        return {i: [found[k] for k in self._blocks_of(i, main, found)] for i in self.replies}

    def _block_with(self, i: int, count: int) -> int:
        """Number of the block, of `count`, that holds the last words of reply i."""
        for change in _insertions(self.messages[i], self.mark):
            text, blocks = self._blocks(self._with(i, change()))
            if text.count(self.mark) == 1 and text.replace(self.mark, "") == self.text:
                held = [k for k, (a, b) in enumerate(blocks) if self.mark in text[a:b]]
                if len(held) == 1 and len(blocks) == count:
                    return held[0]
                break
        raise Bad(f"{self.name(i)}: the chat template's generation blocks leave it out; use a "
                  "template without them, or write the text yourself as `text`")  # fmt: skip

    def _blocks(self, messages: Messages) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [messages], tools=self.tools, chat_template=self.template,
                return_assistant_tokens_mask=True, **self.tokenizer.special_tokens_map,
            )  # fmt: skip
        except Exception as e:  # as in `write`
            raise Bad(f"the chat template refuses `messages` ({clip(str(e), 200)})") from e
        return texts[0], [(a, b) for a, b in spans[0] if a < b]

    def _blocks_of(self, i: int, main: dict[int, int], found: list[Span]) -> Iterator[int]:
        """Numbers of the blocks that belong to reply i: its main one, and those around it."""
        order = self.replies.index(i)
        low, high = 0, len(found)
        if order:
            low = self._border(self.replies[order - 1], i, main, found)
        if order + 1 < len(self.replies):
            high = self._border(i, self.replies[order + 1], main, found)
        yield from range(low, high)

    def _border(self, a: int, b: int, main: dict[int, int], found: list[Span]) -> int:
        """The first block after reply a that belongs to reply b."""
        between = range(main[a] + 1, main[b])
        if not between or b == a + 1:
            return main[a] + 1
        place = self.find(b - 1, (self.messages, False))
        if place is None:
            return main[a] + 1
        return next((k for k in between if found[k][0] >= place[0]), main[b])


def _insertions(message: dict[str, Any], mark: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """Ways to put a mark into a message's own words: at their end, in the middle, at the start."""
    if calls := message.get("tool_calls"):
        *others, last = calls
        function = last["function"] | {"name": last["function"]["name"] + mark}
        yield lambda: message | {"tool_calls": [*others, last | {"function": function}]}
        return
    content = message["content"]
    parts = content if isinstance(content, list) else None
    text = parts[-1]["text"] if parts else content
    end = len(text.rstrip())
    for at in dict.fromkeys((end, end // 2, 0)):
        made = text[:at] + mark + text[at:]
        whole = [*parts[:-1], parts[-1] | {"text": made}] if parts else made
        yield partial(message.__or__, {"content": whole})


def _common(a: str, b: str) -> int:
    """Length of the beginning that two texts share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))
