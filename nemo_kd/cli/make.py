"""Making stores of stores: convert, merge, split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nemo_kd.cli.app import (
    Json,
    Overwrite,
    StoreArgument,
    TokenizerPath,
    app,
    print_json,
    progress,
    report,
)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A store, or NeMo-Aligner JSONL to make one of.")],
    target: Annotated[str, typer.Argument(help="A directory, or a .jsonl to write.")],
    profile: Annotated[
        str | None,
        typer.Option(help="plain, compact or top_p; the store's own, or plain of JSONL."),
    ] = None,
    p: Annotated[float | None, typer.Option("--p", help="Mass that top_p keeps.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Fewer logits than there are.")] = None,
    rows_per_shard: Annotated[
        int | None, typer.Option(min=1, help="The store's own, or 256 of JSONL.")
    ] = None,
    tokenizer: TokenizerPath = None,
    bad_lines: Annotated[
        str | None, typer.Option(help="JSONL: stop at one (the default), or skip it.")
    ] = None,
    renumber: Annotated[bool, typer.Option(help="JSONL: rows are lines, not `index`.")] = False,
    samples_per_chunk: Annotated[
        int | None, typer.Option(min=1, help="With CHUNK_ID in a .jsonl target.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """A store to another profile, or to NeMo-Aligner's JSONL, or from it."""
    from nemo_kd.cli import conversions

    options = None if p is None else {"p": p}
    conversions.refuse_idle_options(
        source,
        target,
        {
            "--profile": profile,
            "--p": p,
            "--top-k": top_k,
            "--rows-per-shard": rows_per_shard,
            "--tokenizer": tokenizer,
            "--bad-lines": bad_lines,
            "--renumber": renumber or None,
            "--samples-per-chunk": samples_per_chunk,
        },
    )
    if target.endswith(".jsonl"):
        result = conversions.to_jsonl(source, target, samples_per_chunk, overwrite=overwrite)
    elif source.endswith(".jsonl"):
        result = conversions.from_jsonl(
            source,
            target,
            profile=profile,
            profile_options=options,
            top_k=top_k,
            rows_per_shard=rows_per_shard,
            tokenizer=tokenizer,
            bad_lines=bad_lines,
            renumber=renumber,
            overwrite=overwrite,
        )
    else:
        with progress("convert") as advance:
            result = conversions.between_stores(
                source,
                target,
                profile=profile,
                profile_options=options,
                top_k=top_k,
                rows_per_shard=rows_per_shard,
                overwrite=overwrite,
                advance=advance,
            )
    report(result, as_json)


@app.command()
def merge(
    sources: Annotated[list[Path], typer.Argument(help="Stores of one specification.")],
    target: Annotated[Path, typer.Argument(help="The store to make.")],
    average: Annotated[
        str | None,
        typer.Option(help="Weights, 0.5,0.5: the mixture of teachers over the same tokens."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """One store of several: their samples in order, rows numbered on from store to store.

    With --average the stores hold the same samples, and the new one the mixture of their teachers.
    """
    from nemo_kd.cli.conversions import averaged, numbers, summary
    from nemo_kd.store.reader import Store
    from nemo_kd.store.tools.transform import merge as merge_stores

    stores = [Store(source) for source in sources]
    total = len(stores[0]) if average else sum(map(len, stores))
    with progress("merge") as advance:
        options: dict[str, Any] = {
            "overwrite": overwrite,
            "progress": lambda done: advance(done, total),
        }
        if average is None:
            result = summary(target, merge_stores(stores, target, **options))
        else:
            result = averaged(stores, target, numbers("--average", average), **options)
    report(result, as_json)


@app.command()
def split(
    store: StoreArgument,
    targets: Annotated[list[Path], typer.Argument(help="The stores to make.")],
    weights: Annotated[str, typer.Option(help="Their shares: 0.95,0.05.")],
    seed: Annotated[int, typer.Option(help="Another one gives another split.")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Parts of a store, by chance: training and held-out, say. Rows keep their numbers."""
    from nemo_kd.cli.conversions import numbers, summary
    from nemo_kd.store.reader import Store
    from nemo_kd.store.tools.transform import split as split_store

    opened = Store(store)
    with progress("split") as advance:
        manifests = split_store(
            opened,
            targets,
            numbers("--weights", weights),
            seed=seed,
            overwrite=overwrite,
            progress=lambda done: advance(done, len(opened)),
        )
    parts = [summary(target, manifest) for target, manifest in zip(targets, manifests, strict=True)]
    if as_json:
        print_json(parts)
        return
    for part in parts:
        report(part, as_json=False)
