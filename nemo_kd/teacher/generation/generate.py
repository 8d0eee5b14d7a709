"""The teacher writes the answers: prompts in, a store of its own answers with its top-K out.

Store row `prompt * samples_per_prompt + sample` is one answer; rows of answers that were not kept
are missing. The text is read off the finished store, so only whole shards are ever resumed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from nemo_kd.sft import JsonlFile, RowError
from nemo_kd.sft.rows import BadRows, Row, Teacher, readable
from nemo_kd.store import Manifest, Sample, Store, StoreSpec
from nemo_kd.teacher.dump import calls, store_spec, write_store
from nemo_kd.teacher.forward import sample_of, split_unusable
from nemo_kd.teacher.generation.filter import AnswerFilter
from nemo_kd.teacher.generation.prompts import Prompts
from nemo_kd.teacher.generation.step import Answer, Decoding, GenerationError, Prompt
from nemo_kd.teacher.progress import DumpProgress

ANSWERS = "answers.jsonl"
# prompts → answers, or None on ranks that hold no logits
Writer = Callable[[Sequence[Prompt]], "list[Answer] | None"]


def generate(
    cfg: DictConfig, teacher: Teacher, writer: Callable[[StoreSpec, Decoding], Writer]
) -> Manifest | None:
    """An answer, or several, to each row of `data.file_path`; the manifest of the finished store.

    None when a signal asked to stop: what is whole stays, the same command goes on.
    """
    if cfg.data.chat:
        raise GenerationError(
            "data.chat=true is not generated from: write the conversation's format into "
            "data.prompt_template"
        )
    decoding, keep = read_settings(cfg, teacher)
    prompts, bad = Prompts(teacher, cfg.data, decoding), BadRows.of(cfg)
    spec = generation_spec(cfg, teacher, prompts.file)
    write = writer(spec, decoding)

    def samples(shard: int, progress: DumpProgress) -> Iterator[Sample]:
        assert isinstance(progress, GenerateProgress)
        first = shard * spec.rows_per_shard
        numbers = range(first, min(first + spec.rows_per_shard, len(prompts)))
        dropped: list[RowError] = []
        batch = list(readable(prompts, numbers, bad, dropped))
        progress.drop(dropped)
        limit = cfg.max_tokens_per_micro_batch or sys.maxsize
        for call, _ in calls(batch, cfg.model.micro_batch_size, limit, in_flight=1):
            for answer in usable(write(call), progress):
                if not (answer.finished or cfg.generation.keep_unfinished):
                    progress.unfinished += 1
                elif not keep.keeps(prompts.text(answer.ids), prompts.source(answer.prompt.row)):
                    progress.filtered += 1
                else:
                    yield sample_of(_row(answer), answer.topk, spec)

    def usable(answers: list[Answer] | None, progress: GenerateProgress) -> list[Answer]:
        """Those that a store can hold, counted; none on a rank that has none."""
        pairs = [(_row(answer), answer.topk) for answer in answers or ()]
        kept, dropped = split_unusable(pairs, prompts.file.path, bad, prompts.samples_per_row)
        progress.drop(dropped)
        rows = {row.row for row, _ in kept}
        return progress.count([answer for answer in answers or () if answer.prompt.row in rows])

    manifest = write_store(cfg, spec, prompts, samples, progress_class=GenerateProgress)
    if manifest is not None and torch.distributed.get_rank() == 0:
        path = Path(cfg.output_dir) / ANSWERS
        total, same = write_answers(path, Store(cfg.output_dir), prompts)
        print(
            f"{path}: {total} answers as text; SFT reads {same} of them as the very tokens of the "
            "store"
        )
    return manifest


def read_settings(cfg: DictConfig, teacher: Teacher) -> tuple[Decoding, AnswerFilter]:
    """The block `generation`, checked."""
    settings = cfg.generation
    decoding = Decoding(
        max_new_tokens=settings.max_new_tokens,
        stop_ids=(teacher.tokenizer.eos_id, *settings.stop_ids),
        temperature=settings.temperature,
        top_p=settings.top_p,
        samples_per_prompt=settings.samples_per_prompt,
        seed=settings.seed,
    )
    return decoding, AnswerFilter(settings.filter.pattern, settings.filter.function)


def generation_spec(cfg: DictConfig, teacher: Teacher, file: JsonlFile) -> StoreSpec:
    """A dump's spec, with what decides the answers among its template."""
    spec = store_spec(cfg, teacher, file)
    settings = OmegaConf.to_container(cfg.generation, resolve=True)
    return replace(spec, template={**spec.template, "generation": settings})


def _row(answer: Answer) -> Row:
    """The sample that an answer makes: the prompt, and its own tokens to learn."""
    prompt = answer.prompt
    mask = [0] * len(prompt.ids) + [1] * len(answer.ids)
    ids = np.array(prompt.ids + answer.ids, dtype=np.int32)
    return Row(prompt.row, ids, np.array(mask, dtype=np.uint8))


def write_answers(path: Path, store: Store, prompts: Prompts) -> tuple[int, int]:
    """The store's answers as SFT JSONL, line i for sample i; how many, and how many of them
    become the very tokens of the store again."""
    temporary = path.with_name(f".{path.name}.tmp")
    same = 0
    with temporary.open("w", encoding="utf-8") as file:
        for sample in store:
            answer = sample.input_ids[sample.answer_positions()].tolist()
            row = {**prompts.source(sample.row), prompts.label_key: prompts.text(answer)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            same += prompts.as_sft(row) == sample.input_ids.tolist()
    os.replace(temporary, path)
    return len(store), same


class GenerateProgress(DumpProgress):
    """Also counts the answers that were not kept, and why."""

    name = "generate"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.answers = self.tokens = self.unfinished = self.filtered = 0

    def count(self, answers: list[Answer]) -> list[Answer]:
        """The same answers, counted."""
        self.answers += len(answers)
        self.tokens += sum(len(answer.ids) for answer in answers)
        self.advance([(_row(answer), answer.topk) for answer in answers])
        return answers

    def summary(self) -> str:
        """What this run wrote, over all ranks; every rank calls it. Empty without new answers."""
        self._total()
        mine = [self.answers, self.tokens, self.unfinished, self.filtered]
        counts = mine if self.counts else [0] * len(mine)
        sums = torch.tensor(counts, device=torch.cuda.current_device())
        torch.distributed.all_reduce(sums)
        answers, tokens, unfinished, filtered = sums.tolist()
        if not answers:
            return self.left_out
        text = f"this run: {answers} answers, {tokens} tokens written"
        if unfinished:
            text += (
                f"; {unfinished} dropped, not ended within generation.max_new_tokens "
                "(generation.keep_unfinished=true keeps them)"
            )
        if filtered:
            text += f"; {filtered} dropped by generation.filter"
        if unfinished + filtered == answers:
            text += "\nWARNING: no answer was kept"
        return f"{text}\n{self.left_out}" if self.left_out else text
