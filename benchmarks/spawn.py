"""Processes that are spawned by threads at the same time, each with variables of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import process
from multiprocessing.context import SpawnProcess
from unittest.mock import patch


class _Thread(threading.local):
    env: Mapping[str, str] = {}


_OWN, _ONE = _Thread(), threading.Lock()
_usual = SpawnProcess._Popen


def _popen(spawned: process.BaseProcess):
    with _ONE, patch.dict(os.environ, _OWN.env):  # os.environ is what a new process gets
        return _usual(spawned)


@contextmanager
def spawned_with(env: Mapping[str, str]) -> Iterator[None]:
    """In this block, processes that this thread spawns have these variables, and those of other
    threads have not."""
    SpawnProcess._Popen = staticmethod(_popen)
    before, _OWN.env = _OWN.env, env
    try:
        yield
    finally:
        _OWN.env = before
