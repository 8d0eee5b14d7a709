"""The golden curve's world, made of seeded numbers alone: a student, its tokenizer, a store.

Nothing is trained for it and no text of the Python that runs is in it, so that every machine makes
the same one. Run as a script it writes all of it into a directory.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from tests.processes import ROOT

VOCABULARY, TOP_K, ROWS, PROMPT, ANSWERS = 500, 20, 48, 5, 11


def write_tokenizer(directory: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(ROOT / "LICENSE"),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        normalization_rule_name="identity",
        bos_id=1,
        eos_id=2,
        unk_id=0,
        pad_id=3,
        minloglevel=2,
    )


def write_store(directory: Path) -> None:
    """Token t is followed by 7 t + 3, and the teacher believes so with noise."""
    from nemo_kd.cli.tokenizers import load_tokenizer
    from nemo_kd.sft.tokenizer import tokenizer_fingerprint
    from nemo_kd.store import Sample, StoreSpec, StoreWriter
    from nemo_kd.topk import TopK

    tokenizer = load_tokenizer(str(directory / "tokenizer.model"))
    spec = StoreSpec(
        top_k=TOP_K,
        vocab_size=VOCABULARY,
        rows_per_shard=ROWS,
        tokenizer={"fingerprint": tokenizer_fingerprint(tokenizer), "path": None},
    )
    rng = np.random.default_rng(2718)
    writer = StoreWriter(directory / "store", spec)
    with writer.shard(0) as shard:
        for row in range(ROWS):
            tokens = np.empty(PROMPT + ANSWERS, np.int32)
            tokens[0] = rng.integers(4, VOCABULARY)
            for t in range(1, len(tokens)):
                tokens[t] = 4 + (7 * tokens[t - 1] + 3) % (VOCABULARY - 4)
            z = rng.normal(0, 1, (ANSWERS, VOCABULARY))
            z[np.arange(ANSWERS), tokens[PROMPT:]] += 6
            ids = np.argsort(-z, axis=1)[:, :TOP_K]
            shard.add(
                Sample(
                    row=row,
                    input_ids=tokens,
                    loss_mask=np.repeat([0, 1], [PROMPT, ANSWERS]).astype(np.uint8),
                    topk=TopK(
                        ids=ids,
                        logits=np.take_along_axis(z, ids, 1).astype(np.float32),
                        logsumexp=np.logaddexp.reduce(z, axis=1, keepdims=True).astype(np.float32),
                    ),
                )
            )
    writer.finish(1)


def main(directory: Path) -> None:
    from nemo_kd.nemo import cpu

    cpu.install()
    from tests.tiny import write_model

    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory)
    write_store(directory)
    write_model(directory, "student", layers=2, hidden=32, pad_to=8)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
