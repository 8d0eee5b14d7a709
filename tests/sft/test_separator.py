"""`data.add_sep`: the tokenizer's own separator token, NeMo's id only where NeMo is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from nemo_kd.errors import NemoKDError
from nemo_kd.sft import JsonlFile
from nemo_kd.sft.config import RowConfig
from nemo_kd.sft.reader import SEP_ID, Model, open_rows
from nemo_kd.sft.rows import SFTRows
from nemo_kd.sft.tokenizer import HFTokenizer
from tests.sft.vocabularies import gpt2_like, saved, with_bos


def with_sep(token: str = "<sep>") -> HFTokenizer:
    tokenizer = Tokenizer.from_str(gpt2_like().tokenizer.backend_tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken(token, special=True)])
    return saved(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", sep_token=token)
    )


def read(
    path: Path, tokenizer: HFTokenizer, sep_id: int = SEP_ID, **settings: object
) -> tuple[SFTRows, list[str]]:
    file, said = path / "rows.jsonl", list[str]()
    file.write_text('{"input": "a", "output": "b"}\n')
    model = Model(tokenizer=tokenizer, max_seq_length=50, sep_id=sep_id)
    config = RowConfig(**{"add_sep": True, **settings})  # type: ignore[arg-type]
    return open_rows(config, JsonlFile(file), model, said.append), said


def test_it_is_the_tokenizers_own(tmp_path: Path) -> None:
    tokenizer = with_sep()
    rows, said = read(tmp_path, tokenizer, prompt_template="{input}{output}")
    tokens = tokenizer.ids_to_tokens(rows[0].input_ids.tolist())
    assert tokens == ["a", "<sep>", "b", "<eos>"] and not said
    assert rows[0].loss_mask.tolist() == [0, 0, 1, 1]
    (sep,) = tokenizer.tokenizer.convert_tokens_to_ids(["<sep>"])
    assert rows.template["sep_id"] == sep  # a dump with another separator is not resumed
    without, _ = read(tmp_path, tokenizer, add_sep=False)
    assert "sep_id" not in without.template


@pytest.mark.parametrize("tokenizer", [gpt2_like, with_bos, lambda: with_sep("<eos>")])
def test_a_tokenizer_without_one_is_refused(tmp_path: Path, tokenizer: object) -> None:
    """`HFTokenizer` fills a missing separator with the end of sequence, as NeMo does."""
    assert callable(tokenizer)
    with pytest.raises(NemoKDError, match=r"no separator token of its own; .*prompt_template"):
        read(tmp_path, tokenizer())


def test_nemos_id_is_kept_for_nemos_reader_and_named(tmp_path: Path) -> None:
    rows, said = read(tmp_path, with_sep(), sep_id=7, reader="nemo")
    assert 7 in rows[0].input_ids.tolist() and "sep_id" not in rows.template
    (token,) = with_sep().ids_to_tokens([7])
    (line,) = [line for line in said if "add_sep" in line]
    assert line.endswith(
        f"puts NeMo's id 7 between prompt and answer; with this tokenizer that is {token!r}"
    )
    assert not rows.check(0).altered  # its text is compared with the same separator


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NemoKDError, match=r"the id 49704 .*tokenizer has 259 ids; set data\.add_"):
        read(tmp_path, with_sep(), reader="nemo")
