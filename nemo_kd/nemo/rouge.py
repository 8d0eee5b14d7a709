"""Find the ROUGE scores that can be computed without NLTK's data."""

from __future__ import annotations

WITHOUT_SENTENCES = ("rouge1", "rouge2", "rougeL")


def splits_sentences() -> bool:
    """Whether NLTK's punkt, which rougeLsum needs, is installed.

    Without it, torchmetrics would try to download it and log errors.
    """
    from nltk.data import find

    try:
        find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True
