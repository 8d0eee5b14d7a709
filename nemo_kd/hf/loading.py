"""Load a causal LM of transformers from a directory: all of its tensors, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from nemo_kd.checkpoints.huggingface import refuse_adapter, stored, weight_files
from nemo_kd.errors import NemoKDError
from nemo_kd.hf.settings import attention, read_config
from nemo_kd.hf.split import HFTeacherError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NO_WEIGHTS = re.compile(
    r".*(inv_freq|position_ids|\.masked_bias|\.(attn|attention|self_attention)\.bias)"
)
"""Buffers that old versions of transformers saved: frequencies, positions and causal masks."""

BEYOND = re.compile(r"(.*\.)?(mtp\.|layers\.(\d+)\.).*")


FIXED = ("bitsandbytes", "hqq")
"""Kinds of quantized weights that transformers does not move once they are loaded."""


def from_directory(
    path: Path, dtype: torch.dtype, device: torch.device | None = None
) -> PreTrainedModel:
    """Load the causal LM of a directory; raise NemoKDError unless it is complete and unambiguous.

    It is on the CPU, but for weights of a kind in `FIXED`, which are loaded to `device` if given.

    Errors: HFTeacherError for sequence-to-sequence models, models with code of their own, and
    tensors that are missing, left over or contradict each other; ConfigError; CheckpointError for
    adapters, and for files that would not be read.
    """
    try:
        config = read_config(path)
        _check_kind(path, config)
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            torch_dtype=dtype,
            attn_implementation=attention(config),
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            **({"device_map": {"": device}} if device and _method(config) in FIXED else {}),
        )
    except NemoKDError:
        raise
    except (
        *(OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError),
        ImportError,  # a quantized checkpoint, without its library
    ) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise HFTeacherError(
            f"transformers does not load {path} as a causal language model: {reason}"
        ) from error
    _check_names(path, config, info)
    _check_tied(path, model)
    return model


def _check_kind(path: Path, config: PretrainedConfig) -> None:
    """Refuse what transformers would load as something else than the directory says."""
    refuse_adapter(path)
    if config.is_encoder_decoder:
        raise HFTeacherError(
            f"{path} is a sequence-to-sequence model ({config.model_type}); its decoder alone is "
            "no causal language model"
        )
    unknown = [name for name in config.architectures or () if not hasattr(transformers, name)]
    if unknown:
        raise HFTeacherError(
            f"{path}: config.json names the architecture {unknown[0]}, which transformers "
            f"{transformers.__version__} does not have; code beside a checkpoint is not run"
        )
    method = _method(config)
    # transformers' mapping has bitsandbytes under the names of its two widths.
    if method not in (None, *FIXED, *AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise HFTeacherError(
            f"{path}: its weights are quantized by {method}, which transformers "
            f"{transformers.__version__} does not know and would pass over"
        )
    if any(path.glob("*.safetensors")):
        weight_files(path)


def _method(config: PretrainedConfig) -> str | None:
    """How the weights are quantized; None if they are not."""
    found = getattr(config, "quantization_config", None) or {}
    if not isinstance(found, dict):
        found = found.to_dict()
    method = found.get("quant_method")
    if method is None and (found.get("load_in_8bit") or found.get("load_in_4bit")):
        return "bitsandbytes"  # an older file
    return None if method is None else str(getattr(method, "value", method))


def on_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Return a model of `from_directory` on the device that it was given."""
    return model if _method(model.config) in FIXED else model.to(device)


def _check_names(path: Path, config: PretrainedConfig, info: dict[str, Any]) -> None:
    """Raise HFTeacherError for tensors that are missing or left over."""
    if info["missing_keys"]:
        raise HFTeacherError(
            f"{path} lacks {len(info['missing_keys'])} of the model's tensors, such as "
            f"{sorted(info['missing_keys'])[0]}; transformers would initialize them at random"
        )
    left = sorted(_left_over(info["unexpected_keys"], config))
    if left:
        raise HFTeacherError(
            f"{path} has {len(left)} tensors that {config.model_type} does not use, such as "
            f"{left[0]}: config.json is not that of these weights, or this transformers "
            f"({transformers.__version__}) is too old for them"
        )


def _left_over(names: Iterable[str], config: PretrainedConfig) -> Iterable[str]:
    """Yield the names that are no old buffers and no layers that predict further tokens."""
    further = getattr(config, "num_nextn_predict_layers", None)
    for name in names:
        match = BEYOND.fullmatch(name)
        number = int(match[3]) if match and match[3] else None
        beyond = match and further and (number is None or number >= config.num_hidden_layers)
        if not (beyond or NO_WEIGHTS.fullmatch(name)):
            yield name


def _check_tied(path: Path, model: PreTrainedModel) -> None:
    """Raise HFTeacherError if tied embeddings have different values in the files.

    transformers would keep the last one that it reads.
    """
    if not any(path.glob("*.safetensors")):
        return
    embedding = model.get_input_embeddings().weight
    names = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is embedding
    ]
    found = stored(path, names) if len(names) > 1 else {}
    first, *others = found.items() or [("", torch.zeros(0))]
    for name, values in others:
        if not torch.equal(values, first[1]):
            raise HFTeacherError(
                f"{path}: {first[0]} and {name} differ, but config.json ties them "
                "(tie_word_embeddings); set it to false if they are two"
            )
