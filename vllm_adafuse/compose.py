"""One checkpoint directory from a backbone and an adapter: `vllm serve DIR` needs no flags.

    COMPOSED_DIR/
      config.json           the backbone's, with architectures [AdaFuse…] and section `adafuse`
      model.safetensors …   every other file of the backbone, linked or copied
      adafuse/              the adapter; its base_model_name_or_path is ".."
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm
from vllm_adafuse.adapter import load_adapter
from vllm_adafuse.backbone import Backbone
from vllm_adafuse.config import ADAPTER_KEY, CONFIG_FILE, SECTION, WEIGHTS_FILE
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.places import CONFIGS
from vllm_adafuse.reading import FileProblem, open_regular, read_object

ADAPTER_DIR = "adafuse"
_CHUNK = 16 << 20
# Another file system, a file of another owner, one with too many links, no links at all.
_NO_HARD_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP)


def compose(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    copy: bool = False,
    progress: bool = False,
) -> Path:
    """Writes a checkpoint directory that serves a backbone with an adapter.

    Linked files are the backbone's own: do not edit them in place.

    Args:
        base: the backbone's directory (symbolic links of a hub cache are resolved).
        adapter: the adapter's directory, checked against the backbone.
        out: the directory to write; absent or empty.
        copy: copy files instead of linking them.
        progress: show a progress bar while copying.

    Returns:
        `out`, absolute.

    Raises:
        AdapterError: the adapter or backbone cannot be used, or `out` is taken.
        OSError: a file cannot be read or written; `out` is then removed.
    """
    base, out = Path(base).resolve(), Path(out).absolute()
    check_out(base, out)
    backbone = Backbone.from_path(str(base))
    checked = load_adapter(adapter, backbone)
    files = dict(_backbone_files(base, out))
    files[out / ADAPTER_DIR / WEIGHTS_FILE] = (checked.path / WEIGHTS_FILE).resolve(strict=True)

    config = read_object(base / "config.json", f"backbone {base}")
    config["architectures"] = [backbone.adafuse_name]
    config[SECTION] = {ADAPTER_KEY: ADAPTER_DIR}
    adapter_config = read_object(checked.path / CONFIG_FILE, f"adapter {checked.path}")
    adapter_config["base_model_name_or_path"] = ".."
    try:
        (out / ADAPTER_DIR).mkdir(parents=True)
        if copy:
            _copy_all(files, progress)
        else:
            for target, source in files.items():
                _link(source, target)
        _write_object(out / ADAPTER_DIR / CONFIG_FILE, adapter_config)
        # Last: without it an interrupted composition is no checkpoint.
        _write_object(out / "config.json", config)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return out


def check_out(base: Path, out: Path) -> None:
    subject = f"output directory {out}"
    if out.resolve() == base:
        raise AdapterError(subject, ["it is the backbone itself; name a new directory"])
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise AdapterError(subject, ["it is a file or a link; name a new directory"])
    if out.is_dir() and any(out.iterdir()):
        raise AdapterError(subject, ["it is not empty; name a new directory or empty it"])


def _backbone_files(base: Path, out: Path) -> Iterator[tuple[Path, Path]]:
    """Pairs of target and real source: all files of the directory but config.json, and but what
    vLLM would read in its place."""
    for entry in sorted(base.iterdir()):
        if entry.name not in CONFIGS and not entry.is_dir():
            source = entry.resolve(strict=True)
            try:
                open_regular(entry).close()  # a pipe would block who copies it
            except FileProblem as e:
                raise AdapterError(f"backbone {base}", [str(e)]) from e
            yield out / entry.name, source


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as e:
        if e.errno not in _NO_HARD_LINK:
            raise
        target.symlink_to(source)


def _copy_all(files: dict[Path, Path], progress: bool) -> None:
    total = sum(source.stat().st_size for source in files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="copy", disable=not progress) as bar:
        for target, source in files.items():
            with source.open("rb") as reader, target.open("wb") as writer:
                while data := reader.read(_CHUNK):
                    writer.write(data)
                    bar.update(len(data))


def _write_object(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
