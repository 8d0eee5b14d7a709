"""Split the test store into one store per group, so that validation reports each group."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from nemo_kd.store import Sample, Store
from nemo_kd.store.tools.transform import write_samples


def main(
    source: Annotated[Path, typer.Argument(help="the store of test.jsonl")],
    target: Annotated[Path, typer.Argument(help="directory for group-00, group-01, …")],
    data: Annotated[Path, typer.Option(help="data.json, which says each row's group")],
) -> None:
    """Write the groups, and their numbers of answer tokens as groups.json."""
    group_of = json.loads(data.read_text(encoding="utf-8"))["groups"]
    store = Store(source)
    parts: dict[int, list[Sample]] = defaultdict(list)
    for sample in store:
        parts[group_of[sample.row]].append(sample)
    tokens = {}
    for group, samples in sorted(parts.items()):
        name = f"group-{group:02d}"
        spec = store.spec
        manifest = write_samples(samples, target / name, spec, overwrite=True)
        tokens[name] = manifest.totals["answer_tokens"]
    (target / "groups.json").write_text(json.dumps(tokens, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
