"""Commands that read stores: inspect, show, verify, stats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemo_kd.cli.app import (
    Jobs,
    Json,
    StoreArgument,
    TokenizerPath,
    app,
    check_parent,
    print_json,
    progress,
)
from nemo_kd.visible import visible

EXPLAINED = {
    "entropy_of_kept_and_rest_histogram": " in nats: the kept ids, and all others as one outcome",
    "label_rank_histogram": ": 1 is the teacher's first choice",
}


@app.command()
def inspect(store: StoreArgument, as_json: Json = False) -> None:
    """Show the specification and totals of a store; reads only its manifest.

    Of a .nemo file, shows its settings and how many pickles it has, without loading it.
    """
    from nemo_kd.cli import render
    from nemo_kd.files import sha256_of
    from nemo_kd.store.cache import Origin
    from nemo_kd.store.manifest import MANIFEST, Manifest, refuse_unfinished
    from nemo_kd.store.spec import leaves

    if (path := Path(store)).suffix == ".nemo" and path.exists():
        _inspect_nemo(path, as_json)
        return
    directory = Origin(store).directory
    refuse_unfinished(directory)
    manifest, fingerprint = Manifest.read(directory), sha256_of(directory / MANIFEST)
    totals = manifest.totals
    each = totals["bytes"] / max(totals["answer_tokens"], 1)
    if as_json:
        value = {"fingerprint": fingerprint, "bytes_per_answer_token": each, **totals}
        print_json({**value, "parts": len(manifest.parts), "spec": manifest.spec.to_json()})
        return
    counts = {
        "samples": f"{totals['samples']:,} ({totals['samples_without_answer']:,} without answer)",
        "tokens": f"{totals['tokens']:,}, of which {totals['answer_tokens']:,} answer tokens",
        "size": f"{render.size(totals['bytes'])} in {len(manifest.parts):,} "
        f"part{'' if len(manifest.parts) == 1 else 's'}, "
        f"{each:.1f} bytes per answer token, including tokens and indices",
        "fingerprint": fingerprint,
    }
    console = render.console()
    console.print(render.pairs(str(store), counts))
    console.print(render.pairs("\nspecification", dict(leaves("", manifest.spec.to_json()))))


def _inspect_nemo(path: Path, as_json: bool) -> None:
    from nemo_kd.cli import render
    from nemo_kd.cli.archive import inspect_archive

    value = inspect_archive(path)
    if as_json:
        print_json(value)
        return
    shown = {
        **value,
        "bytes": render.size(value["bytes"]),
        "pickles": f"{value['pickles']}; loading them can run code: load only what you trust",
    }
    render.console().print(render.pairs(str(path), shown))


@app.command()
def show(
    store: StoreArgument,
    row: Annotated[int, typer.Argument(metavar="ROW", help="Number of the source row.")],
    tokenizer: TokenizerPath = None,
    ids: Annotated[bool, typer.Option("--ids", help="Show ids instead of text.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Number of teacher ids to show per token.")] = 5,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained HTML page.")] = None,
    as_json: Json = False,
) -> None:
    """Show a sample's text and the teacher's most probable ids for each answer token."""
    from nemo_kd.cli import render
    from nemo_kd.cli.html import is_page, render_html
    from nemo_kd.cli.row import view_row
    from nemo_kd.cli.tokenizers import Ids, check_tokenizer_path, shown_tokenizer
    from nemo_kd.files import publish
    from nemo_kd.outputs import refuse_foreign, refuse_inputs
    from nemo_kd.store import Store, StoreError

    replaces = False
    if html is not None:
        check_parent("--html", html)
        refuse_inputs([html], [store, *([] if tokenizer is None else [tokenizer])])
        replaces = refuse_foreign(html, "a page of nemo-kd show", is_page)
    if tokenizer is not None and ids:
        raise StoreError("--tokenizer has no effect with --ids; omit one of them")
    opened = Store(store)
    if html is not None and (recorded := opened.spec.tokenizer.get("path")):
        refuse_inputs([html], [recorded])
    if tokenizer is not None:
        check_tokenizer_path(tokenizer)
    opened.index_of(row)  # fail before importing a tokenizer, which takes seconds
    shown, note = (Ids(), "") if ids else shown_tokenizer(opened.spec, tokenizer)
    if note:
        typer.echo(visible(note), err=True)
    view = view_row(opened, row, shown, top)
    if html is not None:
        publish(html, render_html(view, Path(store).name))
        typer.echo(visible(f"{'replaced' if replaces else 'wrote'} {html}"), err=True)
    if as_json:
        print_json(view.to_json())
    elif html is None:
        render.console().print(render.row(view))


@app.command()
def verify(
    store: StoreArgument,
    checksums_only: Annotated[
        bool,
        typer.Option(help="Compare the files with the manifest; do not check the samples' values."),
    ] = False,
    jobs: Jobs = 0,
    as_json: Json = False,
) -> None:
    """Check every checksum and rule; report problems by file, row and position.

    After a copy, `--checksums-only` finds every changed byte in a quarter of the time.
    """
    from dataclasses import asdict

    from nemo_kd.store import verify as problems_of
    from nemo_kd.store.cache import Origin
    from nemo_kd.store.manifest import refuse_unfinished

    origin = Origin(store)
    refuse_unfinished(origin.directory)
    with progress("verify") as advance:
        problems = list(problems_of(origin, advance, jobs, checksums_only))
    if as_json:
        print_json({"ok": not problems, "problems": [asdict(p) for p in problems]})
    else:
        for problem in problems:
            typer.echo(visible(str(problem)))
        typer.echo(visible(f"{store}: {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}"))
    if problems:
        raise typer.Exit(1)


@app.command()
def stats(
    store: StoreArgument,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Number of evenly spaced samples; default: all.")
    ] = None,
    jobs: Jobs = 0,
    as_json: Json = False,
) -> None:
    """Show the probability mass kept, entropy and agreement with the labels, with histograms.

    The entropy is a lower bound: that of K + 1 outcomes, the kept ids and all others as one. Warns
    of rows that look shifted, and of a teacher that does not predict the labels.
    """
    from nemo_kd.cli import render
    from nemo_kd.store import Store
    from nemo_kd.store import stats as stats_of

    with progress("stats") as advance:
        found = stats_of(Store(store), samples, advance, jobs)
    value, warning = found.to_json(), found.agreement.warning()
    if warning:
        typer.echo(visible(f"WARNING: {store}: {warning}"), err=True)
    if as_json:
        print_json({**value, "warning": warning or None})
        return
    histograms = {k: value.pop(k) for k in list(value) if k.endswith("_histogram")}
    console = render.console()
    known = {k: v for k, v in value.items() if v is not None}
    rounded = {k: f"{v:.4f}" if isinstance(v, float) else f"{v:,}" for k, v in known.items()}
    console.print(render.pairs(f"{store}: means over answer tokens", rounded))
    for name, one in histograms.items():
        title = name.removesuffix("_histogram").replace("_", " ")
        title += EXPLAINED.get(name, "")
        console.print(render.histogram(f"\n{title}", **one))
