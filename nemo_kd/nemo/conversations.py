"""Read conversations as token rows, with NeMo's `GPTSFTChatDataset`."""

from __future__ import annotations

from typing import Any

import numpy as np

from nemo_kd.nemo.sft_files import SFTChatDataset
from nemo_kd.sft import RowError
from nemo_kd.sft.rows import NO_ANSWER, Encoded, NoAnswerError, SFTRows
from nemo_kd.sft.tokenizer import Tokenizer


def conversation_rows(path: str, tokenizer: Tokenizer, max_seq_length: int) -> SFTRows:
    """Return the rows of `path`, truncated on the right to `max_seq_length`.

    NeMo truncates when it pads a batch, to one more target, since its limit applies to the inputs.
    """
    dataset: Any = SFTChatDataset(
        file_path=path, tokenizer=tokenizer, max_seq_length=max_seq_length
    )

    def encode(value: Any) -> Encoded:
        try:
            item = dataset._process_example(value)
        except KeyError as error:
            fields = sorted(value) if isinstance(value, dict) else value
            raise RowError(
                f"no field {error}; the row has {fields}. NeMo's conversations have `system`, "
                "`mask` and `conversations`; remove the row"
            ) from error
        except (TypeError, AttributeError, ValueError, AssertionError, LookupError) as error:
            raise RowError(f"not a conversation as NeMo's SFT reads them: {error}") from error
        if not len(item["answer_ids"]):
            raise NoAnswerError(NO_ANSWER)
        return Encoded(item["input_ids"].numpy(), item["mask"].numpy().astype(np.uint8))

    return SFTRows(dataset.indexed_dataset, encode, max_seq_length)
