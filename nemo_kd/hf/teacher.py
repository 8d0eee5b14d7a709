"""A teacher in Hugging Face's transformers: any causal LM, behind the same dump as a NeMo model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM

from nemo_kd.checkpoints import open_checkpoint
from nemo_kd.hf.split import HFTeacherError, SplitModel
from nemo_kd.sft import RowError
from nemo_kd.sft.rows import Row
from nemo_kd.store import StoreSpec
from nemo_kd.teacher.forward import AnswerHead, AnswerTopK, inputs_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# `trainer.precision`, what follows a dash left out, → the type of the weights and of the pass.
DTYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


class HFTeacher:
    """What the dump asks of a teacher, around a model of transformers.

    It has what NeMo's SFT data sets ask of a model.
    """

    sep_id = 49704  # NeMo's, where the configuration names none
    virtual_tokens = 0

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, tokenizer_path: str | None, cfg: DictConfig
    ) -> None:
        self.model = model
        self.split = SplitModel(model)
        self.tokenizer = tokenizer
        self.cfg = OmegaConf.create(
            {
                "tokenizer": {"library": "huggingface", "type": tokenizer_path},
                "answer_only_loss": cfg.model.answer_only_loss,
                "data": {"chat": cfg.data.chat},
                "position_embedding_type": "rope",  # else NeMo cuts samples to a length of its own
            }
        )
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None)


def load_teacher(cfg: DictConfig) -> HFTeacher:
    """The teacher at `model.restore_from_path`, in `trainer.precision`, on this rank's device.

    A directory is read by transformers. A .gguf is read by `nemo_kd.checkpoints` (Llama family):
    transformers takes the wrong end-of-sequence id from such files.
    """
    path, dtype = Path(cfg.model.restore_from_path), _dtype(cfg.trainer.precision)
    if path.is_dir():
        model, tokenizer_path = _from_directory(path, dtype), str(path.absolute())
        tokenizer = AutoTokenizer(tokenizer_path, use_fast=True)
    elif path.is_file():
        from nemo_kd.checkpoints.huggingface import to_transformers

        checkpoint, tokenizer_path = open_checkpoint(path), None
        model = to_transformers(checkpoint).to(dtype)
        with tempfile.TemporaryDirectory() as directory:
            checkpoint.save_tokenizer(directory)
            tokenizer = AutoTokenizer(directory, use_fast=True)
    else:
        raise HFTeacherError(
            f"no checkpoint at {path}; set model.restore_from_path to a directory with config.json "
            "and *.safetensors, or to a .gguf file"
        )
    model = model.eval().requires_grad_(False).to(torch.cuda.current_device())
    teacher = HFTeacher(model, tokenizer, tokenizer_path, cfg)
    _check(teacher, cfg)
    return teacher


def _dtype(precision: str | int) -> torch.dtype:
    name = str(precision).split("-")[0]
    if name not in DTYPES:
        raise HFTeacherError(
            f"trainer.precision={precision} is none of {', '.join(DTYPES)} for a Hugging Face "
            "teacher"
        )
    return DTYPES[name]


def _from_directory(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path), torch_dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise HFTeacherError(
            f"transformers does not load {path} as a causal language model: {reason}"
        ) from error
    if info["missing_keys"]:
        raise HFTeacherError(
            f"{path} lacks {len(info['missing_keys'])} of the model's tensors, first "
            f"{sorted(info['missing_keys'])[0]}; transformers would make them up"
        )
    return model


def _check(teacher: HFTeacher, cfg: DictConfig) -> None:
    """Refuse what would fail, or be wrong, in the middle of the pass."""
    name, size = cfg.model.restore_from_path, teacher.tokenizer.vocab_size
    if teacher.context is not None and cfg.data.max_seq_length > teacher.context:
        raise HFTeacherError(
            f"{name} knows {teacher.context} positions, data.max_seq_length is "
            f"{cfg.data.max_seq_length}; set data.max_seq_length={teacher.context} or less"
        )
    if teacher.tokenizer.tokenizer.eos_token_id is None:
        raise HFTeacherError(f"{name}: its tokenizer has no end-of-sequence token; SFT needs one")
    width = teacher.split.check()
    if width < size:
        raise HFTeacherError(
            f"{name}: the tokenizer has {size} tokens, the model logits for {width}; they belong "
            "to different models"
        )


class HFForward(AnswerHead):
    """Rows in, their answer tokens' top-K out, as `TopKForward` for a model on one device."""

    def __init__(self, teacher: HFTeacher, spec: StoreSpec, rows_per_lm_head: int) -> None:
        super().__init__(spec, rows_per_lm_head)
        self.teacher = teacher

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row], micro_batch_size: int) -> list[AnswerTopK]:
        """One pass over `rows`, a micro-batch at a time, each padded to its longest."""
        starts = range(0, len(rows), micro_batch_size)
        batches = [rows[start : start + micro_batch_size] for start in starts]
        return [topk for batch in batches for topk in self._micro_batch(batch)]

    def _micro_batch(self, rows: Sequence[Row]) -> Iterator[AnswerTopK]:
        length = max(len(row) for row in rows) - 1  # the last token is only a target
        context = self.teacher.context
        if context is not None and length > context:
            row = max(rows, key=len)
            raise RowError(
                f"row {row.row} has {len(row)} tokens, the teacher knows {context} positions; "
                "shorten or drop it"
            )
        tokens = inputs_of(rows, length)
        output = self.teacher.split.hidden(tokens.to(self.teacher.model.device))
        hidden = output.last_hidden_state.transpose(0, 1)  # [S, B, H]
        return self.topk(hidden, lambda part: self.teacher.split.logits(output, part), rows)
