"""Train from stores in Megatron-LM's own training program, `megatron.training.pretrain`.

`add_arguments` is an `extra_args_provider`, `datasets_provider` a data set provider and
`forward_step` a forward step for a program like Megatron-LM's `pretrain_gpt.py`. See
`examples/megatron_lm/pretrain_gpt_kd.py`.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from nemo_kd.data import OVER_LONG
from nemo_kd.errors import NemoKDError
from nemo_kd.loss import KDSchedule
from nemo_kd.mcore.batches import EvaluationBatches, KDBatches
from nemo_kd.mcore.cuda_graphs import refuse_full_iteration
from nemo_kd.mcore.dataset import KDDataset
from nemo_kd.mcore.micro_batch import Reduced
from nemo_kd.mcore.mix import Source
from nemo_kd.mcore.multi_token import NO_TEACHER
from nemo_kd.mcore.resume import keep_settings
from nemo_kd.mcore.training import ForwardStep, LossFunction, kd_forward_step
from nemo_kd.sft.tokenizer import HFTokenizer, first_difference, tokenizer_fingerprint
from nemo_kd.store import Store, StoreSpec

SPIKE = 10.0
"""Factor above the largest loss so far that Megatron-LM's `--check-for-spiky-loss` reports."""

_STORED = "the store holds the tokens already"
_LOSS = "the loss of a store replaces Megatron-LM's cross-entropy"
_GROUPS = {
    "data and dataloader": _STORED,
    "Logits Distillation": "--kd-store replaces Megatron-LM's own distillation",
    "rl": "a store has no rollouts",
    "biencoder": "the student is a GPT",
    "vision": "the student is a GPT",
}
"""Title of a group of Megatron-LM's arguments → why none of them has a meaning with a store."""

_MEANINGFUL = {"seq_length", "create_attention_mask_in_dataloader"}
"""Arguments of `_GROUPS` that have one. Masks are causal: none is created in any case."""

_SINGLE = {
    "num_workers": "the training process itself reads the samples",
    "chat_template": _STORED,
    "sft_tokenizer_prompt_format": _STORED,
    "tokenizer_prompt_format": _STORED,
    "cross_entropy_loss_fusion": _LOSS,
    "cross_entropy_fusion_impl": _LOSS,
    "fp16_lm_cross_entropy": _LOSS,
    "mtp_num_layers": NO_TEACHER,
    "hybrid_context_parallel": "it packs Megatron-LM's own batches",
    "dataloader_save": "the position is in the checkpoint: consumed_train_samples",
    "iterations_to_skip": "it reads Megatron-LM's own batches",
    "full_validation": "set --eval-iters to the batches of the validation stores",
    "multiple_validation_sets": "--kd-valid-store takes several stores as one validation set",
    "validation_set_names": "--kd-valid-store takes several stores as one validation set",
    "log_straggler": "the forward step does not measure it",
    "inprocess_restart": "start the program again; it resumes from the checkpoint",
    "yaml_cfg": "a file has no --kd arguments; give arguments on the command line",
}
"""Further arguments that a store gives no meaning, and why."""


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the `--kd-…` arguments to Megatron-LM's: an `extra_args_provider`.

    The settings of the loss are the fields of `KDSchedule`. Changes two defaults: no evaluation,
    which needs `--kd-valid-store`, and data loaders that come from the data set provider.
    """
    group = parser.add_argument_group("distillation from stores")
    group.add_argument("--kd-store", nargs="+", required=True, help="stores to train on")
    group.add_argument("--kd-valid-store", nargs="+", help="stores for validation")
    group.add_argument("--kd-store-alpha", nargs="+", type=float, help="alpha of each --kd-store")
    group.add_argument(
        "--kd-store-weight", nargs="+", type=float, help="share of the draws of each --kd-store"
    )
    group.add_argument("--kd-over-long", choices=OVER_LONG, default="error")
    group.add_argument(
        "--kd-allow", nargs="+", default=[], help="settings that may differ from the checkpoint's"
    )
    for field in fields(KDSchedule):
        text = f"see `{field.name}` of nemo_kd.loss.KDSchedule"
        group.add_argument(option(field.name), help=text, **_kind(field))
    interval = parser.get_default("eval_interval") or 1000  # None in 0.19, which divides by it
    parser.set_defaults(eval_iters=0, eval_interval=interval, dataloader_type="external")
    return parser


def check_arguments() -> None:
    """Parse the command line once; refuse what a store would silently ignore, or contradictions.

    An argument of Megatron-LM without a meaning may have its default value.

    Errors: NemoKDError.
    """
    from megatron.training.arguments import parse_args

    meaningless: list[tuple[str, str, Any, str]] = []

    def provider(parser: ArgumentParser) -> ArgumentParser:
        meaningless.extend(_meaningless(parser))
        return add_arguments(parser)

    args = parse_args(provider)
    for given, name, default, why in meaningless:
        if getattr(args, name) != default:
            raise NemoKDError(f"{given} has no effect with --kd-store: {why}; remove it")
    refuse_full_iteration(args, lambda name: f"--{name.replace('_', '-')}")
    if args.dataloader_type != "external":
        raise NemoKDError(
            f"--dataloader-type {args.dataloader_type} has no effect with --kd-store, whose order "
            "depends on --seed only; remove it"
        )
    if bool(args.kd_valid_store) != bool(args.eval_iters):
        raise NemoKDError(
            f"--kd-valid-store is {args.kd_valid_store} and --eval-iters {args.eval_iters}: "
            "validation needs both; give the other one too, or neither"
        )
    for name in ("kd_store_alpha", "kd_store_weight"):
        values = getattr(args, name)
        if values is not None and len(values) != len(args.kd_store):
            raise NemoKDError(
                f"{option(name.removeprefix('kd_'))} has {len(values)} values for "
                f"{len(args.kd_store)} stores; give one for each --kd-store"
            )
    settings(args)


def without_index_builder() -> None:
    """Leave out Megatron-LM's compilation of its index builder, which this module has imported.

    Megatron-core's wheel has it compiled, and lacks the Makefile without which Megatron-LM exits.
    """
    from megatron.core.datasets import utils

    def compile_helpers() -> None:
        """Compile nothing."""

    utils.compile_helpers = compile_helpers


def settings(args: Namespace) -> KDSchedule:
    """Return the settings of the loss.

    Errors: NemoKDError for values that it refuses.
    """
    _check_store_alpha(args)
    names = [field.name for field in fields(KDSchedule)]
    try:
        return KDSchedule(**{name: getattr(args, f"kd_{name}") for name in names})
    except NemoKDError as error:
        name, _, rest = str(error).partition(" ")
        raise NemoKDError(f"{option(name)} {rest}" if name in names else str(error)) from error


def _check_store_alpha(args: Namespace) -> None:
    """Refuse settings of the loss that have no effect when each store has its own alpha."""
    if args.kd_store_alpha is None:
        return
    if (args.kd_sft_weight, args.kd_kd_weight) != (None, None):
        raise NemoKDError(
            "--kd-store-alpha gives stores weights of their own: remove it, or --kd-sft-weight and "
            "--kd-kd-weight"
        )
    if args.kd_alpha_end is not None:
        raise NemoKDError(
            f"--kd-alpha-end {args.kd_alpha_end} has no effect on the training with "
            "--kd-store-alpha, by which each store has its own alpha; remove one of them"
        )


def datasets_provider(
    numbers: Sequence[int], vp_stage: int | None = None
) -> tuple[Iterator[Any], Iterator[Any] | None, None]:
    """Return the iterators over training and validation stores that `pretrain` reads.

    They start at the numbers of consumed samples in Megatron-LM's checkpoint. With `--sft` samples
    are packed, as Megatron-LM's own; see `_take_sft`. `numbers` of samples are not used: iterators
    are endless.
    Each evaluation has the first samples of the validation stores, every one once if `--eval-iters`
    batches hold them all.

    Errors: NemoKDError for stores of other tokenizers than the model's, for a checkpoint of other
    stores or another loss, and those of `KDDataset`.
    """
    from megatron.training import get_args, get_tokenizer

    args = get_args()
    _take_sft(args)
    check_vocabulary(args, get_tokenizer(), Store(args.kd_store[0]).spec)
    training = KDDataset(
        [
            Source(Store(path), alpha, weight)
            for path, alpha, weight in zip(
                args.kd_store,
                args.kd_store_alpha or [None] * len(args.kd_store),
                args.kd_store_weight or [None] * len(args.kd_store),
                strict=True,
            )
        ],
        **_dataset_options(args),
    )
    training.check(settings(args), naming=option)
    resumed = args.load if args.iteration else None  # nothing to compare with after --finetune
    keep_settings(
        training,
        settings(args),
        save=args.save,
        load=resumed,
        allow=args.kd_allow,
        steps=args.train_iters,  # known by now, also with --train-samples
    )
    micro = args.micro_batch_size
    train = KDBatches(
        training,
        micro_batch_size=micro,
        global_batch_size=_step_samples(args),
        consumed_samples=args.consumed_train_samples,
    )
    if not args.kd_valid_store:
        return train, None, None
    stores = [Source(Store(path)) for path in args.kd_valid_store]
    options = {**_dataset_options(args), "temperature": _last_temperature(args, stores)}
    validation = KDDataset(stores, **options, shuffle=False)
    validation.check(settings(args), training=False, naming=option)
    valid = EvaluationBatches(
        validation,
        micro_batch_size=getattr(args, "eval_micro_batch_size", micro),
        global_batch_size=getattr(args, "eval_global_batch_size", args.global_batch_size),
        consumed_samples=args.consumed_valid_samples,
        steps=args.eval_iters,
    )
    return train, valid, None


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # every rank reads the stores


def forward_step(
    data_iterator: Iterator[Any], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, LossFunction]:
    """Run a micro-batch of the stores: a `forward_step_func` of `pretrain`."""
    output, loss = _step()(data_iterator, model, return_schedule_plan)
    return output, partial(_checked, loss)


def check_vocabulary(args: Namespace, tokenizer: Any, spec: StoreSpec) -> None:
    """Compare Megatron-LM's tokenizer with the store's.

    Tokenizers of transformers by their tokens, others by their size. Megatron-LM's NullTokenizer
    of versions before 0.16 counts an end-of-document token.

    Errors: NemoKDError if they differ, or if the model has fewer rows than the store has ids.
    """
    size = int(tokenizer.vocab_size)
    stored = f"the tokenizer of {args.kd_store[0]}, of {spec.vocab_size} ids"
    if not _same_tokens(args, spec):
        sizes = {size, size - 1} if args.tokenizer_type == "NullTokenizer" else {size}
        if spec.vocab_size not in sizes:
            raise NemoKDError(
                f"--tokenizer-type {args.tokenizer_type} has {size} ids and is not {stored}; give "
                "the tokenizer that the teacher was dumped with"
            )
    if args.padded_vocab_size < spec.vocab_size:
        raise NemoKDError(
            f"the model has {args.padded_vocab_size} rows, fewer than {stored}; raise "
            f"--padded-vocab-size to at least {spec.vocab_size}"
        )


def _same_tokens(args: Namespace, spec: StoreSpec) -> bool:
    """Whether the tokens were compared and are the same; False if they cannot be compared."""
    path, stored = args.tokenizer_model, spec.tokenizer.get("fingerprint")
    if stored is None or path is None or not Path(path).is_dir():
        return False
    own = HFTokenizer(path)
    if tokenizer_fingerprint(own) == stored:
        return True
    raise NemoKDError(
        f"--tokenizer-model {path} is not the tokenizer of {args.kd_store[0]}"
        f"{first_difference(own, spec.tokenizer)}; give the tokenizer that the teacher was dumped "
        "with"
    )


@cache
def _step() -> ForwardStep:
    from megatron.training import get_args

    args = get_args()
    return kd_forward_step(
        settings(args),
        Store(args.kd_store[0]).spec.vocab_size,
        progress=lambda: (args.curr_iteration, args.train_iters),
        naming=option,
    )


def _checked(loss: LossFunction, losses: torch.Tensor) -> Reduced:
    """Return the loss of a micro-batch, validated as Megatron-LM does; losses [B, S]."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    args, machine = get_args(), get_rerun_state_machine()
    total, number, report = loss(losses)
    validate = partial(machine.validate_result, result=total, tolerance=0.0)
    if args.check_for_nan_in_loss_and_grad:
        for wrong in (torch.isnan, torch.isinf):
            validate(rejection_func=wrong, message=f"{wrong.__name__} of the loss", fatal=True)
    if args.check_for_spiky_loss:
        spiky = partial(machine.is_unexpectedly_large, threshold=SPIKE, context="loss")
        validate(rejection_func=spiky, message="spiky loss", fatal=False)
    return total, number, report


def _step_samples(args: Namespace) -> int:
    """Return the samples of a step; of one micro-batch of every rank where their number changes."""
    from megatron.core import parallel_state

    changing = ("rampup_batch_size", "step_batch_size_schedule")
    if any(getattr(args, name, None) for name in changing):
        return int(args.micro_batch_size * parallel_state.get_data_parallel_world_size())
    return int(args.global_batch_size)


def _last_temperature(args: Namespace, sources: Sequence[Source]) -> float:
    """Return the temperature of evaluations; the first one if the last was not dumped."""
    last = settings(args).end.temperature
    stores = [source.data for source in sources if isinstance(source.data, Store)]
    dumped = all(last in store.spec.temperatures for store in stores)
    return last if dumped else float(args.kd_temperature)


def _dataset_options(args: Namespace) -> dict[str, Any]:
    return {
        "seq_length": args.seq_length,
        "temperature": args.kd_temperature,
        "seed": args.seed,
        "over_long": args.kd_over_long,
        "naming": option,
        "packed": args.kd_packed,
    }


def _take_sft(args: Namespace) -> None:
    """Take `--sft`, by which samples are packed, as `args.kd_packed`; Megatron-LM's loop has none.

    With it, the loop logs means over packs of their own means, and its validations divide by zero
    (before Megatron-core 0.17) or count a 0 for each of the packs without answers that fill their
    last batch. Without it, it logs Σ / number of answer tokens, which the forward step reports. It
    reads `sft` for nothing else but its own batches.
    """
    if not hasattr(args, "kd_packed"):
        args.kd_packed, args.sft = bool(args.sft), False


def _meaningless(parser: ArgumentParser) -> list[tuple[str, str, Any, str]]:
    """Return (option, destination, default, reason) of the arguments without a meaning."""
    found = []
    for group in parser._action_groups:
        for action in group._group_actions:
            why = _SINGLE.get(action.dest) or _GROUPS.get(group.title or "")
            if why and action.dest not in _MEANINGFUL and action.option_strings:
                found.append((action.option_strings[0], action.dest, action.default, why))
    return found


def option(name: str) -> str:
    return "--seq-length" if name == "seq_length" else f"--kd-{name.replace('_', '-')}"


def _kind(field: Field[Any]) -> dict[str, Any]:
    """Return argparse's keywords for a field of `KDSchedule`."""
    kind = str(field.type).removesuffix(" | None")
    if kind == "bool":
        return {"action": "store_true"}
    kinds: dict[str, Callable[[str], Any]] = {"float": float, "int": int, "str": str}
    return {"type": kinds[kind], "default": field.default}
