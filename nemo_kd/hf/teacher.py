"""A teacher run by Hugging Face transformers: any causal LM."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from nemo_kd.checkpoints import open_checkpoint
from nemo_kd.hf.loading import from_directory, on_device
from nemo_kd.hf.split import HFTeacherError, SplitModel
from nemo_kd.hf.writer import HFWriter
from nemo_kd.settings.batches import processes_of
from nemo_kd.sft import RowError
from nemo_kd.sft.reader import SEP_ID
from nemo_kd.sft.rows import Row
from nemo_kd.sft.tokenizer import HFTokenizer, tokens_from
from nemo_kd.store import StoreSpec
from nemo_kd.teacher import processes
from nemo_kd.teacher.config import DumpConfig
from nemo_kd.teacher.forward import AnswerHead, inputs_of
from nemo_kd.teacher.generation.step import Decoding
from nemo_kd.teacher.layout import Layout
from nemo_kd.teacher.precision import dtype_of
from nemo_kd.teacher.rows import check_separator
from nemo_kd.topk import TopK

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HFTeacher:
    """Implementation of `teacher.interface.Teacher` with a full copy of the model on each rank."""

    sep_id = SEP_ID
    virtual_tokens = 0
    max_positions = None  # rows that are too long raise an error instead
    identity = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: HFTokenizer,
        tokenizer_path: str | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.model = model
        self.split = SplitModel(model)
        self.tokenizer = tokenizer
        self.tokenizer_origin = {"library": "huggingface", "path": tokenizer_path}
        self.layout = layout or Layout()
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.context: int | None = None
        if context is not None and context > 0:  # XLNet has -1 for no limit
            self.context = int(context * self.split.rope.reach)

    def regime(self, positions: int) -> int:
        return self.split.rope.regime(positions)

    def forward(self, spec: StoreSpec, rows_per_lm_head: int) -> HFForward:
        return HFForward(self, spec, rows_per_lm_head)

    def writer(self, spec: StoreSpec, decoding: Decoding) -> HFWriter:
        return HFWriter(self.model, spec, decoding)


def load_teacher(config: DumpConfig) -> HFTeacher:
    """Load the teacher at `model.restore_from_path` in `trainer.precision` on this rank's device.

    transformers loads directories. `nemo_kd.checkpoints` loads .gguf files (of Llamas), because
    transformers reads the wrong end-of-sequence id from them.
    """
    path = config.model.checkpoint
    dtype = dtype_of(config)
    layout = processes.start(
        processes.Launch.of(os.environ),
        expected=processes_of(config.trainer.devices, config.trainer.num_nodes),
        accelerator=config.trainer.accelerator,
    )
    if path.is_dir():
        if config.data.add_sep:
            check_separator(config, HFTokenizer(path))
        model, tokenizer_path = from_directory(path, dtype, layout.device), str(path.absolute())
        tokenizer = HFTokenizer(tokenizer_path)
    elif path.is_file():
        from nemo_kd.checkpoints.huggingface import to_transformers

        checkpoint, tokenizer_path = open_checkpoint(path), None
        model = to_transformers(checkpoint)
        for parameter in model.parameters():  # not rotary frequencies, as of a directory
            parameter.data = parameter.data.to(dtype)
        with tempfile.TemporaryDirectory() as directory:
            checkpoint.save_tokenizer(directory)
            tokenizer = HFTokenizer(directory)
    else:
        raise HFTeacherError(
            f"no checkpoint at {path}; set model.restore_from_path to a directory with config.json "
            "and *.safetensors, or to a .gguf file"
        )
    model = on_device(model.eval().requires_grad_(False), layout.device)
    teacher = HFTeacher(model, tokenizer, tokenizer_path, layout)
    _check(teacher, config)
    return teacher


def _check(teacher: HFTeacher, config: DumpConfig) -> None:
    """Raise HFTeacherError for mismatches that would fail during the pass or give wrong logits."""
    name, size = config.model.restore_from_path, teacher.tokenizer.vocab_size
    if teacher.context is not None and config.data.max_seq_length > teacher.context:
        raise HFTeacherError(
            f"{name} has {teacher.context} positions, but data.max_seq_length is "
            f"{config.data.max_seq_length}; set data.max_seq_length={teacher.context} or less"
        )
    if teacher.tokenizer.eos_id is None:
        raise HFTeacherError(f"{name}: its tokenizer has no end-of-sequence token; SFT needs one")
    width = teacher.split.check()
    if width < size:
        raise HFTeacherError(
            f"{name}: the tokenizer's largest id is {size - 1}, but the model has {width} logits. "
            f"Without a logit: {tokens_from(teacher.tokenizer, width)}. If no row needs them, "
            "remove them from tokenizer.json and tokenizer_config.json; if the model was to have "
            "them, give it rows for them (resize_token_embeddings); else use its own tokenizer"
        )


class HFForward(AnswerHead):
    """Implementation of `teacher.interface.Forward`."""

    def __init__(self, teacher: HFTeacher, spec: StoreSpec, rows_per_lm_head: int) -> None:
        super().__init__(spec, teacher.layout, rows_per_lm_head)
        self.teacher = teacher

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row], micro_batch_size: int) -> list[TopK]:
        """Run the rows in micro-batches, each padded to its longest row; return their top-K."""
        starts = range(0, len(rows), micro_batch_size)
        batches = [rows[start : start + micro_batch_size] for start in starts]
        return [topk for batch in batches for topk in self._micro_batch(batch)]

    def _micro_batch(self, rows: Sequence[Row]) -> Iterator[TopK]:
        length = max(len(row) for row in rows) - 1  # the last token is only a target
        context = self.teacher.context
        if context is not None and length > context:
            row = max(rows, key=len)
            raise RowError(
                f"row {row.row} has {len(row)} tokens, but the teacher {context} positions; "
                "shorten or remove it"
            )
        tokens = inputs_of(rows, length)
        output = self.teacher.split.hidden(tokens.to(self.teacher.model.device))
        hidden = output.last_hidden_state.transpose(0, 1)  # [S, B, H]
        return self.topk(hidden, lambda part: self.teacher.split.logits(output, part), rows)
