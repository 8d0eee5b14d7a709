"""Generate answers to prompts and store them with the teacher's top-K for each of their tokens.

Store row `prompt * samples_per_prompt + sample` holds one answer; dropped answers have no row. The
file of answers as text is written from the finished store, so that it is complete even if the run
was resumed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nemo_kd.files import published
from nemo_kd.sft import RowError, RowFile
from nemo_kd.sft.config import RowConfig
from nemo_kd.sft.reader import (
    DEFAULT_TEMPLATE,
    PROMPT,
    prompt_template,
    recorded,
    resolved,
    with_separator,
)
from nemo_kd.sft.rows import Row, readable
from nemo_kd.sft.unread import unread
from nemo_kd.sft.unread_fields import check_fields
from nemo_kd.store import Manifest, Sample, Store, StoreSpec
from nemo_kd.store.manifest import ANSWERS
from nemo_kd.teacher.begin import rows_of
from nemo_kd.teacher.checks import Company, check_teacher
from nemo_kd.teacher.config import GenerateConfig, GenerationConfig
from nemo_kd.teacher.dump import calls, store_spec, write_store
from nemo_kd.teacher.forward import sample_of, usable
from nemo_kd.teacher.generation.filter import AnswerFilter
from nemo_kd.teacher.generation.prompts import Prompts
from nemo_kd.teacher.generation.step import Answers, Decoding, GenerationError, Prompt
from nemo_kd.teacher.generation.stop_ids import FILE, checkpoint_stop_ids
from nemo_kd.teacher.interface import Teacher
from nemo_kd.teacher.progress import DumpProgress
from nemo_kd.teacher.rows import bad_rows, model_of, same_file
from nemo_kd.topk import TopK


def generate(config: GenerateConfig, teacher: Teacher) -> Manifest | None:
    """Generate one or several answers to each row of `data.file_path` and write the store.

    Returns the store's manifest, or None if a signal stopped the run: complete shards are kept, and
    the same command resumes.
    """
    decoding, keep = read_settings(config, teacher)
    layout, bad = teacher.layout, bad_rows(config)
    file = same_file(config.data.file_path, layout)
    data = resolved(config.data, file)
    if data.format != PROMPT:
        raise GenerationError(
            f"the rows of {file.path} are {data.format}, but answers are generated to rows with a "
            "prompt: write the conversation's format into data.prompt_template, and set "
            "data.format=prompt"
        )
    check_fields(data, file, layout.say, chosen=data.prompt_template != DEFAULT_TEMPLATE)
    for line in _without_effect(config, data):
        layout.say(line)
    model = with_separator(data, model_of(config, teacher), layout.say)
    prompts = Prompts(file, prompt_template(data, model), decoding)
    spec = generation_spec(config, teacher, file, recorded(data, model), keep, decoding)
    write, company = teacher.writer(spec, decoding), Company()

    def check(numbers: Sequence[int]) -> None:
        nonlocal company
        rows = [_as_row(prompts[number]) for number in numbers]
        company = check_teacher(config, teacher, spec, rows)

    def samples(shard: int, progress: DumpProgress) -> Iterator[Sample]:
        assert isinstance(progress, GenerateProgress)
        dropped: list[RowError] = []
        batch = list(readable(prompts, rows_of(shard, spec, len(prompts)), bad, dropped))
        progress.drop(dropped)
        limit = config.max_tokens_per_micro_batch or sys.maxsize
        size = 1 if company.alone else config.model.micro_batch_size
        for call, _ in calls(batch, size, limit, 1, lambda prompt: company.group(len(prompt.ids))):
            _check_regime(teacher, call)
            answers = write(call)
            if answers is not None:
                yield from kept(answers, progress)

    def kept(answers: Answers, progress: GenerateProgress) -> Iterator[Sample]:
        """Yield samples of the valid answers that pass the filter; count all answers."""
        dropped: list[RowError] = []
        pairs = list(usable(answers.rows(), file, bad, dropped, prompts.samples_per_row))
        progress.drop(dropped)
        progress.count(pairs)
        finished = {prompt.row: answers.finished(b) for b, prompt in enumerate(answers.prompts)}
        for row, topk in pairs:
            text = prompts.text(row.input_ids[-len(topk) :].tolist())
            if not (finished[row.row] or config.generation.keep_unfinished):
                progress.unfinished += 1
            elif not _keeps(keep, text, prompts, row.row):
                progress.filtered += 1
            else:
                yield sample_of(row, topk)

    manifest = write_store(
        config, spec, layout, prompts, samples, check, progress_class=GenerateProgress
    )
    if manifest is not None and layout.rank == 0:
        path = Path(config.output_dir) / ANSWERS
        total, same = write_answers(path, Store(config.output_dir), prompts)
        print(
            f"{path}: {total} answers as text; SFT tokenizes {same} of them to the tokens of the "
            "store"
        )
    return manifest


def _keeps(keep: AnswerFilter, answer: str, prompts: Prompts, row: int) -> bool:
    try:
        return keep.keeps(answer, prompts.source(row))
    except GenerationError as error:
        where = prompts.file.where(row // prompts.samples_per_row)
        raise GenerationError(f"{where}: {error}") from error


def _as_row(prompt: Prompt) -> Row:
    return Row(prompt.row, np.array(prompt.ids, np.int32), np.ones(len(prompt.ids), np.uint8))


def _check_regime(teacher: Teacher, prompts: Sequence[Prompt]) -> None:
    """Raise GenerationError if an answer could grow into a regime that its keys do not have."""
    for prompt in prompts:
        if teacher.regime(len(prompt.ids)) != teacher.regime(len(prompt) - 1):
            raise GenerationError(
                f"row {prompt.row}: the teacher computes {len(prompt) - 1} positions with other "
                f"frequencies than the prompt's {len(prompt.ids)}, and cannot continue from the "
                "keys of the prompt; reduce generation.max_new_tokens or the prompt"
            )


def read_settings(config: GenerateConfig, teacher: Teacher) -> tuple[Decoding, AnswerFilter]:
    """Check the block `generation` and return its decoding settings and its filter."""
    settings, end = config.generation, teacher.tokenizer.eos_id
    assert end is not None  # teachers reject a tokenizer without an end-of-sequence token
    if not config.model.answer_only_loss:
        raise GenerationError(
            "model.answer_only_loss=false: a generation stores the top-K of generated tokens only; "
            f"leave it out, and dump the {ANSWERS} of the generation with it"
        )
    size = teacher.tokenizer.vocab_size
    beyond = [each for each in settings.stop_ids if each >= size]
    if beyond:
        raise GenerationError(
            f"generation.stop_ids has {beyond[0]}, but the teacher's tokenizer has ids up to "
            f"{size - 1}"
        )
    own = [each for each in checkpoint_stop_ids(config.model.checkpoint) if each < size]
    added = [each for each in own if each not in (end, *settings.stop_ids)]
    if added:
        tokens = ", ".join(teacher.tokenizer.ids_to_tokens(added))
        teacher.layout.say(f"answers also end at {tokens}, as {FILE} of the teacher says")
    decoding = Decoding(
        max_new_tokens=settings.max_new_tokens,
        stop_ids=(end, *settings.stop_ids, *added),
        temperature=settings.temperature,
        top_p=settings.top_p,
        samples_per_prompt=settings.samples_per_prompt,
        seed=settings.seed,
    )
    return decoding, AnswerFilter(settings.filter.pattern, settings.filter.function)


def _without_effect(config: GenerateConfig, data: RowConfig) -> Iterator[str]:
    """Yield a line for each setting that a generation never reads."""
    yield from unread(data, is_nemos=False)
    if not data.add_eos:
        yield (
            "data.add_eos=false has no effect on generated answers: the token that ends an answer "
            "is stored with it"
        )
    seed = config.generation.seed
    if config.generation.temperature == 0 and seed != GenerationConfig.seed:
        yield (
            f"generation.seed={seed} has no effect with generation.temperature=0: the most "
            "probable token is chosen each time"
        )
    if config.data.no_answer == "drop":
        yield "data.no_answer=drop has no effect on a generation: it ignores answers in the file"


def generation_spec(
    config: GenerateConfig,
    teacher: Teacher,
    file: RowFile,
    template: dict[str, Any],
    keep: AnswerFilter,
    decoding: Decoding,
) -> StoreSpec:
    """Return the spec of a dump whose template also contains the generation settings.

    At temperature 0 the seed decides nothing; its default is recorded.
    """
    settings = {**asdict(config.generation), "stop_ids": list(decoding.stop_ids[1:])}
    if decoding.temperature == 0:
        settings["seed"] = GenerationConfig.seed
    settings["filter"] |= keep.identity
    return store_spec(config, teacher, file, {**template, "generation": settings})


def write_answers(path: Path, store: Store, prompts: Prompts) -> tuple[int, int]:
    """Write the store's answers as SFT JSONL, with sample i on line i.

    Returns the number of answers, and how many of them SFT would tokenize to the stored tokens.
    """
    same = 0
    with published(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for sample in store:
            answer = sample.input_ids[sample.answer_positions()].tolist()
            row = {**prompts.source(sample.row), prompts.template.label_key: prompts.text(answer)}
            file.write(f"{_json(row)}\n")
            same += prompts.as_sft(row) == sample.input_ids.tolist()
    return len(store), same


def _json(row: dict[str, Any]) -> str:
    """Return a row as a line; a field with half of a surrogate pair is only written as ASCII."""
    text = json.dumps(row, ensure_ascii=False)
    return text if _is_encodable(text) else json.dumps(row)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class GenerateProgress(DumpProgress):
    """Progress of a generation, which also counts dropped answers by reason."""

    name = "generate"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.answers = self.tokens = self.unfinished = self.filtered = 0

    def count(self, pairs: list[tuple[Row, TopK]]) -> None:
        """Count answers, whether kept or dropped."""
        self.answers += len(pairs)
        self.tokens += sum(len(topk) for _, topk in pairs)
        self.advance(pairs)

    def summary(self) -> str:
        """Return the summary of this run over all ranks; empty if nothing was processed.

        Collective: all ranks must call it.
        """
        super().summary()
        mine = [self.answers, self.tokens, self.unfinished, self.filtered]
        counts = mine if self.layout.writes else [0] * len(mine)
        answers, tokens, unfinished, filtered = self.layout.sum(counts)
        if not answers:
            return self.left_out
        text = f"this run: {answers} answers, {tokens} tokens generated"
        if unfinished:
            text += (
                f"; {unfinished} dropped, not ended within generation.max_new_tokens "
                "(generation.keep_unfinished=true keeps them)"
            )
        if filtered:
            text += f"; {filtered} dropped by generation.filter"
        if self.truncated:
            text += (
                f"\nWARNING: {self.truncated} answers are to truncated prompts: "
                "data.max_seq_length has to hold generation.max_new_tokens too; raise it"
            )
        if unfinished + filtered == answers:
            self.nothing = self._why_nothing(answers, unfinished, filtered)
            text += "\nWARNING: no answer was kept"
        return f"{text}\n{self.left_out}" if self.left_out else text

    def _why_nothing(self, answers: int, unfinished: int, filtered: int) -> str:
        limit = self.tally.spec.template["generation"]["max_new_tokens"]
        reasons = {
            f"{unfinished} had not ended within generation.max_new_tokens={limit} (raise it, or "
            "keep them with generation.keep_unfinished=true)": unfinished,
            f"{filtered} were dropped by generation.filter (change its pattern or function)": (
                filtered
            ),
            " ".join(self.left_out.split()): self.left_out,
        }
        said = "; ".join(reason for reason, count in reasons.items() if count)
        return f"none of {answers} answers was kept: {said}"
