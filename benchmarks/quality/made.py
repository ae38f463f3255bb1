"""Text that programs write, made here: logs of a service, and tables that add up.

Every text is of one run with its own names and numbers, from a seed: what comes later in it
depends on what came before (requests that are open, levels that follow from what happened, sums).
"""

from __future__ import annotations

import random
from collections.abc import Callable

SERVICES = ("gateway", "billing", "search", "auth", "catalog", "mailer", "ledger", "scheduler")
PATHS = ("/v1/orders", "/v1/users", "/health", "/v2/search", "/login", "/v1/items", "/metrics")
ERRORS = (
    ("TimeoutError", "no answer from {host} within {n} ms"),
    ("ConnectionRefusedError", "[Errno 111] {host}:{port} refused the connection"),
    ("KeyError", "'{key}'"),
    ("ValueError", "invalid literal for int() with base 10: '{key}'"),
)
KEYS = ("customer_id", "total", "locale", "token", "currency", "sku")
PLACES = ("Aachen", "Bergen", "Cork", "Dijon", "Evora", "Fulda", "Gent", "Hull", "Imola", "Jena")
GOODS = ("bolt", "washer", "hinge", "valve", "bearing", "gasket", "spring", "pulley", "rivet")


def log(rng: random.Random, lines: int) -> str:
    """A service's log: requests open, wait and end; some fail, with a traceback."""
    host = f"{rng.choice(SERVICES)}-{rng.randrange(1, 40):02}"
    clock, opened, wrong, out = rng.randrange(10**6, 8 * 10**7), {}, 0, []
    day = f"2026-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}"

    def say(level: str, what: str) -> None:
        s, ms = divmod(clock, 1000)
        stamp = f"{day}T{s // 3600 % 24:02}:{s // 60 % 60:02}:{s % 60:02}.{ms:03}Z"
        out.append(f"{stamp} {level:<5} [{host}] {what}")

    while len(out) < lines:
        clock += rng.randrange(1, 900)
        if opened and rng.random() < 0.5:
            key = rng.choice(sorted(opened))
            begin, method, path = opened.pop(key)
            took = clock - begin
            if rng.random() < 0.06:
                wrong += 1
                name, text = rng.choice(ERRORS)
                text = text.format(host=rng.choice(SERVICES), n=took, port=rng.randrange(3000, 9999),
                                   key=rng.choice(KEYS))  # fmt: skip
                say("ERROR", f"req={key} {method} {path} status=500 took={took}ms errors={wrong}")
                out.append("Traceback (most recent call last):")
                for _ in range(rng.randrange(1, 4)):
                    module, line = rng.choice(SERVICES), rng.randrange(10, 400)
                    out.append(f'  File "/srv/{module}/{rng.choice(KEYS)}.py", line {line}, in run')
                out.append(f"{name}: {text}")
            else:
                status = rng.choice((200, 200, 200, 201, 304, 404))
                size = "" if status == 304 else f" bytes={rng.randrange(90, 40_000)}"
                level = "WARN" if status == 404 or took > 2500 else "INFO"
                say(level, f"req={key} {method} {path} status={status} took={took}ms{size}")
        elif rng.random() < 0.9:
            key, method = f"{rng.getrandbits(32):08x}", rng.choice(("GET", "GET", "POST", "PUT"))
            path = rng.choice(PATHS) + (f"/{rng.randrange(1, 9999)}" if rng.random() < 0.5 else "")
            opened[key] = clock, method, path
            say("DEBUG", f"req={key} {method} {path} accepted, {len(opened)} open")
        else:
            say("INFO", f"pool: {len(opened)} of 64 busy, {wrong} errors, heap "
                f"{rng.randrange(80, 900)} MB")  # fmt: skip
    return "\n".join(out) + "\n"


def ledger(rng: random.Random, lines: int) -> str:
    """A table of sales as CSV: prices belong to goods, amounts are products, and sums follow."""
    goods = rng.sample(GOODS, 5)
    prices = {name: rng.randrange(15, 4000) for name in goods}
    day, total, number, out = rng.randrange(1, 300), 0, rng.randrange(1000, 90_000), []
    mark = rng.choice(",;\t")
    out.append(mark.join(("no", "date", "place", "item", "count", "price", "amount", "balance")))
    for _ in range(lines):
        number += 1
        day += rng.random() < 0.2
        name, count = rng.choice(goods), rng.randrange(1, 60)
        amount = count * prices[name]
        total += amount
        date = f"2026-{day // 28 % 12 + 1:02}-{day % 28 + 1:02}"
        out.append(mark.join((
            str(number), date, rng.choice(PLACES), name, str(count), f"{prices[name] / 100:.2f}",
            f"{amount / 100:.2f}", f"{total / 100:.2f}",
        )))  # fmt: skip
    return "\n".join(out) + "\n"


MADE: dict[str, Callable[[random.Random, int], str]] = {"logs": log, "tables": ledger}
LINES, LINE_BYTES = (8, 120), 80  # of a text; of a line, about


def make(name: str, wanted: float, fewest: int) -> list[str]:
    """Texts of a domain of MADE, the same each time.

    Args:
        name: of the domain.
        wanted: bytes in all.
        fewest: texts, as far as shorter ones achieve it.
    """
    texts, total, seed = [], 0, 0
    lines = min(LINES[1], max(LINES[0], int(wanted / fewest / LINE_BYTES)))
    while total < wanted:
        texts.append(MADE[name](random.Random(f"{name} {seed}"), lines))
        total += len(texts[-1].encode())
        seed += 1
    return texts
