"""A tiny real teacher, student, tokenizer and SFT file for tests, made once a session.

The models are NeMo's own `MegatronGPTSFTModel` with a few thousand weights, the text is the
standard library's, the tokenizer a SentencePiece BPE trained on it. Run as a script it writes
all of it into a directory: model building patches torch for the CPU, so it has its own process.
"""

from __future__ import annotations

import ast
import inspect
import json
import random
import sys
from pathlib import Path

VOCABULARY = 500
MODULES = ("textwrap", "shlex", "string", "fractions", "statistics", "bisect", "heapq", "calendar")


def functions() -> list[dict[str, str]]:
    """Docstring → body pairs of the standard library: real text, no download."""
    pairs = []
    for name in MODULES:
        tree = ast.parse(inspect.getsource(__import__(name)))
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            doc = ast.get_docstring(node)
            if doc and len(node.body) > 1:
                body = "\n".join(ast.unparse(part) for part in node.body[1:])
                pairs.append({"input": f"{node.name}: {doc[:80]}", "output": body[:120]})
    return pairs


def write_data(directory: Path, rows: int = 37, heldout: int = 10) -> None:
    import sentencepiece

    pairs = functions()
    random.Random(0).shuffle(pairs)
    for name, part in (("train", pairs[:rows]), ("heldout", pairs[rows : rows + heldout])):
        lines = [json.dumps({**pair, "number": i}) for i, pair in enumerate(part)]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    corpus = directory / "corpus.txt"
    corpus.write_text("\n".join(pair["input"] + "\n" + pair["output"] for pair in pairs))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        bos_id=1,
        eos_id=2,
        unk_id=0,
        pad_id=3,
        minloglevel=2,
    )


def model_config(directory: Path, layers: int, hidden: int, pad_to: int) -> dict[str, object]:
    return {
        "mcore_gpt": True,
        "micro_batch_size": 2,
        "global_batch_size": 2,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "seed": 1234,
        "encoder_seq_length": 128,
        "max_position_embeddings": 128,
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": 2 * hidden,
        "num_attention_heads": 4,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "normalization": "rmsnorm",
        "activation": "fast-swiglu",
        "position_embedding_type": "rope",
        "bias": False,
        "share_embeddings_and_output_weights": True,
        "make_vocab_size_divisible_by": pad_to,
        "init_method_std": 0.1,
        "answer_only_loss": True,
        "tokenizer": {
            "library": "sentencepiece",
            "type": None,
            "model": str(directory / "tokenizer.model"),
            "vocab_file": None,
            "merge_file": None,
            "sentencepiece_legacy": False,
        },
        "optim": {"name": "adamw", "lr": 1e-3},
        "data": {split: {"metric": {"name": "loss"}} for split in ("validation_ds", "test_ds")},
    }


def write_model(directory: Path, name: str, layers: int, hidden: int, pad_to: int) -> None:
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_sft_model import (
        MegatronGPTSFTModel,
    )
    from omegaconf import OmegaConf

    from nemo_kd.nemo import cpu, start

    cfg = OmegaConf.create({"model": model_config(directory, layers, hidden, pad_to)})
    cfg.trainer = {"devices": 1, "num_nodes": 1, "logger": False, "precision": 32}
    cfg.trainer.update(enable_checkpointing=False, enable_model_summary=False)
    cfg.exp_manager = None
    for key, value in cpu.cpu_settings().items():
        OmegaConf.update(cfg, key, value, force_add=True)
    trainer = start.build_trainer(cfg)
    start.start_process_groups(cfg.model, trainer)
    MegatronGPTSFTModel(cfg.model, trainer).save_to(str(directory / f"{name}.nemo"))


def main(directory: Path) -> None:
    from nemo_kd.nemo import cpu

    cpu.install()
    directory.mkdir(parents=True, exist_ok=True)
    write_data(directory)
    # 500 words, padded to 504 at one rank and to 512 at two: a checkpoint loads under either.
    write_model(directory, "untrained", layers=4, hidden=64, pad_to=8)
    write_model(directory, "student", layers=4, hidden=32, pad_to=8)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
