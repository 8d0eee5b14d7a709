"""Keys of other programs and frequent guesses, mapped to this package's keys."""

from __future__ import annotations

from collections.abc import Mapping

from nemo_kd.spelling import nearest

DISTILLATION = "NeMo-Aligner's settings of the distillation are in model.kd here"
STORE = (
    "NeMo-Aligner's JSONL becomes a store (nemo-kd convert), which model.data.train_ds.store and "
    "model.data.validation_ds.store name"
)
SELECTION = (
    "every answer token is distilled: distilling only those with the largest student entropy gave "
    "worse students"
)
SCALE = (
    "a scale s of both logits is model.kd.temperature=1/s with kd_weight multiplied by s squared, "
    "and needs a store that was dumped at that temperature"
)
EVERYWHERE = {
    "pretrained_checkpoint": "the model is model.restore_from_path",
    "trainer.replace_sampler_ddp": "Lightning calls it trainer.use_distributed_sampler",
    "trainer.strategy": "NeMo chooses it",
    "trainer.plugins": "NeMo chooses them",
    "trainer.callbacks": "NeMo chooses them; see exp_manager",
    "model.overwrite_base_config": "every key of the command replaces the checkpoint's",
}
TRAINING = EVERYWHERE | {
    "model.knowledge_distillation.kd_loss_weight": "it is model.kd.kd_weight",
    "model.knowledge_distillation.sft_loss_weight": "it is model.kd.sft_weight",
    "model.knowledge_distillation.kd_loss": "it is model.kd.divergence, where fwd_kl is forward_kl "
    "and bwd_kl is reverse_kl, with model.kd.support=topk",
    "model.knowledge_distillation.logits_scale": SCALE,
    "model.knowledge_distillation.target_logits_scale": SCALE,
    "model.knowledge_distillation.cross_tokenizer": "teacher and student must share a tokenizer",
    "model.knowledge_distillation": f"{DISTILLATION}: kd_loss_weight is kd_weight, sft_loss_weight "
    "is sft_weight, kd_loss is divergence (fwd_kl: forward_kl, bwd_kl: reverse_kl) with "
    "support=topk",
    "trainer.knowledge_distillation.save_interval": "checkpoints are saved at each "
    "trainer.val_check_interval",
    "trainer.knowledge_distillation.limit_train_batches": "set trainer.max_steps",
    "trainer.knowledge_distillation": "its keys are in trainer: trainer.max_steps, "
    "trainer.max_epochs, trainer.val_check_interval, trainer.limit_val_batches, "
    "trainer.gradient_clip_val",
    "trainer.sft": "its keys are in trainer: trainer.max_steps, trainer.max_epochs, "
    "trainer.val_check_interval, trainer.limit_val_batches, trainer.gradient_clip_val",
    "model.kd.positions": SELECTION,
    "model.kd.top_entropy_fraction": SELECTION,
    "model.data.data_prefix": STORE,
    "model.data.data_impl": STORE,
    "model.data.n_chunks": STORE,
    "model.data.n_examples_per_chunk": STORE,
    "model.data.splits_string": f"{STORE}; nemo-kd split divides one",
    "model.data.skip_warmup": STORE,
    "model.data.index_mapping_dir": "neither stores nor SFT files have an index",
    "model.data.seq_length": "it is model.data.train_ds.max_seq_length",
    "model.data.top_k": "it is nemo-kd convert's --top-k",
    "model.data.num_workers": "it is model.data.train_ds.num_workers",
    "model.data.sample": "samples are drawn for trainer.max_steps steps",
    "model.data.train_ds.file_path": "it is model.data.train_ds.file_names, a list",
    "model.data.validation_ds.file_path": "it is model.data.validation_ds.file_names, a list",
    "model.label_smoothing": "the cross-entropy beside the distillation has no label smoothing; "
    "leave the key out",
    "output_dir": "the directory of a run is exp_manager.explicit_log_dir",
}
DUMP = EVERYWHERE | {
    "top_k": "it is dump.top_k",
    "output_path": "it is output_dir, a directory",
    "start_from_idx": "all ranks share the rows, and an interrupted dump resumes by itself",
    "end_at_idx": "all ranks share the rows, and an interrupted dump resumes by itself",
    "data.data": "its keys are in data: data.file_path, data.max_seq_length, ...",
    "data.min_seq_length": "every row is dumped",
    "data.memmap_workers": "rows are read without an index file",
    "data.index_mapping_dir": "rows are read without an index file",
    "data.hf_dataset": "rows are always read from the file itself",
    "data.global_sample_mapping": "each row is dumped once, in the order of the file",
    "data.sample": "each row is dumped once",
    "data.shuffle": "each row is dumped once, in the order of the file",
    "data.drop_last": "each row is dumped once",
    "model.context_parallel_size": "a forward pass needs no context parallelism; for long samples "
    "raise model.tensor_model_parallel_size or lower max_tokens_per_micro_batch",
    "model.optim": "a teacher is not trained",
    "model.peft": "merge adapters into the teacher first, with examples/merge_lora.py",
    "model.data": "the settings of the rows are in data",
    "exp_manager": "the directory of a dump is output_dir",
}
"""Dotted key or block → advice for the error message, in training and in dump configurations."""


def explained(path: str, moved: Mapping[str, str]) -> str:
    """Return the advice for the dotted key `path`; "" for a key that is not in `moved`."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        if found := moved.get(".".join(parts[:length])):
            return found
    # The last part must be alike too: in long paths the blocks decide, whatever is in them.
    alike = [one for one in moved if nearest(parts[-1], [one.rpartition(".")[2]], cutoff=0.8)]
    near = nearest(path, alike, cutoff=0.85)
    return moved[near] if near else ""
