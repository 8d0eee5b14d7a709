"""Steps for what runs share: data, teachers, students, stores. Each is made once.

Every function returns the steps in order, starting with those that it depends on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from steps import ROOT, Step
from study import TEACHER_LAYERS, settings

sys.path.insert(0, str(ROOT / "examples" / "demo"))

from smollm2 import smollm2


@dataclass(frozen=True)
class Assets:
    """Files below `out` and the steps that make them."""

    cfg: DictConfig
    out: Path

    # --- where things are ------------------------------------------------------------------

    def data(self, domain: str) -> Path:
        return self.out / "data" / domain

    def model(self, domain: str, layers: int, teacher: str = "tuned") -> Path:
        """The path of a teacher, or of a student before training."""
        if layers < TEACHER_LAYERS:
            return self.out / "models" / f"{domain}-l{layers}.nemo"
        if teacher == "stock":
            return self.out / "models" / "stock.nemo"
        return self.out / "runs" / f"{domain}-teacher" / "checkpoints" / "teacher.nemo"

    def store(self, domain: str, teacher: str, split: str, store: str = "") -> Path:
        name = "-".join(filter(None, (domain, teacher, split, store)))
        return self.out / "stores" / name

    def groups(self, domain: str, temperature: float = 1.0) -> Path:
        """The test split by groups; a run is validated on them at its own temperature."""
        return self.out / "stores" / f"{domain}-test-groups{_at(temperature)}"

    def of(self, domain: str) -> DictConfig:
        """The configuration with what the domain has of its own."""
        return settings(self.cfg, domain)

    # --- how they are made -----------------------------------------------------------------

    def stock(self) -> Step:
        path = self.model("", TEACHER_LAYERS, "stock")
        return Step("stock", ("examples/convert_hf_to_nemo.py", str(smollm2()), str(path)), path)

    def data_steps(self, domain: str) -> list[Step]:
        data, directory = self.of(domain).data, self.data(domain)
        tokenizer = self.model("", TEACHER_LAYERS, "stock").with_suffix(".tokenizer")
        arguments = [f"--tokenizer={tokenizer}", f"--output-dir={directory}"]
        if data.packages is None:
            program = ["experiments/make_problems.py"]
            program += ["--several-wordings"] if data.get("several_wordings") else []
        else:
            program = ["experiments/split_data.py", domain]
            arguments += [f"--packages={','.join(data.packages)}"]
        arguments += [f"--{key.replace('_', '-')}={data[key]}" for key in SIZES]
        step = Step(f"data-{domain}", (*program, *arguments), directory / "data.json")
        return [self.stock(), step]

    def student_steps(self, domain: str, layers: int) -> list[Step]:
        """Prune the domain's `student_from` to the layers with the highest block influence."""
        path = self.model(domain, layers)
        chosen = path.with_suffix(".json")
        first = self.data_steps(domain)
        source = str(smollm2())
        if self.of(domain).student_from == "tuned":
            teacher = self.model(domain, TEACHER_LAYERS)
            source = str(self.out / "models" / f"{domain}-teacher-hf")
            step = export_step(f"{domain}-teacher", teacher, Path(source))
            first = [*self.teacher_steps(domain, "tuned"), step]
        measure = [source, f"--data={self.data(domain)}/train.jsonl"]
        measure += [f"--keep={layers}", f"--output={chosen}", "--samples=64"]
        convert = [source, str(path), f"--keep-layers=@{chosen}"]
        name = f"{domain}-l{layers}"
        return [
            *first,
            Step(f"layers-{name}", ("examples/demo/block_influence.py", *measure), chosen),
            Step(f"prune-{name}", ("examples/convert_hf_to_nemo.py", *convert), path),
        ]

    def teacher_steps(self, domain: str, teacher: str) -> list[Step]:
        if teacher == "stock":
            return self.data_steps(domain)
        cfg, product = self.of(domain), self.model(domain, TEACHER_LAYERS)
        directory = product.parents[1]
        step = Step(
            f"tune-{domain}-teacher",
            (
                "examples/train_gpt_sft_kd.py",
                "name=teacher",
                f"model.restore_from_path={self.model('', TEACHER_LAYERS, 'stock')}",
                f"exp_manager.explicit_log_dir={directory}",
                f"trainer.max_steps={cfg.teacher.steps}",
                f"trainer.val_check_interval={min(50, cfg.teacher.steps)}",
                f"model.optim.lr={cfg.teacher.lr}",
                f"model.data.train_ds.file_names=[{self.data(domain)}/train.jsonl]",
                "model.data.train_ds.concat_sampling_probabilities=[1.0]",
                "model.kd.alpha=0",
                *training(cfg),
                *CHECKPOINTS,
            ),
            product,
            resumes_in=directory,
        )
        return [*self.data_steps(domain), step]

    def store_steps(self, domain: str, teacher: str, store: str) -> list[Step]:
        """Dump the teacher's logits of the training split, of its answers.

        `plain-K` and `compact-K` with K logits; `top_p-K` with those that hold `TOP_P` of the
        probability, at most K; `sampled-N` with N draws. All others are converted from a full dump.
        `@T` after any of these is a dump at temperatures 1 and T. `plain-K-all` has all tokens, not
        only the answers'.
        """
        whole = f"plain-{self.cfg.teacher.top_k}"
        every_token = store.endswith(ALL_TOKENS)
        profile, _, size = store.removesuffix(ALL_TOKENS).rpartition("-")
        size, _, temperature = size.partition("@")
        if store == whole or temperature or profile == "sampled" or every_token:
            options = [f"dump.top_k={size}", f"dump.profile={profile}"]
            options += [f"dump.temperatures=[1.0,{temperature}]"] if temperature else []
            options += ["model.answer_only_loss=false"] if every_token else []
            steps = [self._dump(domain, teacher, "train", store, options)]
            return [*self.teacher_steps(domain, teacher), *steps]
        source = self.store(domain, teacher, "train", whole)
        target = self.store(domain, teacher, "train", store)
        convert = ["convert", str(source), str(target), f"--profile={profile}", f"--top-k={size}"]
        convert += [f"--p={TOP_P}"] if profile == "top_p" else []
        product = target / "manifest.json"
        step = Step(target.name, ("nemo-kd", *convert, "--overwrite"), product)
        return [*self.store_steps(domain, teacher, whole), step]

    def held_out_steps(self, domain: str, temperature: float = 1.0) -> list[Step]:
        """Dump validation and test, always with the fine-tuned teacher, for all runs alike.

        Another temperature of a run adds a test split by groups that has it, too.
        """
        top_k = [f"dump.top_k={self.cfg.teacher.top_k}"]
        steps = [
            *self.teacher_steps(domain, "tuned"),
            self._dump(domain, "tuned", "valid", "", top_k),
        ]
        for t in dict.fromkeys((1.0, temperature)):
            test, groups = self.store(domain, "tuned", f"test{_at(t)}"), self.groups(domain, t)
            both = [] if t == 1 else [f"dump.temperatures=[1.0,{t:g}]"]
            split = [str(test), str(groups), f"--data={self.data(domain)}/data.json"]
            product = groups / "groups.json"
            steps += [
                self._dump(domain, "tuned", "test", "", [*top_k, *both], target=test),
                Step(groups.name, ("experiments/split_store.py", *split), product),
            ]
        return steps

    def answers_steps(self, domain: str) -> list[Step]:
        """Generate the fine-tuned teacher's answers to the training prompts, with its logits.

        Greedy ones, one per prompt, unless the domain has a block `answers`.
        """
        target = self.store(domain, "tuned", "answers")
        own = self.of(domain).get("answers")
        sampled = () if own is None else SAMPLED
        arguments = [
            "examples/generate_with_teacher.py",
            "teacher.kind=nemo",
            f"output_dir={target}",
            f"model.restore_from_path={self.model(domain, TEACHER_LAYERS)}",
            f"data.file_path={self.data(domain)}/train.jsonl",
            f"data.max_seq_length={generated_length(self.of(domain))}",
            f"generation.max_new_tokens={self.of(domain).generation.tokens}",
            *(f"generation.{key}={own[name]}" for name, key in sampled),
            f"dump.top_k={self.cfg.teacher.top_k}",
            f"trainer.precision={self.of(domain).train.precision}",
            f"model.micro_batch_size={16 if own is None else own.micro_batch}",
            "rows_per_shard=64",
        ]
        step = Step(target.name, tuple(arguments), target / "manifest.json", resumes_in=target)
        return [*self.teacher_steps(domain, "tuned"), step]

    def _dump(
        self,
        domain: str,
        teacher: str,
        split: str,
        store: str,
        options: Sequence[str],
        target: Path | None = None,
    ) -> Step:
        target = target or self.store(domain, teacher, split, store)
        arguments = [
            "examples/dump_teacher_topk.py",
            f"model.restore_from_path={self.model(domain, TEACHER_LAYERS, teacher)}",
            f"data.file_path={self.data(domain)}/{split}.jsonl",
            f"output_dir={target}",
            f"data.max_seq_length={self.of(domain).data.max_tokens}",
            f"trainer.precision={self.of(domain).train.precision}",
            "model.micro_batch_size=16",
            "rows_per_shard=128",
            *options,
        ]
        return Step(target.name, tuple(arguments), target / "manifest.json", resumes_in=target)


SIZES = ("train", "valid", "test", "groups", "max_tokens", "seed")
SAMPLED = (
    ("per_prompt", "samples_per_prompt"),
    ("temperature", "temperature"),
    ("filter", "filter.function"),
)
"""A key of the block `answers` → the one below `generation`."""
TOP_P = 0.8
ALL_TOKENS = "-all"


def _at(temperature: float) -> str:
    return "" if temperature == 1 else f"@{temperature:g}"


def generated_length(cfg: DictConfig) -> int:
    """Room for the longest prompt and the longest generated answer."""
    return int(cfg.data.max_tokens + cfg.generation.tokens)


def export_step(name: str, model: Path, directory: Path) -> Step:
    """Write a `.nemo` as a Hugging Face directory."""
    command = ("examples/convert_nemo_to_hf.py", str(model), str(directory))
    return Step(f"export-{name}", command, directory)


def training(cfg: DictConfig, max_tokens: int | None = None) -> list[str]:
    """Overrides common to all trainings: precision, lengths (the data's or another), batches."""
    train = cfg.train
    return [
        f"trainer.precision={train.precision}",
        "trainer.enable_progress_bar=false",
        f"model.data.train_ds.max_seq_length={max_tokens or cfg.data.max_tokens}",
        f"model.global_batch_size={train.batch}",
        f"model.micro_batch_size={train.micro_batch}",
        f"model.optim.sched.warmup_steps={train.warmup}",
    ]


# Only the last state is kept: enough to resume after a kill.
CHECKPOINTS = (
    "exp_manager.checkpoint_callback_params.save_top_k=0",
    "+exp_manager.checkpoint_callback_params.save_last=true",
)
