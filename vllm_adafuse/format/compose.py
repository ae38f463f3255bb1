"""One checkpoint directory from a backbone and an adapter: `vllm serve DIR` needs no flags.

    COMPOSED_DIR/
      config.json           the backbone's, with architectures [AdaFuse…] and section `adafuse`
      model.safetensors …   every other file of the backbone, in its folder, linked or copied
      adafuse/              a copy of the adapter; its base_model_name_or_path is ".."
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path, PurePosixPath

from tqdm import tqdm
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import ADAPTER_KEY, CONFIG_FILE, SECTION, WEIGHTS_FILE
from vllm_adafuse.format.places import CONFIGS
from vllm_adafuse.format.reading import read_object
from vllm_adafuse.format.tree import check_out, tree_files

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

    Linked files are the backbone's own: do not edit them in place. The adapter is always copied.

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
    config = read_object(base / "config.json", f"backbone {base}")
    files = {out / name: source for name, source in backbone_files(base, config).items()}
    if clash := next((name for name in files if name.is_relative_to(out / ADAPTER_DIR)), None):
        raise AdapterError(
            f"backbone {base}",
            [
                f"{clash.relative_to(out)}: {ADAPTER_DIR} is where a composed checkpoint keeps its "
                "adapter; give it another name"
            ],
        )
    own = {out / ADAPTER_DIR / WEIGHTS_FILE: (checked.path / WEIGHTS_FILE).resolve(strict=True)}
    config["architectures"] = [backbone.adafuse_name]
    config[SECTION] = {ADAPTER_KEY: ADAPTER_DIR}
    adapter_config = read_object(checked.path / CONFIG_FILE, f"adapter {checked.path}")
    adapter_config["base_model_name_or_path"] = ".."
    try:
        (out / ADAPTER_DIR).mkdir(parents=True)
        for folder in {target.parent for target in files}:
            folder.mkdir(parents=True, exist_ok=True)
        if not copy:
            for target, source in files.items():
                _link(source, target)
        _copy_all(files | own if copy else own, progress)
        _write_object(out / ADAPTER_DIR / CONFIG_FILE, adapter_config)
        # Last: without it an interrupted composition is no checkpoint.
        _write_object(out / "config.json", config)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return out


def backbone_files(base: Path, config: dict) -> dict[PurePosixPath, Path]:
    """What a checkpoint made of a backbone takes along: all but its config.json and what vLLM would
    read in its place, the weights that some keep in a folder in Meta's form
    (original/consolidated.00.pth), which no server reads, and, where it is itself a composed one,
    its adapter.

    Args:
        base: the directory, absolute and without links.
        config: its config.json.

    Returns:
        Relative path -> the real file.

    Raises:
        AdapterError, FileNotFoundError: see `tree_files`.
    """
    section = config.get(SECTION)
    adapter = section.get(ADAPTER_KEY) if isinstance(section, dict) else None
    return {
        name: file
        for name, file in tree_files(base, CONFIGS).items()
        if not (isinstance(adapter, str) and name.is_relative_to(adapter))
        and not (len(name.parts) > 1 and name.match("consolidated.*"))
    }


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
