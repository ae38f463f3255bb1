"""Programs of a launch as a GPU may run them: at once, not one after the other.

Triton's interpreter runs a grid in its order, so whoever waits for a program in front of it always
finds it done: a wait that is missing shows in nothing. Here the last program begins first, and
whenever one asks a semaphore how far the others are, one more of those in front runs to its end.
"""

from __future__ import annotations

import inspect

import pytest
from triton.runtime import interpreter


class Waits:
    """How often programs asked, and the launch under way."""

    def __init__(self):
        self.asked = self.in_vain = self.count = 0
        self.run = None
        self.left: list[tuple] = []

    def launch(self, grid, run) -> None:
        """Runs all programs of a grid of up to three numbers, the last one first."""
        x, y, z = (*grid, 1, 1)[:3]
        self.left = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
        self.run, self.in_vain, self.count = run, 0, len(self.left)
        while self.left:
            self._one(self.left.pop())

    def ask(self) -> None:
        """One of the programs in front runs, in the midst of the one that asks."""
        self.asked += 1
        if not self.left:
            self.in_vain += 1
            if self.in_vain > self.count:
                raise RuntimeError("programs wait, and there is none left to wait for")
            return
        builder = interpreter.interpreter_builder
        asking = builder.grid_idx
        self._one(self.left.pop(0))
        builder.grid_idx = asking

    def _one(self, place: tuple) -> None:
        interpreter.interpreter_builder.set_grid_idx(*place)
        self.run()


@pytest.fixture
def all_at_once(monkeypatch):
    """Launches run so; gives their `Waits`."""
    waits, builder = Waits(), interpreter.InterpreterBuilder
    rmw = builder.create_atomic_rmw

    def call(self, *arguments, **constants):
        names = inspect.getfullargspec(self.fn).args
        constants = {name: value for name, value in constants.items() if name in names}
        scope = interpreter._patch_lang(self.fn)
        try:
            bound = inspect.getcallargs(self.fn, *arguments, **constants)
            bound = {
                name: value if name in self.constexprs else interpreter._implicit_cvt(value)
                for name, value in bound.items()
            }
            interpreter.interpreter_builder.set_grid_dim(*(*self.grid, 1, 1)[:3])
            waits.launch(self.grid, lambda: self.fn(**bound))
        finally:
            scope.restore()

    def ask(self, operation, pointer, value, *rest):
        if not value.data.any():  # nothing is added: it is a question
            waits.ask()
        return rmw(self, operation, pointer, value, *rest)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    monkeypatch.setattr(builder, "create_atomic_rmw", ask)
    return waits
