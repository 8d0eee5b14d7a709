"""A SentencePiece model as a fast tokenizer of transformers.

transformers' own conversion needs the protobuf version of the installed sentencepiece; this one
reads the same fields by the description that transformers packages. Ids are compared with
SentencePiece's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_kd.checkpoints.model import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
UNIGRAM, BPE = 1, 2  # TrainerSpec.model_type
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # SentencePiece.type
SAMPLE = (
    "def f(x):\n    return x  # 0123456789, 3.14 and 2026-01-31\n\n\tEnd: «été», naïve – 中文 🙂.",
    " a  b   c\n\n\nD",
    "".join(map(chr, range(32, 127))),
)
"""Texts of which both tokenizers must give the same ids."""
SPECIAL = {
    "bos_token": "bos_id",
    "eos_token": "eos_id",
    "unk_token": "unk_id",
    "pad_token": "pad_id",
}


def from_sentencepiece(name: str, data: bytes) -> PreTrainedTokenizerFast:
    """The tokenizer of a `.model` file's bytes; `name` is for errors.

    Errors: CheckpointError if it gives other ids than SentencePiece.
    """
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.sentencepiece_model_pb2_new import ModelProto

    original = SentencePieceProcessor(model_proto=data)
    ids = {token: getattr(original, method)() for token, method in SPECIAL.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(name, ModelProto.FromString(data)),
        clean_up_tokenization_spaces=False,
        **{token: original.id_to_piece(i) for token, i in ids.items() if i >= 0},
    )
    _compare(name, original, tokenizer)
    return tokenizer


def _backend(name: str, proto: Any) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    kind, fallback = proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
    if kind == BPE:
        vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
        merges = generate_merges(vocab, dict(pieces))
        model: Any = models.BPE(
            vocab, merges, unk_token=pieces[unknown][0], fuse_unk=True, byte_fallback=fallback
        )
    elif kind == UNIGRAM:
        model = models.Unigram(pieces, unk_id=unknown, byte_fallback=fallback)
    else:
        raise CheckpointError(f"{name}: a SentencePiece model of type {kind} is not converted")
    backend = Tokenizer(model)
    backend.normalizer = _normalizer(proto.normalizer_spec)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []),
        ]
    )
    for piece in proto.pieces:
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED):
            special = piece.type != USER_DEFINED
            token = AddedToken(piece.piece, normalized=False, special=special)
            backend.add_special_tokens([token]) if special else backend.add_tokens([token])
    return backend


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _compare(name: str, original: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise CheckpointError if SentencePiece has another vocabulary, or other ids for a text."""
    pieces = [original.id_to_piece(i) for i in range(original.get_piece_size())]
    if tokenizer.convert_ids_to_tokens(list(range(len(pieces)))) != pieces:
        raise CheckpointError(f"{name}: its tokens cannot be those of a fast tokenizer")
    control = [original.id_to_piece(i) for i in range(len(pieces)) if original.is_control(i)]
    words = " ".join(pieces).replace(SPACE, " ")
    for token in [*control, original.id_to_piece(original.unk_id())]:
        words = words.replace(token, "")  # SentencePiece never reads one from a text
    for text in (*SAMPLE, *words.splitlines()):
        if tokenizer(text, add_special_tokens=False).input_ids != original.encode(text):
            raise CheckpointError(
                f"{name}: a fast tokenizer has other ids than SentencePiece for {text[:40]!r}; "
                "give the tokenizer's directory in Hugging Face's format by --tokenizer"
            )
