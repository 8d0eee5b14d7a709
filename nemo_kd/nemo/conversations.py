"""Read conversations as tokens, with NeMo's `GPTSFTChatDataset`."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import (
    GPTSFTChatDataset,
)

from nemo_kd.sft import RowError
from nemo_kd.sft.config import RowConfig
from nemo_kd.sft.reader import Model
from nemo_kd.sft.rows import NO_ANSWER, Encoded, NoAnswerError


class _Rowless(GPTSFTChatDataset):
    """NeMo's data set without rows of its own."""

    def _load_dataset(self) -> None:
        self.indexed_dataset: Any = [{}]


class NemosConversations:
    """Encoder of conversations with exactly NeMo's tokens and mask.

    NeMo truncates when it pads a batch, to one target more than `max_seq_length` tokens have, since
    its limit applies to the inputs.
    """

    def __init__(self, config: RowConfig, model: Model) -> None:
        self._dataset: Any = _Rowless(
            file_path="",
            tokenizer=model.tokenizer,
            max_seq_length=model.max_seq_length,
            special_tokens=config.turn_tokens,
        )

    def __call__(self, value: Any) -> Encoded:
        try:
            item = self._dataset._process_example(copy.deepcopy(value))  # NeMo changes it
        except KeyError as error:
            fields = sorted(value) if isinstance(value, dict) else value
            raise RowError(
                f"no field {error}; the row has {fields}. NeMo's conversations have `system`, "
                "`mask` and `conversations`; remove the row"
            ) from error
        except (TypeError, AttributeError, ValueError, AssertionError, LookupError) as error:
            reason = error if str(error) not in ("", "()") else "an assertion of NeMo fails"
            raise RowError(
                f"not a conversation as NeMo's SFT reads them: {reason}; data.reader=verbatim "
                "reads more of them"
            ) from error
        if not item["mask"].any():
            raise NoAnswerError(NO_ANSWER)
        return Encoded(item["input_ids"].numpy(), item["mask"].numpy().astype(np.uint8))

    def alters(self, value: Any) -> bool:
        return False  # the rows are compared with those of the reader `verbatim`
