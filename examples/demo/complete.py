"""Greedy completions of held-out prompts by several .nemo models, with NeMo's own generation.

A prompt is a row's `input`, formatted as in NeMo's default template `{input} {output}`; a
completion ends at end-of-sequence or after `--tokens`. Writes a JSON file:

    {"tokens": …, "samples": [{"prompt", "reference", …, "completions": {model: text}}]}
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import track

from nemo_kd.cli.failures import reported
from nemo_kd.nemo import start
from nemo_kd.outputs import is_json_with, refuse_foreign, refuse_inputs

if TYPE_CHECKING:
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )


def settings() -> DictConfig:
    """One process, float32; everything else comes from the model's own configuration."""
    model: dict[str, Any] = {
        "seed": 1234,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "activations_checkpoint_granularity": None,
        "activations_checkpoint_method": None,
        "activations_checkpoint_num_layers": None,
        "data": {},
    }
    trainer = {
        "devices": 1,
        "num_nodes": 1,
        "accelerator": "gpu",
        "precision": 32,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return OmegaConf.create({"model": model, "trainer": trainer, "exp_manager": None})


def complete(model: MegatronGPTSFTModel, prompts: list[str], tokens: int) -> list[str]:
    """Return a greedy completion of each prompt, of at most `tokens` tokens."""
    from nemo.collections.nlp.modules.common.text_generation_strategy import (
        GPTModelTextGenerationStrategy,
    )
    from nemo.collections.nlp.modules.common.text_generation_utils import generate

    tokenizer = model.tokenizer
    response: dict[str, Any] = generate(
        model.eval(),
        inputs=prompts,
        tokens_to_generate=tokens,
        greedy=True,
        add_BOS=False,
        # Passed explicitly: NeMo's own selection imports all of its multimodal models.
        strategy=GPTModelTextGenerationStrategy(model),
    )
    completions = []
    for prompt, ids in zip(prompts, response["token_ids"], strict=True):
        # All rows are padded to the longest prompt plus its completion.
        start = len(tokenizer.text_to_ids(prompt))
        added = ids[start : start + tokens]
        if tokenizer.eos_id in added:
            added = added[: added.index(tokenizer.eos_id)]
        completions.append(tokenizer.ids_to_text(added))
    return completions


def parse_models(specifications: list[str]) -> dict[str, Path]:
    """`["sft=runs/sft.nemo", …]` → name → path; every path must exist."""
    models = {}
    for specification in specifications:
        name, equals, path = specification.partition("=")
        if not equals or not Path(path).exists():
            raise typer.BadParameter(
                f"{specification!r}: expected NAME=PATH with an existing .nemo",
                param_hint="--model",
            )
        models[name] = Path(path)
    return models


def main(
    model: Annotated[list[str], typer.Option(help="NAME=PATH of a .nemo; repeat for each model")],
    prompts: Annotated[Path, typer.Option(help="SFT JSONL with input and output")],
    output: Annotated[Path, typer.Option(help="JSON file for the completions")],
    samples: Annotated[int, typer.Option(help="number of prompts to complete")] = 6,
    tokens: Annotated[int, typer.Option(help="maximum tokens per completion")] = 64,
) -> None:
    """Complete the first prompts of a file with each model."""
    console = Console()
    models = parse_models(model)
    refuse_inputs([output], [prompts, *models.values()])
    refuse_foreign(output, "completions of this script", is_json_with("tokens", "samples"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rows = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()[:samples]]
    texts = [row["input"].strip(" ") for row in rows]
    cfg = settings()
    with console.status("starting NeMo"):
        start.prepare(cfg)
        cfg.model.data = {}  # no data set is built
        from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
        from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
            MegatronGPTSFTModel,
        )

        trainer = start.build_trainer(cfg)
        start.start_process_groups(cfg.model, trainer)
    results: list[dict[str, Any]] = [
        {
            "prompt": text,
            "reference": row["output"],
            "module": row.get("module"),
            "function": row.get("function"),
            "completions": {},
        }
        for row, text in zip(rows, texts, strict=True)
    ]
    for name, path in track(models.items(), f"completing {len(rows)} prompts", console=console):
        # NeMo checks the batch size of its first model again, and generation changes it.
        unset_num_microbatches_calculator()
        restored = start.restore(path, MegatronGPTSFTModel, cfg, trainer)
        for result, text in zip(results, complete(restored, texts, tokens), strict=True):
            result["completions"][name] = text
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {"tokens": tokens, "samples": results}
    output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with reported():
        typer.run(main)
