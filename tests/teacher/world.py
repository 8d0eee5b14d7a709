# ruff: noqa: E402 (NeMo comes after its patches)
"""Dump Hugging Face teachers in one process, and the same model in NeMo; run as a script.

Writes checkpoints, data and stores into a directory; `parity.json`, how far the two differ;
`refusals.json`, the messages about checkpoints that cannot be teachers. Further arguments are
overrides for all dumps.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import shutil
import sys
import tarfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from nemo_kd.nemo import cpu

cpu.install()
sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # `tests`

import torch
import yaml
from hydra import compose, initialize_config_dir
from megatron.core import num_microbatches_calculator, parallel_state
from omegaconf import DictConfig
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_kd.checkpoints import open_checkpoint, write_nemo
from nemo_kd.cli.teacher import load, read
from nemo_kd.hf import teacher as hf
from nemo_kd.sft.tokenizer import first_difference, tokenizer_fingerprint
from nemo_kd.store import Store
from nemo_kd.teacher.config import GenerateConfig
from nemo_kd.teacher.dump import dump, store_spec
from nemo_kd.teacher.generation.generate import generate
from nemo_kd.teacher.rows import sft_rows
from tests.checkpoints import models
from tests.teacher.typist import write_typist
from tests.tiny import functions

ROWS = 9
SETTINGS = sys.argv[2:]


def configuration(
    directory: Path, name: str, store: str, *overrides: str, script: str = "dump_teacher_topk"
) -> DictConfig:
    paths = [
        f"model.restore_from_path={directory}/{name}",
        f"data.file_path={directory}/train.jsonl",
        f"output_dir={directory}/{store}",
    ]
    with initialize_config_dir(f"{sys.path[0]}/conf", version_base=None):
        return compose(script, [*SETTINGS, *paths, *overrides])


def generation(cfg: DictConfig) -> GenerateConfig:
    config = read(cfg)
    assert isinstance(config, GenerateConfig)
    return config


def start(cfg: DictConfig) -> Any:
    num_microbatches_calculator.unset_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()
    return load(read(cfg), cfg)


def parity(directory: Path) -> dict[str, Any]:
    """Dump the Hugging Face teacher, and compare it with NeMo's pass of the converted one."""
    cfg = configuration(directory, "llama", "store", "teacher.kind=hf")
    teacher = start(cfg)
    dump(read(cfg), teacher)
    rows = sft_rows(read(cfg), teacher)
    spec = store_spec(read(cfg), teacher, rows.file, rows.template)
    hf_rows = [rows[i] for i in range(len(rows))]
    forward = teacher.forward(spec, 50)
    ours = [forward([row], 1)[0] for row in hf_rows]
    cfg = configuration(directory, "llama.nemo", "nemo_store")
    nemo = start(cfg)
    rows = sft_rows(read(cfg), nemo)
    nemo_rows = [rows[i] for i in range(len(rows))]
    forward = nemo.forward(spec, 50)
    theirs = [forward([row], 1)[0] for row in nemo_rows]
    Store(directory / "store").check(
        tokenizer_fingerprint=tokenizer_fingerprint(nemo.tokenizer),
        vocab_size=nemo.tokenizer.vocab_size,
    )
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "tokens": sum(len(a.ids) for a, _ in pairs),
        "largest_logit": max(float(a.logits.max()) for a, _ in pairs),
        "samples_equal": all(
            (a.input_ids == b.input_ids).all() and (a.loss_mask == b.loss_mask).all()
            for a, b in zip(hf_rows, nemo_rows, strict=True)
        ),
        "ids_equal": all(torch.equal(a.ids, b.ids) for a, b in pairs),
        "logits": max(float((a.logits - b.logits).abs().max()) for a, b in pairs),
        "logsumexp": max(float((a.logsumexp - b.logsumexp).abs().max()) for a, b in pairs),
        "store_fits_the_converted_student": True,
        "differences": differences(directory, nemo.tokenizer),
    }


def gap(directory: Path) -> None:
    """Dump a teacher whose end of sequence has an id far above the others, and its conversion."""
    model = models.llama("untied_llama3")
    model.resize_token_embeddings(360)
    models.save(model, directory / "gap")
    for file in (directory / "gap").glob("*token*.json"):
        file.write_text(file.read_text().replace("</s>", "<end>"))
    path = directory / "gap/tokenizer.json"
    backend = json.loads(path.read_text())
    backend["model"]["vocab"]["<end>"] = backend["added_tokens"][1]["id"] = 350
    path.write_text(json.dumps(backend))
    write_nemo(open_checkpoint(directory / "gap"), directory / "gap.nemo", range(4))
    first_row = (directory / "train.jsonl").read_text().partition("\n")[0]
    (directory / "short.jsonl").write_text(first_row + "\n")
    settings = ["dump.top_k=351", f"data.file_path={directory}/short.jsonl"]
    for kind, name in (("hf", "gap"), ("nemo", "gap.nemo")):
        cfg = configuration(directory, name, f"gap_{kind}", f"teacher.kind={kind}", *settings)
        dump(read(cfg), start(cfg))
    write_nemo(open_checkpoint(directory / "llama"), directory / "cut.nemo", range(1))
    with tarfile.open(directory / "cut.nemo") as archive:
        archive.extractall(directory / "cut")
    path = directory / "cut/model_config.yaml"
    config = yaml.safe_load(path.read_text())
    config["tokenizer"] |= {"type": str(directory / "gap.tokenizer"), "model": None}
    path.write_text(yaml.safe_dump(config))
    try:
        start(configuration(directory, "cut", "none"))
    except ValueError as error:
        (directory / "cut.txt").write_text(str(error))


def without_answers(directory: Path) -> None:
    """Dump rows of which some, and all of one shard, have no answer within the limit."""
    rows = [json.loads(line) for line in (directory / "train.jsonl").read_text().splitlines()]
    for row in (2, 4, 5, 6, 7):
        rows[row]["output"] = ""
    (directory / "gaps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = configuration(
        directory,
        "llama",
        "gaps",
        f"data.file_path={directory}/gaps.jsonl",
        "data.no_answer=drop",
        "data.prompt_template='{input}{output}'",  # the default's space would be an answer
        "teacher.kind=hf",
    )
    printed = io.StringIO()
    with redirect_stdout(printed):
        dump(read(cfg), start(cfg))
    (directory / "gaps.txt").write_text(printed.getvalue())


def differences(directory: Path, ours: Any) -> list[str]:
    """The messages about a store whose tokenizer has a different token, one more, or is missing."""
    renamed, longer = directory / "renamed", directory / "longer"
    shutil.copytree(directory / "llama", renamed)
    for file in renamed.glob("*token*.json"):
        file.write_text(file.read_text().replace("</s>", "<end>"))
    more = models.tokenizer()
    more.add_tokens(["<more>"])
    more.save_pretrained(longer)
    paths = (renamed, longer, directory / "nowhere")
    return [first_difference(ours, {"library": "huggingface", "path": str(p)}) for p in paths]


def refusals(directory: Path) -> dict[str, str]:
    headless = models.save(models.llama("untied_llama3"), directory / "headless")
    whole = LlamaForCausalLM.from_pretrained(headless)
    whole.model.save_pretrained(headless)  # the base model alone
    config = json.loads((headless / "config.json").read_text())
    config["architectures"] = ["LlamaForCausalLM"]
    (headless / "config.json").write_text(json.dumps(config))
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    models.save(LlamaForCausalLM(LlamaConfig(vocab_size=61, **small)), directory / "small")
    (directory / "empty").mkdir()
    said = {}
    for name in ("headless", "small", "nowhere", "empty"):
        said[name] = refused(configuration(directory, name, "none"))
    long = configuration(directory, "llama", "none", "data.max_seq_length=512")
    odd = configuration(directory, "llama", "none", "trainer.precision=8")
    return {**said, "long": refused(long), "precision": refused(odd)}


def refused(cfg: DictConfig) -> str:
    try:
        hf.load_teacher(read(cfg))
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return "not refused"


GENERATION = [
    "data.prompt_template='{input}{output}'",
    "generation.max_new_tokens=40",
    "generation.temperature=1.0",
    "generation.samples_per_prompt=3",
]


class Interrupted(Exception):
    """A kill in the middle of a shard."""


def generations(directory: Path) -> None:
    """Generate answers in one go, interrupted and resumed, filtered; then dump the written file."""
    teacher: Any = None

    def run(store: str, *overrides: str, calls: int | None = None) -> None:
        nonlocal teacher
        more = [*GENERATION, *overrides]
        cfg = configuration(directory, "typist", store, *more, script="generate_with_teacher")
        if teacher is None:
            teacher = start(cfg)

        count = iter(range(calls)) if calls is not None else itertools.count()

        class Limited(type(teacher)):  # type: ignore[misc]
            def writer(self, *arguments: Any) -> Any:
                write = super().writer(*arguments)

                def limited(prompts: Any) -> Any:
                    if next(count, None) is None:
                        raise Interrupted
                    return write(prompts)

                return limited

        limited = copy.copy(teacher)
        limited.__class__ = Limited
        generate(generation(cfg), limited)

    run("answers")
    try:
        run("resumed", calls=4)
    except Interrupted:
        assert not (directory / "resumed/manifest.json").exists()
        assert len(list((directory / "resumed").glob("shard-*"))) > 0
        run("resumed")
    run("filtered", "generation.filter.pattern='[0-9].*[0-9]'", "generation.keep_unfinished=true")
    shutil.copy(directory / "answers/answers.jsonl", directory)
    cfg = configuration(
        directory,
        "typist",
        "dumped",
        f"data.file_path={directory}/answers.jsonl",
        "data.prompt_template='{input}{output}'",
        "teacher.kind=hf",
    )
    dump(read(cfg), teacher)
    write_nemo(open_checkpoint(directory / "typist"), directory / "typist.nemo", range(2))
    more = [*GENERATION, "teacher.kind=nemo"]
    cfg = configuration(directory, "typist.nemo", "nemo", *more, script="generate_with_teacher")
    generate(generation(cfg), start(cfg))


def main(directory: Path) -> None:
    pairs = functions()[:ROWS]
    text = "\n".join(json.dumps(pair) for pair in pairs)
    (directory / "train.jsonl").write_text(text + "\n")
    model = models.llama("tied_grouped")
    models.save(model, directory / "llama")
    models.write_gguf(model, directory / "llama.gguf")
    checkpoint = open_checkpoint(directory / "llama")
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
    )
    write_nemo(checkpoint, directory / "llama.nemo", range(4))
    (directory / "parity.json").write_text(json.dumps(parity(directory)))
    cfg = configuration(directory, "llama.gguf", "gguf_store", "teacher.kind=hf")
    dump(read(cfg), start(cfg))
    without_answers(directory)
    gap(directory)
    write_typist(directory / "typist")
    generations(directory)
    (directory / "refusals.json").write_text(json.dumps(refusals(directory)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
