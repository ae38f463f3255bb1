"""Which content a LoRA request means: checked and stamped before an engine sees the request.

An engine that knows an adapter by a name or an id of the user's mixes its contents up when its
files change: in the KV cache, in requests that wait, in a batch. So every content has an id of its
own in the engine, and the request carries the content's hash (`serving/adapters.py`). Whoever
reloads an adapter makes a new version; requests that have the old one keep it to their end.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import list_directory
from vllm_adafuse.format.config import CONFIG_FILE
from vllm_adafuse.serving.adapters import (
    OpenedAdapter,
    files_state,
    open_adapter,
    split_path,
    stamp_path,
)
from vllm_adafuse.serving.fits import Fits
from vllm_adafuse.serving.holds import Holds
from vllm_adafuse.serving.metrics import counts_refusals
from vllm_adafuse.serving.pool import misfits

# The engine keeps ids in int32.
MAX_ID = 2**31 - 1
# Contents that are remembered to tell their ids apart; of older ones the worker compares the hash.
MAX_CONTENTS = 1 << 16
# A file that was written so shortly before it was read may have changed since at the same time and
# size: file systems count time in steps of several milliseconds.
SETTLED_NS = 2 * 10**9


class AdapterRefused(AdapterError, VLLMValidationError):
    """An adapter that a request cannot have: the request's fault, not the server's."""

    # Of VLLMValidationError, whose own __init__ a ValueError may stand before.
    parameter = value = None

    @classmethod
    def from_text(cls, text: str) -> AdapterRefused | None:
        """An `AdapterError` of a worker that arrives as text, with words of vLLM's around it."""
        match = re.search(r"(adapter [^\n]*) cannot be used:((?:\n  - [^\n]*)+)", text)
        return cls(match[1], match[2].split("\n  - ")[1:]) if match else None


class AdapterAbsent(AdapterRefused):
    """There is no such directory."""


class Checks:
    """Opens adapters for a front end, each content once.

    Args:
        vllm_config: of the engine, whose backbone adapters must fit. Of a class outside the table
            of architectures the worker checks names: Hugging Face's may be others than in the
            checkpoint, which vLLM's own model follows.
    """

    def __init__(self, vllm_config: VllmConfig):
        self._fits = Fits(vllm_config)
        self._locks: defaultdict[Path, Lock] = defaultdict(Lock)
        self._opened: dict[Path, tuple[tuple, int, OpenedAdapter]] = {}

    @counts_refusals
    def open(self, lora_path: str, again: bool = False) -> OpenedAdapter:
        """Finds, opens and checks an adapter. Takes as long as reading it the first time, then two
        look-ups in the file system as long as its files are the same.

        Args:
            lora_path: a directory or a hub name, as vLLM takes it.
            again: read it in any case.

        Raises:
            AdapterAbsent: nothing is there.
            AdapterRefused: it cannot be served.
        """
        path = find_directory(lora_path)
        with self._locks[path]:
            state, now = files_state(path), time.time_ns()
            known, when, opened = self._opened.get(path, (None, 0, None))
            if not again and known == state and all(s[1] + SETTLED_NS < when for s in state):
                return opened
            try:
                opened = open_adapter(path, self._fits.backbone, self._fits.rest)
                if problems := self._fits.problems(opened, warn=True):
                    raise AdapterError(f"adapter {path}", problems)
            except AdapterError as e:
                raise AdapterRefused(e.subject, e.problems) from e
            self._opened[path] = state, now, opened
            return opened


def find_directory(lora_path: str) -> Path:
    """Where an adapter lies on this machine: vLLM's rule, a hub name is downloaded.

    Raises:
        AdapterAbsent: nowhere.
        AdapterRefused: it is no directory, or cannot be read.
    """
    from vllm.lora.utils import get_adapter_absolute_path

    reason = ""
    try:
        found = get_adapter_absolute_path(lora_path)
    except Exception as e:  # a hub's client raises errors of many types
        found, reason = lora_path, f", and it could not be downloaded ({type(e).__name__})"
    path = Path(os.path.abspath(found))
    _, problems = list_directory(path)
    if problems and not os.path.lexists(path):
        raise AdapterAbsent(
            f"adapter {lora_path}",
            [f"no such directory{reason}; name the directory that holds {CONFIG_FILE}"],
        )
    if problems:
        raise AdapterRefused(f"adapter {lora_path}", problems)
    return path


@dataclass
class Loading:
    """One load over HTTP: vLLM's own code asks the engine in its midst.

    Attributes:
        opened: what was checked before.
        stamped: what the engine has got.
        refusal: why it has not.
        ends: are called when it is over.
    """

    opened: OpenedAdapter | None = None
    stamped: LoRARequest | None = None
    refusal: AdapterRefused | None = None
    ends: list[Callable[[], Any]] = field(default_factory=list)


_LOADING: ContextVar[Loading | None] = ContextVar("adafuse_loading", default=None)


@contextmanager
def loading() -> Iterator[Loading]:
    """Around a load by vLLM's server: its ids are numbers that it counts, so versions have ids of
    their content from the first on."""
    load = Loading()
    token = _LOADING.set(load)
    try:
        yield load
    finally:
        _LOADING.reset(token)
        for end in load.ends:
            end()


def current_loading() -> Loading | None:
    """The load over HTTP that this code runs for."""
    return _LOADING.get()


@dataclass
class _Content:
    """What an id of the engine stands for: whose (a name of the server's, or a user's id), which
    content, the request as the user made it and as the engine gets it, and its files."""

    whose: str | int
    digest: str
    request: LoRARequest
    stamped: LoRARequest
    opened: OpenedAdapter


class Versions:
    """The versions of a front end's adapters. May be asked by several threads.

    Args:
        open_path: `(lora_path, again) -> OpenedAdapter`, see `Checks.open`.
        max_loras: vLLM's option.
        max_lora_rank: likewise.
        max_cpu_loras: likewise.

    Attributes:
        holds: who needs which version.
    """

    def __init__(
        self,
        open_path: Callable[[str, bool], OpenedAdapter],
        max_loras: int,
        max_lora_rank: int,
        max_cpu_loras: int | None = None,
    ):
        self.open_path, self._options = open_path, (max_loras, max_lora_rank)
        self.holds = Holds(max_cpu_loras or max_loras, self._can_be_read_again)
        self._lock = Lock()
        self._contents: OrderedDict[int, _Content] = OrderedDict()
        # What a user's request stands for, by name, id and path.
        self._stamped: dict[tuple[str, int, str], LoRARequest] = {}
        # The id of the version that a name of the server's, or a user's id, stands for.
        self._latest: dict[str | int, int] = {}

    def known(self, request: LoRARequest) -> LoRARequest | None:
        """What `stamp` gives for a request that is stamped already, or was seen before and does not
        ask for a reload: a look-up. None: its files must be looked at."""
        path, digest = split_path(request.lora_path)
        if digest and self._stands_for(request.lora_int_id, digest):
            return request
        if request.load_inplace or digest or current_loading():
            return None
        return self._stamped.get((request.lora_name, request.lora_int_id, path))

    @counts_refusals
    def stamp(self, request: LoRARequest) -> LoRARequest:
        """The request as the engine gets it.

        Args:
            request: of a user, not changed.

        Raises:
            AdapterRefused: its adapter cannot be served.
        """
        if (known := self.known(request)) is not None:
            return known
        path, expected = split_path(request.lora_path)
        load = current_loading()
        opened = load.opened if load and load.opened else self.open_path(path, False)
        if expected not in (None, opened.digest):
            raise AdapterRefused(
                f"adapter {path}",
                [
                    f"its content has the hash {opened.digest}, expected {expected}, which the "
                    "request asks for; load it again"
                ],
            )
        if problems := misfits(opened.size, *self._options):
            raise AdapterRefused(f"adapter {opened.path}", problems)
        whose = request.lora_name if load else request.lora_int_id
        with self._lock:
            engine_id = self._id_of(whose, opened.digest)
            stamped = msgspec.structs.replace(
                request,
                lora_int_id=engine_id,
                lora_path=stamp_path(path, opened.digest, opened.size),
                load_inplace=False,
            )
            self._contents[engine_id] = _Content(
                whose, opened.digest, request, stamped, opened
            )
            self._contents.move_to_end(engine_id)
            while len(self._contents) > MAX_CONTENTS:
                self._contents.popitem(last=False)
        return stamped

    def adopt(self, request: LoRARequest, stamped: LoRARequest) -> LoRARequest:
        """From now on the user's request stands for this version; returns it."""
        if request is not stamped:
            path, _ = split_path(request.lora_path)
            with self._lock:
                self._stamped[request.lora_name, request.lora_int_id, path] = stamped
            self._stand(request.lora_int_id, stamped.lora_int_id)
        return stamped

    def adopt_name(self, stamped: LoRARequest) -> None:
        """From now on a name of the server's stands for this version."""
        self._stand(stamped.lora_name, stamped.lora_int_id)

    def forget_name(self, name: str) -> None:
        """A name of the server's stands for nothing now."""
        self._stand(name, None)

    def _stand(self, whose: str | int, engine_id: int | None) -> None:
        """A name or a user's id stands for a version now, or for none."""
        with self._lock:
            before = self._latest.pop(whose, None)
            if engine_id is not None:
                self._latest[whose] = engine_id
        if engine_id != before:
            if engine_id is not None:
                self.holds.add_name(engine_id)
            if before is not None:
                self.holds.drop_name(before)

    def current(self, stamped: LoRARequest) -> LoRARequest:
        """A request as it is, unless its version went while it was on its way here: then it has the
        one that its name stands for now."""
        engine_id = stamped.lora_int_id
        if engine_id in self.holds.resident or self.holds.needed(engine_id):
            return stamped
        return self.standing(stamped.lora_name) or stamped

    def standing(self, whose: str | int) -> LoRARequest | None:
        """The version, as the engine gets it, that a name or a user's id stands for now."""
        with self._lock:
            content = self._contents.get(self._latest.get(whose, 0))
        return content.stamped if content else None

    def _stands_for(self, engine_id: int, digest: str) -> bool:
        with self._lock:
            content = self._contents.get(engine_id)
            if content is None or content.digest != digest:
                return False
            self._contents.move_to_end(engine_id)
            return True

    def _id_of(self, whose: str | int, digest: str) -> int:
        """The id of a content: the user's own for the first, else bits of its hash that no other
        content has."""
        attempt = 0
        candidate = whose if isinstance(whose, int) else 0
        while not 0 < candidate <= MAX_ID or not self._is_free(candidate, whose, digest):
            seed = f"{whose!r} {digest} {attempt}".encode()
            candidate = int.from_bytes(hashlib.sha256(seed).digest()[:4], "little") & MAX_ID
            attempt += 1
        return candidate

    def _is_free(self, engine_id: int, whose: str | int, digest: str) -> bool:
        content = self._contents.get(engine_id)
        return content is None or (content.whose, content.digest) == (whose, digest)

    # In the user's words.

    def users_request(self, stamped: LoRARequest) -> LoRARequest:
        """The request that the user made."""
        content = self._contents.get(stamped.lora_int_id)
        same = content is not None and content.request.lora_name == stamped.lora_name
        return content.request if same else stamped

    def users_ids(self, engine_ids: Iterable[int]) -> set[int]:
        """The user's ids of what the engine has; of several versions one."""
        found = {i: self._contents.get(i) for i in engine_ids}
        return {
            c.whose if c and isinstance(c.whose, int) else i
            for i, c in found.items()
            if c is None or c.whose in self._latest
        }

    def forget(self, user_id: int) -> list[int]:
        """A user's id stands for nothing now: its files are read again when a request names it.

        Returns:
            The ids that the engine can do without at once. Those of requests that have not ended
            are released when they have.
        """
        with self._lock:
            for key in [key for key in self._stamped if key[1] == user_id]:
                del self._stamped[key]
            latest = self._latest.pop(user_id, None)
            found = {i for i in self.holds.resident if self._owner(i) == user_id}
        if latest is not None:
            self.holds.drop_name(latest, forget=False)
            found.add(latest)
        return sorted(i for i in found or {user_id} if not self.holds.needed(i))

    def _can_be_read_again(self, engine_id: int) -> bool:
        content = self._contents.get(engine_id)
        return content is not None and content.opened.unchanged()

    def _owner(self, engine_id: int) -> str | int | None:
        content = self._contents.get(engine_id)
        return content.whose if content else None
