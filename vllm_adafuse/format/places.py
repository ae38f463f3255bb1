"""Where adapters and backbones lie, and what lies instead where one was expected."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.keys import CONFIG_FILE, WEIGHTS_FILE
from vllm_adafuse.text import some

MODEL_CONFIG = "config.json"
MISTRALS_CONFIG = "params.json"
CONFIGS = (MODEL_CONFIG, MISTRALS_CONFIG)  # vLLM reads either
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# Folders that are looked into below a directory that is not what it should be.
_DEPTH, _FOLDERS = 2, 200


def adapter_problem(root: Path) -> str | None:
    """What is wrong with a path that should be an adapter's directory, and where to go instead.

    Args:
        root: absolute.

    Returns:
        One sentence, or None where it holds adapter_config.json, or tells nothing.
    """
    wanted = f"expected the directory that holds {CONFIG_FILE}"
    if not os.path.lexists(root):
        return f"{root}: no such directory; {_instead(root, CONFIG_FILE)}"
    if root.is_file():
        return f"{root}: is a file, {wanted}; {_of_file(root, (CONFIG_FILE, WEIGHTS_FILE))}"
    if not root.is_dir() or os.path.lexists(root / CONFIG_FILE):
        return None
    if (root / MODEL_CONFIG).is_file():
        own = root / "adafuse"
        if (own / CONFIG_FILE).is_file():
            return f"{root}: is a composed checkpoint, {wanted}; its adapter is {own}"
        return (
            f"{root}: is a checkpoint of a whole model ({MODEL_CONFIG}), {wanted}; if backbone and "
            "adapter were swapped, name them the other way round, else name the adapter"
        )
    if found := _below(root, CONFIG_FILE):
        return f"{root}: {CONFIG_FILE} is missing here, but {_listed(root, found)}"
    if (root / "trainer_state.json").is_file():
        return (
            f"{root}: is a checkpoint to resume training from, {wanted}; name the directory that "
            "`vllm-adafuse train --output` was given"
        )
    return None


def backbone_problem(name: str) -> str:
    """Why a name that was given for a backbone is none, and where to go instead."""
    root, shown = Path(name).expanduser(), _plain(name)
    wanted = f"expected a checkpoint's directory, with {MODEL_CONFIG}"
    if not name:
        return f"its name is empty, {wanted}"
    try:
        if root.is_file():
            what = " in GGUF, which holds no Hugging Face names" if root.suffix == ".gguf" else ""
            return f"{root}: is a file{what}, {wanted}; {_of_file(root, (MODEL_CONFIG,))}"
        if root.is_dir():
            return _directory_without_config(root, wanted)
    except OSError as e:
        return f"{shown}: cannot be read ({e.strerror}), {wanted}; check its permissions and links"
    except ValueError:  # a NUL
        return f"{shown}: is no path, {wanted}"
    if _HUB_NAME.fullmatch(name) and not name.startswith("."):
        return (
            f"{shown} is not on this machine: it is neither a directory here nor in the Hugging "
            f"Face cache, and nothing is downloaded; name its directory, or get it first: hf "
            f"download {shown}"
        )
    return (
        f"{shown} is not on this machine: it is neither a directory with a {MODEL_CONFIG} nor in "
        f"the Hugging Face cache; {_instead(root, MODEL_CONFIG)}"
    )


def output_problem(out: Path) -> str | None:
    """Why a directory cannot be made here, said before hours of work for it.

    Args:
        out: the directory to write; absent or empty.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        return "it is a file or a link; name a new directory"
    if out.is_dir() and any(out.iterdir()):
        held = [name for name in (CONFIG_FILE, MODEL_CONFIG) if (out / name).is_file()]
        holds = f": it holds {held[0]} (is the order of the arguments right?)" if held else ""
        return f"it is not empty{holds}; name a new directory"
    above = next(p for p in (out, *out.absolute().parents) if os.path.lexists(p))
    if not above.is_dir():
        return f"{above} is a file, expected a folder; name another directory"
    if not os.access(above, os.W_OK | os.X_OK):
        return f"{above} may not be written (permission denied); name another directory"
    return None


def find_local_backbone(name: str, revision: str | None = None) -> Path | None:
    """The directory of a backbone on this machine, without asking the network.

    Args:
        name: a directory, or a hub name whose snapshot is in the Hugging Face cache.
        revision: of the hub name; default its main branch.

    Returns:
        The directory that holds its config.json, or None.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    root = Path(name).expanduser()
    try:
        # Also what is no file: who reads it says what it is.
        if name and os.path.lexists(root / MODEL_CONFIG):
            return root
        cached = try_to_load_from_cache(name, MODEL_CONFIG, revision=revision)
    except (HFValidationError, OSError, ValueError):  # no hub name; no path of this machine
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def require_backbone(
    name: str, lora: Path | None = None, revision: str | None = None, option: str = ""
) -> Path:
    """The directory of a backbone that must be on this machine.

    Args:
        name: a directory or a name in the Hugging Face cache.
        lora: the directory of a LoRA that gives that name. A relative path starts where the
            training was started, which is often beside the LoRA.
        revision: of a hub name.
        option: that names a backbone on the command line, if one does.

    Raises:
        AdapterError: it is not here, or several directories are meant by the name.
    """
    places = [] if lora is None or not name else [Path(lora), Path(lora).parent]
    try:
        beside = [p / name for p in places if (p / name / MODEL_CONFIG).is_file()]
    except (OSError, ValueError):  # too long, a NUL in it: no path
        beside = []
    own = find_local_backbone(name, revision)
    found = {path.resolve(): path for path in (*beside, *([own] if own else []))}
    if len(found) == 1:
        return own or beside[0]
    subject = f"backbone {_plain(name)}"
    if found:
        listed = " and ".join(str(path) for path in found)
        raise AdapterError(subject, [f"means {listed}; name the right one by {option}"])
    by = f"; {option} names a backbone" if option else ""
    raise AdapterError(subject, [backbone_problem(name) + by])


def written_name(name: str, found: Path) -> str:
    """What an adapter's config says of a backbone: the absolute path, or a hub name as it is."""
    root = Path(name).expanduser()
    if root.exists():
        return os.path.abspath(root)
    return name if find_local_backbone(name) is not None else os.path.abspath(found)


def revision_notes(lora: dict[str, Any], named: str, found: Path) -> list[str]:
    """What must be remembered of a LoRA's backbone that is a revision on the hub: our format's
    config has no place for it.

    Args:
        lora: the LoRA's config.
        named: what is written of the backbone.
        found: its directory.
    """
    revision = lora.get("revision")
    if not isinstance(revision, str) or Path(named).exists() or find_local_backbone(named) == found:
        return []
    return [f"the backbone is revision {revision} of {named}: serve it with --revision {revision}"]


def _directory_without_config(root: Path, wanted: str) -> str:
    if (root / CONFIG_FILE).is_file():
        return (
            f"{root}: is an adapter ({CONFIG_FILE}), {wanted}; if backbone and adapter were "
            "swapped, name them the other way round"
        )
    if (root / MISTRALS_CONFIG).is_file():
        return (
            f"{root}: is in Mistral's own format ({MISTRALS_CONFIG}) alone, {wanted}; get the "
            "Hugging Face files of it too"
        )
    if found := _below(root, MODEL_CONFIG):
        return f"{root}: {MODEL_CONFIG} is missing here, but {_listed(root, found)}"
    if any(root.glob("*.gguf")):
        return f"{root}: holds GGUF files, {wanted}; take the checkpoint that they were made from"
    return f"{root}: {MODEL_CONFIG} is missing, {wanted}; name the directory that holds it"


def _of_file(file: Path, names: tuple[str, ...]) -> str:
    """What to name instead of a file."""
    if any((file.parent / name).is_file() for name in names):
        return f"name {file.parent}"
    return "name a directory"


def _instead(root: Path, wanted: str) -> str:
    """What may have been meant by a path that does not exist."""
    if root.parent.is_dir():
        near = get_close_matches(root.name, _entries(root.parent), 1, 0.75)
        if near:
            return f"did you mean {root.parent / near[0]}?"
        return f"name the directory that holds {wanted}"
    return f"{root.parent} does not exist either; name the directory that holds {wanted}"


def _entries(root: Path) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(root) if entry.is_dir()]
    except OSError:  # not ours to read: only looking for a sign
        return []


def _below(root: Path, name: str) -> list[Path]:
    """Folders up to two levels down that hold a file of that name, the newest checkpoint first."""
    level, found = [root], []
    for _ in range(_DEPTH):
        level = [p / entry for p in level for entry in _entries(p)][:_FOLDERS]
        found += [p for p in level if (p / name).is_file()]
    return sorted(found, key=lambda p: [(-int(s), "") if s.isdigit() else (0, s)
                                        for s in re.split(r"(\d+)", str(p))])  # fmt: skip


def _listed(root: Path, found: list[Path]) -> str:
    """"its folder sql has one: name DIR/sql"."""
    if len(found) == 1:
        return f"its folder {found[0].relative_to(root)} has it; name {found[0]}"
    names = some([str(p.relative_to(root)) for p in found])
    return f"its folders {names} have it; name one of them, such as {found[0]}"


def _plain(name: str) -> str:
    """A name as a config gives it: no control characters, of a path's length at most."""
    return name.encode("unicode_escape").decode()[:400]

