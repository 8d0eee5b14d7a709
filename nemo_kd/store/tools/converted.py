"""Conversions that lose something, as a store's spec records them in `source.converted`.

A store of the profile `plain` that was made of one with p = 0.2, or of rounded log-probabilities,
must not pass for an exact dump. Recorded is what was read, oldest first: profile, its options and
K. The first K of `plain`, a smaller `p` of `top_p`, and any profile made of `plain` keep what a
dump keeps, up to the rounding of `plain`, and are not recorded.
"""

from __future__ import annotations

from typing import Any

from nemo_kd.store.codecs import TopP
from nemo_kd.store.codecs.compact import Compact
from nemo_kd.store.spec import StoreSpec
from nemo_kd.store.tools.selection import same_encoding

CONVERTED = "converted"
NOTE = f"source.{CONVERTED}"


def after(old: StoreSpec, new: StoreSpec) -> dict[str, Any]:
    """Return the `source` of a store of `new`, apart from it, that is made of one of `old`."""
    loses = old.profile == Compact.name or (old.profile == TopP.name != new.profile)
    if not loses or same_encoding(old, new):
        return old.source
    note = {
        "profile": old.profile,
        "profile_options": old.profile_options,
        "top_k": old.top_k,
    }
    return {**old.source, CONVERTED: [*_notes(old), note]}


def largest_p(spec: StoreSpec) -> float | None:
    """Return the p up to which a store has the logits: the smallest it ever had; None for all."""
    made_of = [*_notes(spec), {"profile": spec.profile, "profile_options": spec.profile_options}]
    found = [
        one["profile_options"].get("p")
        for one in made_of
        if one.get("profile") == TopP.name and isinstance(one.get("profile_options"), dict)
    ]
    return min((p for p in found if isinstance(p, int | float)), default=None)


def _notes(spec: StoreSpec) -> list[dict[str, Any]]:
    """Return the recorded conversions; a manifest may have anything there."""
    notes = spec.source.get(CONVERTED)
    return [one for one in notes if isinstance(one, dict)] if isinstance(notes, list) else []
