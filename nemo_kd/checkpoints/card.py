"""The model card of an exported model: what its checkpoint records, and nothing else.

Format of the first lines: huggingface.co/docs/hub/model-cards, "Model card metadata".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from nemo_kd.checkpoints.source import CONVERTED, Source

FILE = "README.md"
STORES, STEPS = "kd_train_stores", "kd_trained_steps"
"""Keys of NeMo's configuration in which a training records its data and its length."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SETTINGS = (
    *("alpha", "alpha_end", "sft_weight", "kd_weight", "divergence", "beta", "skew", "support"),
    *("temperature", "temperature_end", "schedule", "schedule_steps"),
)
"""Settings of `model.kd` that a card names, where they are in effect."""


@dataclass(frozen=True)
class Card:
    """What is known beside the checkpoint's own configuration."""

    stores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Fingerprint of a store → facts about it by their names, of stores that can be read."""
    kd: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `model.kd`, defaults filled in; empty without knowledge distillation."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Figures that the training logged last, by their names."""


def model_card(
    card: Card,
    source: Source,
    config: Mapping[str, Any],
    *,
    adapted: str | None = None,
    merged: Source | None = None,
) -> str:
    """The text of a README.md; `source` records the training.

    `adapted`: the directory of the model to which adapters belong. `merged`: the model into which
    they were merged, which may be another than the one that they record.
    """
    section = source.section or {}
    converted = _converted(section if merged is None else merged.section or {})
    if merged is not None and STEPS in (merged.section or {}):
        converted = {}  # trained since
    base = Path(adapted).name if adapted else _name(converted)
    if merged is not None:
        base = base or merged.path.name
    hub = _on_the_hub(config) if adapted is None else None
    data = [one for one in section.get(STORES) or [] if isinstance(one, Mapping)]
    library = "transformers" if adapted is None else "peft"
    head: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if hub:
        head |= {"base_model": hub, "base_model_relation": "finetune"}
    tags = ["nemo", *(["knowledge-distillation"] if card.kd else [])]
    lines = ["---", yaml.safe_dump({**head, "tags": tags}, sort_keys=False).strip(), "---", ""]
    lines += [f"# {source.path.name.removesuffix('.nemo')}", ""]
    lines += ["Exported from a NeMo or Megatron-core checkpoint with `nemo-kd export`.", ""]
    rows = _rows(base, hub, converted, section, data, card)
    if rows:
        lines += ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows), ""]
    if card.figures:
        lines += ["Figures of the training's last validation, on the stores it was given:", ""]
        lines += ["| figure | value |", "|---|---|"]
        lines += [f"| {_cell(key)} | {value:.4f} |" for key, value in sorted(card.figures.items())]
        lines.append("")
    text = "\n".join(lines)
    return f"{text}\n{_seal(text)}\n"


def is_as_written(text: str) -> bool:
    """Whether a README.md is one of `model_card`, and nobody has changed it."""
    card, _, seal = text.rstrip("\n").rpartition("\n")
    return seal == _seal(card)


def _seal(text: str) -> str:
    return f"<!-- nemo-kd export {hashlib.sha256(text.encode()).hexdigest()[:16]} -->"


def _converted(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the conversion recorded of the model before its training."""
    converted = section.get(CONVERTED)
    return converted if isinstance(converted, Mapping) else {}


def _name(converted: Mapping[str, Any]) -> str | None:
    """The name of the directory that was converted."""
    name = converted.get("checkpoint")
    return Path(str(name)).name if name else None


def _on_the_hub(config: Mapping[str, Any]) -> str | None:
    """The hub's model that the converted one was loaded from, by a transformers before version 5.

    The converted one may have been trained since.
    """
    name = str(config.get("_name_or_path") or "")
    return name if HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def _rows(
    base: str | None,
    hub: str | None,
    converted: Mapping[str, Any],
    section: Mapping[str, Any],
    data: list[Mapping[str, Any]],
    card: Card,
) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    if base:
        rows.append(("base model", base))
    if hub:
        rows.append(("fine-tuned from", hub))
    if isinstance(converted.get("config"), Mapping):
        kept, total = len(converted["layers"]), converted["config"].get("num_hidden_layers")
        if kept != total:
            layers = ", ".join(map(str, converted["layers"]))
            rows.append(("layers of the base", f"{kept} of {total}: {layers}"))
    for one in data:
        known = card.stores.get(str(one.get("fingerprint")), {})
        rows.append(("training data", f"{Path(str(one.get('path'))).name}"))
        rows.append(("its fingerprint (SHA-256)", one.get("fingerprint")))
        rows += known.items()
    if STEPS in section:
        rows.append(("steps", section[STEPS]))
    rows += [(f"kd.{key}", card.kd[key]) for key in SETTINGS if card.kd.get(key) is not None]
    return rows


def _cell(value: Any) -> str:
    """A value within a table's cell."""
    return re.sub(r"[\s|]+", " ", str(value))
