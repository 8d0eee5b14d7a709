"""Commands that copy stores to and from remote storage: push, pull."""

from __future__ import annotations

from typing import Annotated

import typer

from nemo_kd.cli.app import Json, LocalStore, app, progress, report

ALREADY_THERE = "is already there"
Address = Annotated[str, typer.Argument(metavar="URL", help="Such as s3://bucket/store.")]


@app.command()
def push(store: LocalStore, url: Address, as_json: Json = False) -> None:
    """Copy a store to s3://, gs:// or another address; run it again to resume."""
    from nemo_kd.cli.app import refuse_address, summary
    from nemo_kd.store.tools.copying import push as push_store

    refuse_address(store)
    unchanged: list[bool] = []
    with progress("push") as advance:
        manifest = push_store(store, url, advance, lambda: unchanged.append(True))
    report(summary(url, manifest), as_json, unchanged=ALREADY_THERE if unchanged else "")


@app.command()
def pull(
    url: Address,
    target: Annotated[str, typer.Argument(help="Directory of the store to write.")],
    as_json: Json = False,
) -> None:
    """Copy a store from s3://, gs:// or another address; run it again to resume, or to mend it."""
    from nemo_kd.cli.app import check_store_target, summary
    from nemo_kd.store.tools.copying import pull as pull_store

    check_store_target(target)
    unchanged: list[bool] = []
    with progress("pull") as advance:
        manifest = pull_store(url, target, advance, lambda: unchanged.append(True))
    report(summary(target, manifest), as_json, unchanged=ALREADY_THERE if unchanged else "")
