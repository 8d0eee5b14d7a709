"""ROUGE on a machine without NLTK's data: which of its scores can be had."""

from __future__ import annotations

WITHOUT_SENTENCES = ("rouge1", "rouge2", "rougeL")


def splits_sentences() -> bool:
    """Whether NLTK's punkt is on the disk, which rougeLsum needs. torchmetrics would try to
    download it, and log errors."""
    from nltk.data import find

    try:
        find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True
