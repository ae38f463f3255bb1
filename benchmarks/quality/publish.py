"""Takes what a GPU machine sent back into the repository: results, page, plots, the demo's model.

    python -m benchmarks.quality.publish FOLDER

FOLDER holds quality-*.json or so-far.json, of which the fullest is taken, and may hold
training-*.json (of benchmarks.training, with peft) and demo_model.tgz (of benchmarks.quality.demo).
Nothing is committed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.pages import Result, read_results
from benchmarks.quality import demo
from benchmarks.quality.__main__ import RESULTS
from benchmarks.quality.report import ROOT, write


def chosen(folder: Path) -> list[Result]:
    """The result files to keep: the quality file with the most rows, all of training.

    Raises:
        ValueError: no quality file.
    """
    files = read_results(folder)
    quality = [f for f in files if f.kind == "quality"]
    if not quality:
        raise ValueError(f"no quality-*.json and no so-far.json in {folder}")
    fullest = max(quality, key=lambda f: (len(f.rows), f.content["time"]))
    return [fullest, *(f for f in files if f.kind == "training")]


def keep(file: Result, results: Path) -> Path:
    """Copies a file under the name that it had when it was saved, whatever it is called now.

    Raises:
        ValueError: there is another one of that name.
    """
    path = results / f"{file.kind}-{file.content['time']}.json"
    if path.exists() and json.loads(path.read_text()) != file.content:
        raise ValueError(f"{path} exists and is another result than {file.path}")
    results.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.path.read_bytes())
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path)
    add("--results", type=Path, default=RESULTS, help="folder of the result files")
    add("--docs", type=Path, default=ROOT / "docs", help="folder of quality.md")
    add("--demo-model", type=Path, default=demo.OUT, help="the demo's model, to be replaced")
    args = parser.parse_args(argv)
    try:
        for file in chosen(args.folder):
            print(f"kept {keep(file, args.results)}")
        print(f"wrote {write(args.results, args.docs)}")
        if (archive := args.folder / "demo_model.tgz").exists():
            about = demo.install(archive, args.demo_model)
            print(f"installed {args.demo_model}: {json.dumps(about['held_out_perplexity'])}")
    except ValueError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
