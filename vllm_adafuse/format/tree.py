"""The files of a backbone's directory, folders and all, that a new checkpoint takes along."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.places import output_problem
from vllm_adafuse.format.reading import FileProblem, open_regular

# What programs note about this copy of a checkpoint: git, and Hugging Face's download.
NOT_ITS_OWN = (".git", ".cache")


def tree_files(base: Path, leave: tuple[str, ...] = ()) -> dict[PurePosixPath, Path]:
    """Every file below a directory, links followed.

    Args:
        base: the directory, absolute and without links.
        leave: names directly below it that are left out.

    Returns:
        Path relative to `base` -> the real file, sorted.

    Raises:
        AdapterError: something there is neither file nor folder, cannot be read, or is a link to a
            folder that it lies in.
        FileNotFoundError: a link leads nowhere.
    """
    found = dict(_walk(base, PurePosixPath(), (), {*leave, *NOT_ITS_OWN}))
    return {name: found[name] for name in sorted(found)}


def _walk(
    folder: Path, at: PurePosixPath, above: tuple[Path, ...], leave: set[str]
) -> Iterator[tuple[PurePosixPath, Path]]:
    above = (*above, folder)
    try:
        names = sorted(os.listdir(folder))
    except PermissionError as e:
        raise _refuse(above[0], at, f"cannot be read ({e.strerror}); check its permissions") from e
    for name in names:
        if name in leave:
            continue
        real, inside = (folder / name).resolve(strict=True), at / name
        if real.is_dir():
            if real in above or any(real in top.parents for top in above):
                raise _refuse(
                    above[0], inside, f"is a link to {real}, which it lies in; remove the link"
                )
            yield from _walk(real, inside, above, set())
        else:
            try:
                open_regular(folder / name).close()  # a pipe would block who copies it
            except FileProblem as e:
                raise AdapterError(f"backbone {above[0]}", [str(e)]) from e
            yield inside, real


def _refuse(base: Path, at: PurePosixPath, what: str) -> AdapterError:
    return AdapterError(f"backbone {base}", [f"{at}: {what}"])


def check_out(base: Path, out: Path) -> None:
    """Raises AdapterError unless `out` can be made, or is an empty directory, outside `base`."""
    subject = f"output directory {out}"
    if out.resolve() == base:
        raise AdapterError(subject, ["it is the backbone itself; name a new directory"])
    if base in out.resolve().parents:
        raise AdapterError(
            subject, [f"it lies in the backbone {base}; name a directory outside of it"]
        )
    if problem := output_problem(out):
        raise AdapterError(subject, [problem])
