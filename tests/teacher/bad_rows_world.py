# ruff: noqa: E402 (NeMo comes after its patches)
"""Dump files with bad rows, corrected files and changing files, by a teacher with NaN and -inf.

`python bad_rows_world.py DIRECTORY`: stores, and `said.json`, what each dump printed or refused.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from nemo_kd.nemo import cpu

cpu.install()
sys.path.insert(0, str(Path(__file__).parent.parent.parent))  # `tests`

import torch
from hydra import compose, initialize_config_dir
from megatron.core import num_microbatches_calculator, parallel_state
from omegaconf import DictConfig
from transformers import LlamaForCausalLM, PhiConfig, PhiForCausalLM

from nemo_kd.cli.teacher import load, read
from nemo_kd.hf.teacher import HFForward, HFTeacher
from nemo_kd.lock import DirectoryLock
from nemo_kd.sft.rows import Row
from nemo_kd.teacher.config import GenerateConfig
from nemo_kd.teacher.dump import dump
from nemo_kd.teacher.generation.generate import generate
from tests.checkpoints import models
from tests.teacher.typist import write_typist
from tests.tiny import functions

ROWS = 9
NAN = "\u0142"  # in no other row; its embedding is NaN
PRESENT = (1, 40, 41, 47, 100, 298)
"""The ids for which the teacher has a logit above -inf."""
SETTINGS = [
    "trainer.precision=32",
    "data.max_seq_length=128",
    "model.micro_batch_size=3",
    "rows_per_shard=3",
    "dump.top_k=20",
    "teacher.kind=hf",
]
PROFILES = {
    "plain": ["dump.temperatures=[1.0,2.0]"],
    "all": ["dump.top_k=299"],
    "compact": ["dump.profile=compact"],
    "top_p": ["dump.profile=top_p", "++dump.profile_options={p: 1.0}"],
    "sampled": ["dump.profile=sampled"],
}
GENERATION = [
    "data.prompt_template='{input}{output}'",
    "generation.max_new_tokens=9",
    "generation.keep_unfinished=true",
    "generation.samples_per_prompt=2",
    "generation.temperature=1.0",
]


def write_teacher(directory: Path) -> None:
    """Write a model whose LM head has a bias of -inf for most ids."""
    torch.manual_seed(2)
    tokenizer = models.tokenizer()
    config = PhiConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    model = PhiForCausalLM(config)
    with torch.no_grad():
        model.lm_head.bias.fill_(-torch.inf)
        model.lm_head.bias[list(PRESENT)] = 0.0
        for token in tokenizer(NAN)["input_ids"]:
            model.model.embed_tokens.weight[token] = torch.nan
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def break_typist(directory: Path) -> None:
    """Write a teacher whose logits are all NaN after a prompt with a tilde."""
    write_typist(directory)
    model = LlamaForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model.model.embed_tokens.weight[ord("~") - 32] = torch.nan
    model.save_pretrained(directory)


class World:
    """A directory, one loaded teacher at a time, and the output of each run."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.said: dict[str, list[str]] = {}
        self.name = ""
        self.teacher: Any = None

    def configuration(self, script: str, name: str, file: str, store: str, more: Any) -> DictConfig:
        paths = [
            f"model.restore_from_path={self.directory}/{name}",
            f"data.file_path={self.directory}/{file}",
            f"output_dir={self.directory}/{store}",
        ]
        cfg = compose(script, [*SETTINGS, *paths, *more])
        if self.name != name:
            num_microbatches_calculator.unset_num_microbatches_calculator()
            parallel_state.destroy_model_parallel()
            self.teacher, self.name = load(read(cfg), cfg), name
        return cfg

    def run(self, key: str, act: Callable[[], object]) -> None:
        """Record [its refusal, its standard output, its standard error]."""
        output, errors, refusal = io.StringIO(), io.StringIO(), ""
        with redirect_stdout(output), redirect_stderr(errors):
            try:
                act()
            except ValueError as error:
                refusal = f"{type(error).__name__}: {error}"
        self.said[key] = [refusal, output.getvalue(), errors.getvalue()]

    def dump(self, key: str, file: str, store: str, *more: str, meddle: Any = None) -> None:
        cfg = self.configuration("dump_teacher_topk", "phi", file, store, more)
        teacher = self.teacher if meddle is None else meddle(self.teacher)
        self.run(key, lambda: dump(read(cfg), teacher))

    def generate(self, key: str, store: str, *more: str) -> None:
        overrides = [*GENERATION, *more]
        cfg = self.configuration("generate_with_teacher", "typist", "prompts", store, overrides)
        config = read(cfg)
        assert isinstance(config, GenerateConfig)
        self.run(key, lambda: generate(config, self.teacher))


def lines(rows: Sequence[Any]) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def meddling(act: Callable[[], None]) -> Any:
    """Teacher → one during whose forward passes something else happens."""

    class Forward(HFForward):
        def __call__(self, rows: Sequence[Row], micro_batch_size: int) -> Any:
            if self.select.spec.top_k == 20:  # a pass of the dump, not of the check before it
                act()
            return super().__call__(rows, micro_batch_size)

    class Teacher(HFTeacher):
        def forward(self, *arguments: Any) -> HFForward:
            return Forward(self, *arguments)

    return lambda teacher: Teacher(
        teacher.model, teacher.tokenizer, teacher.tokenizer_origin["path"], teacher.layout
    )


def appending(path: Path, text: str) -> Callable[[], None]:
    """Append to the file, as another process might."""

    def act() -> None:
        with path.open("a") as file:
            file.write(text)

    return act


def main(directory: Path) -> None:
    write_teacher(directory / "phi")
    break_typist(directory / "typist")
    world, rows = World(directory), [{k: v[:60] for k, v in row.items()} for row in functions()]
    clean = rows[:ROWS]
    (directory / "clean").write_text(lines(clean))
    bad = [*clean[:2], "not json", *clean[3:5], {"input": 3, "output": "x"}, {"input": "x"}, ""]
    broken = {"input": f"a {NAN} b", "output": "c"}
    (directory / "bad").write_text(lines([*bad, broken]))
    (directory / "nothing").write_text(lines(["x", "y"]))

    for profile, more in PROFILES.items():
        world.dump(profile, "clean", f"store-{profile}", *more)

    world.dump("refused", "bad", "refused")
    world.dump("dropped", "bad", "dropped", "on_bad_row=drop")
    stop = meddling(lambda: os.kill(os.getpid(), signal.SIGTERM))
    world.dump("dropped, complete", "bad", "dropped")
    world.dump("dropped, otherwise", "bad", "dropped", "data.no_answer=drop")
    world.dump("dropped, again", "bad", "dropped", "on_bad_row=drop")
    empty = {"input": "x", "output": ""}
    (directory / "empty").write_text(lines([*clean[:2], empty]))
    world.dump("empty", "empty", "empty-store", "data.no_answer=drop")
    world.dump("empty, otherwise", "empty", "empty-store", "on_bad_row=drop")
    world.dump("empty, all drop", "empty", "empty-store", "on_bad_row=drop", "data.no_answer=drop")
    (directory / "half").write_text(lines([*clean[:2], broken, clean[3], broken]))
    world.dump("half", "half", "half-store", "on_bad_row=drop", meddle=stop)
    world.dump("half, all", "half", "half-store")
    world.dump("half, the same", "half", "half-store", "on_bad_row=drop")
    world.dump("nothing", "nothing", "nothing-store", "on_bad_row=drop")

    # One bad row late in the file; mended, the rest is kept.
    data = directory / "data"
    data.write_text(lines([*clean[:7], broken, clean[8]]))
    world.dump("NaN", "data", "growing")
    data.write_text(lines(clean))
    world.dump("mended", "data", "growing")
    shutil.copytree(directory / "growing", directory / "mended")
    world.dump("mended, fresh", "data", "mended-fresh")
    data.write_text(lines([clean[1], *clean[1:], *rows[ROWS : ROWS + 2]]))
    world.dump("longer", "data", "growing")
    shutil.copytree(directory / "growing", directory / "longer")
    world.dump("longer, fresh", "data", "longer-fresh")
    data.write_text(lines(clean[:4]))
    world.dump("shorter", "data", "growing")
    shutil.copytree(directory / "growing", directory / "shorter")
    world.dump("shorter, fresh", "data", "shorter-fresh")
    world.dump("other K", "data", "growing", "dump.top_k=19")

    data.write_text(lines(clean))
    world.dump("changed", "data", "changed", meddle=meddling(appending(data, lines([rows[ROWS]]))))
    world.dump("changed, again", "data", "changed")
    world.dump("changed, fresh", "data", "changed-fresh")

    with DirectoryLock(directory / "locked"):
        world.dump("locked", "clean", "locked")

    prompts = [{"input": "abc"}, {"input": "x~y"}, "oops", {"input": "q" * 5}]
    (directory / "prompts").write_text(lines(prompts))
    world.generate("prompts refused", "generated")
    (directory / "prompts").write_text(lines([*prompts[:2], prompts[3]]))
    world.generate("answers refused", "generated")
    (directory / "prompts").write_text(lines(prompts))
    world.generate("answers dropped", "generated-dropped", "on_bad_row=drop")
    (directory / "prompts").write_text(lines([{"input": "abc"}, {"input": "abc" * 9}]))
    more = [
        "data.max_seq_length=20",
        "generation.keep_unfinished=true",
    ]  # and the end of sequence: 10 of a prompt
    world.generate("prompts truncated", "generated-short", *more)
    (directory / "said.json").write_text(json.dumps(world.said))


if __name__ == "__main__":
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
    )
    with initialize_config_dir(f"{sys.path[0]}/conf", version_base=None):
        main(Path(sys.argv[1]))
