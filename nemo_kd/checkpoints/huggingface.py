"""Read a Hugging Face directory; build a transformers model of any checkpoint."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from safetensors import safe_open

from nemo_kd.checkpoints.config_json import completed, read_model
from nemo_kd.checkpoints.families import check_tensors, family_of, shapes_of
from nemo_kd.checkpoints.model import Checkpoint, CheckpointError, finite, reading
from nemo_kd.checkpoints.safetensors_file import INDEX, NAMES, SINGLE
from nemo_kd.checkpoints.windows import fix_windows
from nemo_kd.files import decode_json, read_bounded
from nemo_kd.tokenizer_files import load_files
from nemo_kd.vocabulary import VocabularySize

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

OTHER_FORMAT = "consolidated"
"""Start of the names of Mistral's own files, copies of the weights under other names."""
FLOATS = {name: dtype for dtype, name in NAMES.items()}
"""Types of weights, by safetensors' names."""
MAX_CONFIG, MAX_INDEX = 4 << 20, 64 << 20  # bytes of config.json and of the index


class HuggingFaceCheckpoint:
    """A directory that `save_pretrained` wrote, sharded or not; tensors are memory-mapped."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.name = str(self.directory)
        refuse_adapter(self.directory)
        path = self.directory / "config.json"
        with reading(str(path)):
            self.config = _config(path)
            self.model = read_model(self.config)
        path = self.directory / "generation_config.json"
        with reading(str(path)):
            self.generation_config = read_object(path) if path.is_file() else None
        self._files: dict[str, Any] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in weight_files(self.directory):
            with reading(str(path)):
                file: Any = safe_open(str(path), framework="pt")
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    if key in shapes:
                        raise CheckpointError(f"{path}: {key} is in another file too")
                    self._files[key] = file
                    shapes[key], self._dtypes[key] = _described(path, key, file.get_slice(key))
        check_tensors(self.name, self.model, shapes)
        self._check_tied()
        sizes = Counter[torch.dtype]()
        for key, shape in shapes.items():
            sizes[self._dtypes[key]] += math.prod(shape)
        self.dtype = sizes.most_common(1)[0][0]

    def _check_tied(self) -> None:
        """Raise CheckpointError if the file has an LM head beside a tied embedding, and another."""
        head, table = "lm_head.weight", "model.embed_tokens.weight"
        if not self.model.tied or head not in self._files:
            return
        if not torch.equal(self.tensor(head), self.tensor(table)):
            raise CheckpointError(
                f"{self.name}: tie_word_embeddings is true, but {head} is not {table}; set it to "
                "false in config.json if they are two"
            )

    def dtype_of(self, name: str) -> torch.dtype:
        """The stored type of the tensor of this name."""
        return self._dtypes[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of this name, `[out, in]`."""
        with reading(f"{self.name}: {name}"):
            return finite(self.name, name, self._files[name].get_tensor(name))

    def save_tokenizer(self, directory: str) -> VocabularySize:
        """Load the tokenizer with transformers and save it; return its vocabulary's size."""
        with reading(
            self.name,
            "no tokenizer that transformers can load; put tokenizer.json and "
            "tokenizer_config.json beside config.json",
        ):
            tokenizer = load_files(self.directory)
            tokenizer.save_pretrained(directory)
            return VocabularySize.of(tokenizer)


def refuse_adapter(directory: Path) -> None:
    """Raise CheckpointError for an adapter beside a model, which transformers would load."""
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory} has an adapter_config.json: transformers would load its adapter, or the "
            "adapter's base model; merge the adapter (peft: merge_and_unload), or remove the file"
        )


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"no config.json in {path.parent}; expected a Hugging Face checkpoint directory "
            "(config.json and *.safetensors) or a .gguf file"
        )
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file of a model."""
    found: dict[str, Any] = decode_json(read_bounded(path, MAX_CONFIG), dict[str, Any])
    return found


def _described(path: Path, key: str, part: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Return a tensor's shape and type; raise CheckpointError unless its values are floats."""
    if part.get_dtype() not in FLOATS:
        raise CheckpointError(
            f"{path}: {key} is {part.get_dtype()}; weights must be one of {', '.join(FLOATS)}"
        )
    return tuple(part.get_shape()), FLOATS[part.get_dtype()]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _indexed(index: Path) -> list[str]:
    """Return the files of an index; raise CheckpointError if one lies elsewhere."""
    with reading(str(index)):
        found = decode_json(read_bounded(index, MAX_INDEX), _Index)
        names = sorted(set(found.weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(
                f"{index} names {name!r}; files must lie beside it, without a directory"
            )
    return names


def weight_files(directory: Path) -> list[Path]:
    """The files that transformers reads; raise CheckpointError if others lie beside them.

    transformers takes `model.safetensors` if it is there, else what the index names.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        files, found = [single], f"{SINGLE} is there"
    elif index.is_file():
        files, found = [directory / name for name in _indexed(index)], f"{index.name} names others"
    else:
        raise CheckpointError(
            f"{directory} has neither {SINGLE} nor {index.name}; pickled weights (*.bin) are not "
            "read: save them again with transformers' save_pretrained(..., safe_serialization=True)"
        )
    absent = [path.name for path in files if not path.is_file()]
    if absent:
        raise CheckpointError(
            f"{index} lists {len(files)} files, of which {len(absent)} are missing (first: "
            f"{absent[0]}); download them"
        )
    left = [path.name for path in sorted(directory.glob("*.safetensors")) if path not in files]
    left = [name for name in left if not name.startswith(OTHER_FORMAT)]
    if single.is_file() and index.is_file():
        left.append(index.name)
    if left:
        raise CheckpointError(
            f"{directory}: {left[0]} would not be read, because {found}; remove the files that do "
            "not belong to the model"
        )
    return files


def stored(directory: Path, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Return those of the named tensors that the directory's safetensors have."""
    found: dict[str, torch.Tensor] = {}
    for path in weight_files(directory):
        with reading(str(path)):
            file: Any = safe_open(str(path), framework="pt")
            found |= {name: file.get_tensor(name) for name in set(names) & set(file.keys())}
    return found


def to_transformers(
    checkpoint: Checkpoint, keep_layers: Sequence[int] | None = None
) -> PreTrainedModel:
    """Load the checkpoint, or some of its layers, as a float32 transformers model."""
    from transformers import AutoModelForCausalLM

    kept = range(checkpoint.model.num_layers) if keep_layers is None else keep_layers
    model = replace(checkpoint.model, num_layers=len(kept))
    config = transformers_config(checkpoint, kept)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    state = {name: checkpoint.tensor(_source(name, kept)).float() for name in shapes_of(model)}
    if model.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    built.load_state_dict(state, assign=True)
    built.tie_weights()
    # The only buffer; it is not in the state and was created on the meta device.
    built.model.rotary_emb = type(built.model.rotary_emb)(config)
    return built.eval()


def transformers_config(checkpoint: Checkpoint, kept: Sequence[int]) -> PretrainedConfig:
    """The configuration of the layers `kept`, in float32."""
    from transformers import AutoConfig

    family = family_of(checkpoint.model)
    settings, _ = completed(cut_layers(checkpoint.config, kept), family)
    settings |= {"model_type": family.model_type, "torch_dtype": "float32"}
    config: PretrainedConfig = AutoConfig.for_model(**settings)
    fix_windows(config)
    return config


def transformers_own(checkpoint: HuggingFaceCheckpoint, kept: Sequence[int]) -> PreTrainedModel:
    """The layers `kept` as a float32 model, of the weights that transformers itself reads."""
    from transformers import AutoModelForCausalLM

    whole = range(checkpoint.model.num_layers)
    model = AutoModelForCausalLM.from_pretrained(
        str(checkpoint.directory),
        config=transformers_config(checkpoint, whole),
        torch_dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
    )
    model.model.layers = torch.nn.ModuleList(model.model.layers[layer] for layer in kept)
    for position, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = position
    model.config.num_hidden_layers = len(kept)
    own: PreTrainedModel = model.eval()
    return own


def cut_layers(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The settings of a model of the layers `kept`."""
    count = config["num_hidden_layers"]
    cut = {key: value for key, value in config.items() if key != "model_type"}
    cut["num_hidden_layers"] = len(kept)
    if isinstance(config.get("layer_types"), list) and len(config["layer_types"]) == count:
        cut["layer_types"] = [config["layer_types"][layer] for layer in kept]
    return cut


def _source(name: str, kept: Sequence[int]) -> str:
    """Return a tensor's name in the checkpoint of which the layers `kept` are kept."""
    prefix, layers, rest = name.partition("model.layers.")
    if not layers:
        return name
    layer, _, rest = rest.partition(".")
    return f"{prefix}{layers}{kept[int(layer)]}.{rest}"
