"""A teacher behind an inference server: rows are sent as token ids, answers are its top-K."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import numpy as np

from nemo_kd.served.answer import AnswerError, Wire, checked, topk_of
from nemo_kd.served.client import LIMIT, Client, ServedTeacherError, StatusError
from nemo_kd.served.server import PROBE, Server, describe
from nemo_kd.served.sglang import SGLang
from nemo_kd.served.vllm import VLLM
from nemo_kd.settings.batches import processes_of
from nemo_kd.sft import RowError
from nemo_kd.sft.reader import SEP_ID
from nemo_kd.sft.rows import Row
from nemo_kd.sft.tokenizer import HFTokenizer
from nemo_kd.store import StoreSpec
from nemo_kd.store.codecs import Sampled
from nemo_kd.store.fingerprint import tokenizer_files_fingerprint
from nemo_kd.teacher import processes
from nemo_kd.teacher.config import DumpConfig, TeacherConfig
from nemo_kd.teacher.generation.step import Decoding
from nemo_kd.teacher.layout import Layout
from nemo_kd.teacher.rows import check_separator
from nemo_kd.topk import TopK

WIRES: dict[str, type[Wire]] = {"vllm": VLLM, "sglang": SGLang}
PASS = ("micro_batch_size", "max_tokens_per_micro_batch", "rows_per_lm_head", "megatron_amp_O2")
"""Settings of a forward pass in this process."""
TRIES = 2
"""Requests for a row until an answer that does not fit it is an error."""


class ServedTeacher:
    """Implementation of `teacher.interface.Teacher`; every rank sends requests to the server."""

    sep_id = SEP_ID
    virtual_tokens = 0
    max_positions = None  # rows that are too long raise an error instead

    def __init__(
        self, config: TeacherConfig, server: Server, tokenizer: HFTokenizer, layout: Layout
    ) -> None:
        self.config, self.server, self.layout = config, server, layout
        self.tokenizer = tokenizer
        path = os.path.abspath(str(config.tokenizer))
        self.tokenizer_origin = {"library": "huggingface", "path": path}
        # Not the address: another replica may finish the store. A server tells nothing that
        # identifies its weights.
        self.identity = {
            "name": server.model,
            "fingerprint": None,
            "api": config.api,
            "tokenizer": tokenizer_files_fingerprint(Path(path)),
        }

    def regime(self, positions: int) -> int:
        return 0

    def forward(self, spec: StoreSpec, rows_per_lm_head: int) -> ServedForward:
        """Raise ServedTeacherError if the server gives no K log-probabilities per token.

        This is before a store is begun.
        """
        forward = ServedForward(self, spec)
        asyncio.run(forward.probe())
        return forward

    def writer(self, spec: StoreSpec, decoding: Decoding) -> NoReturn:
        raise ServedTeacherError(
            "teacher.kind=served does not generate answers; set teacher.kind=hf or nemo"
        )


def load_teacher(config: DumpConfig) -> ServedTeacher:
    """Start the job's processes, load the tokenizer and ask the server which model it serves."""
    check_settings(config)
    layout = processes.start(
        processes.Launch.of(os.environ),
        expected=processes_of(config.trainer.devices, config.trainer.num_nodes),
        accelerator="cpu",
    )
    tokenizer = HFTokenizer(str(config.teacher.tokenizer))
    if tokenizer.eos_id is None:
        raise ServedTeacherError(
            f"teacher.tokenizer={config.teacher.tokenizer} has no end-of-sequence token; SFT needs "
            "one"
        )
    check_separator(config, tokenizer)
    for name in _without_effect(config):
        layout.say(f"{name} has no effect with teacher.kind=served: the server makes the batches")
    server = asyncio.run(describe(config.teacher, tokenizer, layout.say))
    length = config.data.max_seq_length
    if server.max_row is not None and length > server.max_row:
        raise ServedTeacherError(
            f"{server.model} is served with {server.max_row + 1} positions, one of them for a "
            f"generated token, but data.max_seq_length is {length}; set data.max_seq_length="
            f"{server.max_row} or less, or restart the server with a longer context"
        )
    return ServedTeacher(config.teacher, server, tokenizer, layout)


def check_settings(config: DumpConfig) -> None:
    """Raise ServedTeacherError for what log-probabilities of K ids do not determine."""
    dump = config.dump
    if tuple(dump.temperatures) != (1.0,):
        raise ServedTeacherError(
            f"dump.temperatures={list(dump.temperatures)}: a server returns log-probabilities at "
            "temperature 1 only; set dump.temperatures=[1.0], or use teacher.kind=hf"
        )
    if dump.profile == Sampled.name:
        raise ServedTeacherError(
            "dump.profile=sampled draws from the complete distribution, of which a server returns "
            "the top-K only; use profile plain, compact or top_p, or teacher.kind=hf"
        )


def _without_effect(config: DumpConfig) -> Iterator[str]:
    """Yield the settings of a forward pass that have other values than their defaults."""
    for where, block in (("model.", config.model), ("", config)):
        for each in fields(block):
            if each.name in PASS and getattr(block, each.name) != each.default:
                yield f"{where}{each.name}={getattr(block, each.name)}"


class ServedForward:
    """Implementation of `teacher.interface.Forward`: one request per row, many at a time."""

    def __init__(self, teacher: ServedTeacher, spec: StoreSpec) -> None:
        self.teacher, self.spec = teacher, spec
        self.wire = WIRES[teacher.config.api]()

    def __call__(self, rows: Sequence[Row], micro_batch_size: int) -> Generator[TopK | RowError]:
        """Yield each row's top-K in order; an error for a row whose answers do not fit it."""
        with asyncio.Runner() as runner:
            client, tasks = runner.run(self._start(rows))
            try:
                for task in tasks:
                    yield runner.run(_result(task))
            finally:
                runner.run(_stop(client, tasks))

    async def _start(
        self, rows: Sequence[Row]
    ) -> tuple[Client, list[asyncio.Task[TopK | RowError]]]:
        client = Client(self.teacher.config, self.teacher.layout.say)
        return client, [asyncio.create_task(self._row(client, row)) for row in rows]

    async def _row(self, client: Client, row: Row) -> TopK | RowError:
        found = AnswerError("no answer")
        for _ in range(TRIES):
            content = await self._ask(client, row.input_ids.tolist(), f"row {row.row}")
            try:
                return topk_of(self.wire.parse(content), row, self.spec, self.wire)
            except AnswerError as error:
                found = error
        return found

    async def probe(self) -> None:
        """Send a short request; raise ServedTeacherError for an answer that fits no row."""
        ids = np.array(self.teacher.tokenizer.text_to_ids(PROBE)[:4], np.int32)
        row, wrong = Row(0, ids, (np.arange(len(ids)) > 0).astype(np.uint8)), AnswerError()
        async with Client(self.teacher.config, self.teacher.layout.say) as client:
            for _ in range(TRIES):
                content = await self._ask(client, ids.tolist(), "a test request")
                try:
                    checked(self.wire.parse(content), row, self.spec, self.wire)
                    return
                except AnswerError as error:
                    wrong = error
            raise ServedTeacherError(f"{client.url}{self.wire.path}: a test request: {wrong}")

    async def _ask(self, client: Client, tokens: list[int], what: str) -> bytes:
        body = self.wire.request(self.teacher.server.model, tokens, self.spec.top_k)
        try:
            return await client.post(self.wire.path, body)
        except StatusError as error:
            raise self._refused(error, what) from error

    def _refused(self, error: StatusError, what: str) -> ServedTeacherError:
        limit, top_k, option = LIMIT.search(error.message), self.spec.top_k, self.wire.limit_option
        if limit is not None and int(limit[1]) < top_k:
            restart = f"restart the server with {option} {top_k}, or " if option else ""
            return ServedTeacherError(
                f"dump.top_k={top_k}, but the server returns at most {limit[1]} log-probabilities "
                f"per token; {restart}set dump.top_k={limit[1]}"
            )
        hint = ""
        if option and "logprobs" in error.message.lower():
            hint = f"; the server's limit on dump.top_k={top_k} is its option {option}"
        return ServedTeacherError(f"{what}: {error}{hint}")


async def _result(task: asyncio.Task[TopK | RowError]) -> TopK | RowError:
    return await task


async def _stop(client: Client, tasks: Sequence[asyncio.Task[TopK | RowError]]) -> None:
    """Cancel what is still in flight, after an error or Ctrl-C; close the connections."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await client.__aexit__(None, None, None)
