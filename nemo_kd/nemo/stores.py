"""Open and check the stores of a training or validation block, and build their data sets."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from omegaconf import DictConfig

from nemo_kd.data import LengthLimit, check_schedule, fit_lengths, notices, pack_samples
from nemo_kd.nemo.dataset import MicroBatches, StoreSFTDataset, Student
from nemo_kd.nemo.packed import PackedStoreSFTDataset
from nemo_kd.nemo.positions import max_positions
from nemo_kd.nemo.sft_files import shared_arguments
from nemo_kd.nemo.splits import TrainSplit
from nemo_kd.sft.tokenizer import first_difference, tokenizer_fingerprint
from nemo_kd.store import Store, StoreError
from nemo_kd.store.codecs import TopP
from nemo_kd.store.replaced import refuse_other_ranks
from nemo_kd.teacher.layout import Layout
from nemo_kd.teacher.rows import limited_length


def store_dataset(
    model: Student,
    directory: str,
    data_cfg: DictConfig,
    alpha: float | None,
    training: bool,
) -> StoreSFTDataset:
    """Open the store at `directory` as a data set, a data set of packs if `packed_sequence` is set.

    Logs how many samples were truncated or dropped.
    """
    store = open_store(model, directory)
    check_schedule(store, model.kd_schedule, alpha, naming="model.kd.{}".format)
    split, where = TrainSplit.of(data_cfg), "train_ds" if training else "validation_ds"
    whole, positions = data_cfg.max_seq_length, max_positions(model.cfg)
    length = limited_length(whole, positions, f"model.data.{where}", Layout.of_job())
    limit = LengthLimit.of_positions(whole, positions)
    fitting = fit_lengths(store, limit, split.over_long)
    Layout.of_job().say_each(notices(store, fitting, limit))
    if training:
        _log_what_is_learned(model, store, alpha)
    arguments = {
        "longest": length,
        "micro_batches": micro_batches(model, data_cfg),
        **shared_arguments(model, data_cfg, f"model.data.{where}"),
    }
    if not split.packed_sequence:
        return StoreSFTDataset(store, fitting, alpha, **{**arguments, "max_seq_length": length})
    seed = split.shuffle_seed if split.shuffle else None
    # `whole` of a pack, in which each sample has positions of its own
    packing = pack_samples(store, fitting, whole, seed, longest=length)
    _log(store, str(packing))
    return PackedStoreSFTDataset(store, packing, alpha, **arguments)


def micro_batches(model: Student, data_cfg: DictConfig) -> MicroBatches:
    """Return how batches of a block are split into micro-batches for the loss of this process."""
    return MicroBatches(
        data_cfg.micro_batch_size,
        model.kd_schedule.temperature,
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_world_size(),
    )


def _log(store: Store, text: str) -> None:
    Layout.of_job().say(f"store {store.origin}: {text}")


def open_store(model: Student, directory: str) -> Store:
    """Open the store at `directory`; refuse it if it does not fit the student or its loss.

    Collective over all ranks: one small all-gather.
    """
    store, fingerprint = Store(directory), tokenizer_fingerprint(model.tokenizer)
    try:
        store.check(
            tokenizer_fingerprint=fingerprint,
            vocab_size=model.tokenizer.vocab_size,
            temperature=model.kd_schedule.temperature,
        )
    except StoreError as error:
        origin = store.spec.tokenizer
        if origin.get("fingerprint") == fingerprint:
            raise
        raise StoreError(f"{error}{first_difference(model.tokenizer, origin)}") from error
    if not len(store):
        raise StoreError(f"store {directory} has no samples")
    # One rank looks at every file, and tells the others.
    layout, refusal = Layout.of_job(), ""
    if layout.rank == 0:
        try:
            store.check_files()
        except StoreError as error:
            refusal = str(error)
    opened: list[tuple[str, str]] = [("", "")] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(opened, (store.fingerprint, refusal))
    refuse_other_ranks(store.directory, [fingerprint for fingerprint, _ in opened])
    if opened[0][1]:
        raise StoreError(opened[0][1])
    return store


def _log_what_is_learned(model: Student, store: Store, alpha: float | None) -> None:
    kd = model.kd_schedule
    if not (kd.distils if alpha is None else alpha > 0):
        _log(store, "the distillation has weight 0: only the labels are learned from it")
    elif kd.support == "topk" and store.spec.profile == TopP.name:
        _log(
            store,
            "profile top_p with model.kd.support=topk: nothing is learned from the teacher at "
            "answer tokens with a single kept id; use support bucket to learn from these too",
        )
