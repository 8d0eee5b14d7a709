"""Check names against a fixed set; suggest a similar name for an unknown one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from nemo_kd import spelling
from nemo_kd.errors import NemoKDError

DIVERGENCE_ALIASES = {
    "forward_kl": "kl kld kldiv fkl fkld fwd fwdkl fwdkld forward forwardkld klfwd klforward",
    "reverse_kl": "rkl rkld rev revkl revkld reverse reversekld bkl bkld bwd bwdkl bwdkld back "
    "backkl backward backwardkl backwardkld inversekl klrev klreverse klbwd klbackward",
    "jsd": "js jsdiv jensenshannon gjs gjsd generalizedjsd generalisedjsd",
    "skew_forward_kl": "skl skewkl skewedkl sfkl sfkld skewfkl skewfwdkl skewforward "
    "skewedforwardkl",
    "skew_reverse_kl": "srkl srkld skewrkl skewrevkl skewreverse skewbwdkl skewbackwardkl "
    "skewedreversekl",
}
"""Names used in the literature and by other libraries, without case and punctuation."""
SUPPORT_ALIASES = {
    "bucket": "tail rest ghost ghosttoken topkbucket",
    "vocab": "full all vocabulary wholevocab",
    "topk": "k topklogits",
}
DIRECTIONS = {"forward": ("forward", "fwd"), "reverse": ("reverse", "rev", "bwd", "backward")}


def check_name(
    field: str, name: object, known: Iterable[str], aliases: Mapping[str, str] | None = None
) -> None:
    """Check that `name` is known.

    Errors: NemoKDError that lists the known names and suggests the nearest.
    """
    names = sorted(known)
    if name not in names:
        raise NemoKDError(
            f"{field} is {name!r}: expected one of {', '.join(names)}."
            f"{did_you_mean(name, names, aliases)}"
        )


def did_you_mean(
    name: object, known: Iterable[str], aliases: Mapping[str, str] | None = None
) -> str:
    """` Did you mean 'x'?`, or nothing where no known name is near."""
    found = nearest(str(name), known, aliases)
    return f" Did you mean {found!r}?" if found else ""


def nearest(
    name: str, known: Iterable[str], aliases: Mapping[str, str] | None = None
) -> str | None:
    """The known name that `name` is an alias or a misspelling of, or None.

    `aliases`: known name → its other names, separated by spaces. A name that contains one direction
    is never matched with the other, however many letters they share.
    """
    squeezed = {re.sub("[^a-z0-9]", "", each.lower()): each for each in known}
    bare = re.sub("[^a-z0-9]", "", name.lower())
    short = re.sub("(div|divergence|loss)$", "", bare)
    for each in (bare, short):
        if each in squeezed:
            return squeezed[each]
        for meant, others in (aliases or {}).items():
            if each in others.split():
                return meant
    same_direction = [each for each in squeezed if _direction(each) == _direction(bare)]
    near = spelling.nearest(bare, same_direction, cutoff=0.7)
    return near and squeezed[near]


def _direction(name: str) -> str:
    for direction, words in DIRECTIONS.items():
        if any(word in name for word in words):
            return direction
    return ""
