"""Commands that create or change stores: convert, merge, average, split, pack."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nemo_kd.cli.app import (
    Jobs,
    Json,
    LocalStore,
    Overwrite,
    StoreArgument,
    TokenizerPath,
    Weights,
    app,
    check_store_target,
    options_named,
    print_json,
    progress,
    report,
    summary,
)

Sources = Annotated[list[str], typer.Argument(help="Stores to read.")]
Target = Annotated[str, typer.Argument(help="Directory of the store to write.")]


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(help="A store, a .jsonl, a .parquet, or a directory of another program."),
    ],
    target: Annotated[str, typer.Argument(help="Directory of a store, a .jsonl or a .parquet.")],
    profile: Annotated[
        str | None,
        typer.Option(help="plain, compact or top_p; default: the source's, or plain for JSONL."),
    ] = None,
    p: Annotated[float | None, typer.Option("--p", help="Total probability for top_p.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Keep fewer logits per token.")] = None,
    segment_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Size of a segment; default: 1 GiB, or 1/64 of a larger store."),
    ] = None,
    tokenizer: TokenizerPath = None,
    bad_lines: Annotated[
        str | None,
        typer.Option(help="Other programs' files: on invalid rows, error (default) or drop."),
    ] = None,
    renumber: Annotated[
        bool, typer.Option("--renumber", help="JSONL source: number rows by line, not by `index`.")
    ] = False,
    compression_config: Annotated[
        str | None,
        typer.Option(
            help="DistillKit source: its compression's YAML; default: compression_config.yaml "
            "beside it."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Megatron-LM source: the run's samples in order, JSONL with input_ids or an "
            "indexed data set."
        ),
    ] = None,
    samples_per_chunk: Annotated[
        int | None, typer.Option(min=1, help="Samples per file of a JSONL target with CHUNK_ID.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=0, help="Store to store: number of processes; default: one per core if it is large."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert a store to another profile, to NeMo-Aligner's JSONL or to Parquet, and back.

    Parquet is loaded by pandas and datasets; converted back, it is the same store. What vLLM
    (responses with prompt_logprobs as JSONL), DistillKit (Parquet) and Megatron-LM (shards of
    --logits-save-dir) saved of a teacher becomes a store.

    nemo-kd convert store out.parquet

    nemo-kd convert responses.jsonl store --tokenizer teacher/

    nemo-kd convert captured/ store --tokenizer teacher/

    nemo-kd convert logits/ store --data samples.jsonl --tokenizer teacher/
    """
    from nemo_kd.cli import caches, conversions
    from nemo_kd.store import StoreError
    from nemo_kd.store.remote import is_url

    options = {
        "--profile": profile,
        "--p": p,
        "--top-k": top_k,
        "--segment-bytes": segment_bytes,
        "--tokenizer": tokenizer,
        "--bad-lines": bad_lines,
        "--renumber": renumber or None,
        "--compression-config": compression_config,
        "--data": data,
        "--samples-per-chunk": samples_per_chunk,
        "--jobs": jobs,
    }
    conversions.refuse_idle_options(source, target, options)
    if p is not None and not 0 < p <= 1:
        raise StoreError(f"--p {p} is not a probability above 0 and up to 1")
    common: dict[str, Any] = {
        "profile": profile,
        "profile_options": None if p is None else {"p": p},
        "top_k": top_k,
        "segment_bytes": segment_bytes,
        "overwrite": overwrite,
    }
    with options_named():
        kind, made = conversions.kind_of(source), conversions.kind_by_suffix(target)
        if made == "a store":
            check_store_target(target)
        elif is_url(target):
            raise StoreError(
                f"{target} is an address, but a file is written to a local disk: give a path, then "
                "copy the file"
            )
        if made == "Parquet":
            with progress("convert") as advance:
                result = conversions.to_parquet(
                    source, target, overwrite=overwrite, advance=advance
                )
        elif made == "JSONL":
            result = conversions.to_jsonl(source, target, samples_per_chunk, overwrite=overwrite)
        elif kind == "Parquet":
            result = conversions.from_parquet(source, target, tokenizer=tokenizer, **common)
        elif kind != "a store":
            cache = caches.opened_cache(
                kind, source, renumber=renumber, configuration=compression_config, data=data
            )
            result = caches.from_cache(
                cache, source, target, tokenizer=tokenizer, bad_lines=bad_lines, **common
            )
        else:
            with progress("convert") as advance:
                result = conversions.between_stores(
                    source, target, advance=advance, jobs=jobs or 0, **common
                )
    report(result, as_json)


@app.command()
def merge(
    sources: Sources,
    target: Target,
    jobs: Jobs = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Concatenate stores that have the same specification; rows are renumbered."""
    from nemo_kd.store import Store
    from nemo_kd.store import merge as merge_stores

    check_store_target(target)
    stores = [Store(source) for source in sources]
    total = sum(map(len, stores))
    with options_named(), progress("merge") as advance:
        manifest = merge_stores(
            stores, target, overwrite=overwrite, progress=lambda n: advance(n, total), jobs=jobs
        )
    report(summary(target, manifest), as_json)


@app.command()
def average(
    sources: Sources,
    target: Target,
    weights: Weights = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Average several teachers: store the mixture of their probabilities for the same samples.

    Without --weights all teachers have the same weight.
    """
    from nemo_kd.cli.conversions import averaged, numbers
    from nemo_kd.store import Store

    check_store_target(target)
    stores = [Store(source) for source in sources]
    shares = [1.0] * len(stores) if weights is None else numbers("--weights", weights)
    with options_named(), progress("average") as advance:
        result = averaged(
            stores,
            target,
            shares,
            overwrite=overwrite,
            progress=lambda done: advance(done, len(stores[0])),
        )
    report(result, as_json)


@app.command()
def split(
    store: StoreArgument,
    targets: Annotated[list[str], typer.Argument(help="Directories of the stores to write.")],
    weights: Annotated[str, typer.Option(help="Relative sizes of the parts, such as 0.95,0.05.")],
    seed: Annotated[int, typer.Option(help="Seed of the random split.")] = 0,
    jobs: Jobs = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Randomly split a store, for example into train and held-out; rows keep their numbers."""
    from nemo_kd.cli.conversions import numbers
    from nemo_kd.store import Store
    from nemo_kd.store import split as split_store

    for target in targets:
        check_store_target(target)
    opened = Store(store)
    with options_named(), progress("split") as advance:
        manifests = split_store(
            opened,
            targets,
            numbers("--weights", weights),
            seed=seed,
            overwrite=overwrite,
            progress=lambda done: advance(done, len(opened)),
            jobs=jobs,
        )
    parts = [summary(target, manifest) for target, manifest in zip(targets, manifests, strict=True)]
    if as_json:
        print_json(parts)
        return
    for part in parts:
        report(part, as_json=False)


@app.command()
def pack(
    store: LocalStore,
    segment_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Size of a segment; default: 1 GiB, or 1/64 of a larger store."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Join the many shards of a store that an earlier version wrote to a few segments, in place."""
    from nemo_kd.cli.app import refuse_address
    from nemo_kd.store import pack as pack_store

    refuse_address(store)
    unchanged: list[bool] = []
    with options_named(), progress("pack") as advance:
        manifest = pack_store(
            store,
            segment_bytes=segment_bytes,
            on_segment=advance,
            on_unchanged=lambda: unchanged.append(True),
        )
    why = "has segments already; nothing was changed" if unchanged else ""
    report(summary(store, manifest), as_json, unchanged=why)
