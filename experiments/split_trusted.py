"""Split a store by whether the teacher knows the answer: its top-1 is the label at every token.

Writes the stores `trusted` and `rest` into a directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_kd.store import Sample, Store
from nemo_kd.store.tools.transform import write_samples


def knows(sample: Sample) -> bool:
    """Whether the teacher's most likely token is the sample's own at every answer token."""
    labels = sample.input_ids[sample.answer_positions()]
    return bool((sample.topk.ids[:, 0] == labels).all())  # ids are by descending logit


def main(
    source: Annotated[Path, typer.Argument(help="a store of profile plain")],
    target: Annotated[Path, typer.Argument(help="directory for the stores trusted and rest")],
) -> None:
    """Write the two stores."""
    store = Store(source)
    parts: dict[str, list[Sample]] = {"trusted": [], "rest": []}
    for sample in store:
        parts["trusted" if knows(sample) else "rest"].append(sample)
    for name, samples in parts.items():
        write_samples(samples, target / name, store.spec, overwrite=True)
        typer.echo(f"{name}: {len(samples)} samples")


if __name__ == "__main__":
    typer.run(main)
