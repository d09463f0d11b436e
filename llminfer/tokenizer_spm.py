"""SentencePiece vocabularies on the `tokenizers` package: from scores to merges, and the tokenizer.model file.

SentencePiece's BPE joins, again and again, the two neighbours whose joined piece has the highest score, the leftmost
first; the package's joins the pair that stands first in a list of merges. Listing every split of every piece into two
pieces by the score of the whole makes the two agree.

Sources: sentencepiece_model.proto and the SentencePiece paper (Kudo and Richardson, 2018); the protobuf wire format."""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from llminfer.chat_template import one_line
from llminfer.errors import UserError, refuse

# Types of a piece, the same numbers in tokenizer.model and in GGUF's tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_MODEL_BYTES = 100_000_000
MAX_PIECE = 256  # characters of a piece that may be joined from two: the splits of all pieces are listed


@contextlib.contextmanager
def package_errors(field: str, rule: str) -> Iterator[None]:
    """What the tokenizers package raises inside becomes a UserError: bare Exception for what it cannot read; its panics are no
    Exception, and of a private type."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refuse(field, one_line(error), rule) from None


@dataclass(frozen=True)
class Pieces:
    """A vocabulary: for each id the token as text (▁ for a space; USER_DEFINED ones with true spaces), its score and type.

    unigram: else BPE. unknown: the id of the unknown token. space_prefix: a space goes before the text, and before what
    follows a special token. squeeze: spaces at the ends, and all but one in a row, are dropped. charsmap: SentencePiece's
    compiled normalization, b"" for none. strip_after: special tokens swallow the white space after them."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    unigram: bool
    unknown: int | None
    space_prefix: bool
    squeeze: bool = False
    charsmap: bytes = b""
    strip_after: bool = False


def build_backend(pieces: Pieces) -> tokenizers.Tokenizer:
    """The vocabulary as a tokenizer of the package. Raises UserError where the package cannot hold it."""
    with package_errors("tokenizer", "must be a SentencePiece vocabulary"):
        made = tokenizers.Tokenizer(_unigram(pieces) if pieces.unigram else _bpe(pieces))
        steps: list[Any] = [normalizers.Precompiled(pieces.charsmap)] if pieces.charsmap else []
    if pieces.squeeze:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend("▁")] if pieces.space_prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if pieces.space_prefix else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    made.add_tokens(_added(pieces))
    return made


def _added(pieces: Pieces) -> list[AddedToken]:
    """The tokens that are matched in a text as they are written. A written ▁ is a space to SentencePiece: runs of spaces
    that are tokens are matched after both are alike, which Prepend, coming in between, does not allow."""
    stripping = pieces.strip_after
    return [
        AddedToken(
            token,
            special=kind != USER_DEFINED,
            normalized=kind == USER_DEFINED and not pieces.space_prefix and " " in token,
            rstrip=stripping and token not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for token, kind in zip(pieces.tokens, pieces.types, strict=True)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
    ]


def _bpe(pieces: Pieces) -> models.BPE:
    tokens, types = pieces.tokens, pieces.types
    order = [i for i, kind in enumerate(types) if kind == NORMAL and len(tokens[i]) <= MAX_PIECE]
    order.sort(key=[-score for score in pieces.scores].__getitem__)
    names = [tokens[i] for i in order]
    known = set(names)
    ranges = [range(1, length) for length in range(MAX_PIECE + 1)]
    # One flat comprehension: Gemma has 262,144 pieces with 1.4 million splits, of which 0.5 million count.
    merges = [(s[:k], s[k:]) for s in names for k in ranges[len(s)] if s[:k] in known and s[k:] in known]
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = None if pieces.unknown is None else tokens[pieces.unknown]
    return models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)


def _unigram(pieces: Pieces) -> models.Unigram:
    # Bytes and unused tokens are no pieces of a text: they must lose against another spelling.
    vocab = [
        (token, score if kind in (NORMAL, USER_DEFINED) else -1e9)
        for token, score, kind in zip(pieces.tokens, pieces.scores, pieces.types, strict=True)
    ]
    return models.Unigram(vocab, unk_id=pieces.unknown, byte_fallback=BYTE in pieces.types)


# ---- tokenizer.model


def read_model(file: Path) -> tuple[Pieces, dict[str, int]]:
    """A SentencePiece model file: its vocabulary, and the ids it gives to "bos", "eos" and "pad" (absent where it has none).

    Raises UserError for a file that is damaged or of another algorithm than BPE and unigram."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_MODEL_BYTES + 1)
        if len(data) > MAX_MODEL_BYTES:
            raise ValueError(f"longer than {MAX_MODEL_BYTES} bytes")
        return _parse_model(data)
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise UserError(f"{file}: {one_line(error)}; must be a SentencePiece model (BPE or unigram)") from None


def _parse_model(data: bytes) -> tuple[Pieces, dict[str, int]]:
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for field, value in _fields(data):
        if field == 1:
            piece = dict(_fields(_message(value)))
            kind = int(piece.get(3, NORMAL))
            text = _message(piece.get(1, b"")).decode()
            tokens.append(text.replace("▁", " ") if kind == USER_DEFINED else text)
            scores.append(struct.unpack("<f", _message(piece.get(2, bytes(4))))[0])
            types.append(kind)
        elif field in (2, 3):
            (trainer if field == 2 else normalizer).update(_fields(_message(value)))
    algorithm = trainer.get(3, 1)
    if algorithm not in (1, 2):
        raise ValueError(f"model_type {algorithm} is not supported")
    if not tokens or len(set(tokens)) != len(tokens) or not all(map(math.isfinite, scores)):
        raise ValueError("it has no pieces, a piece twice, or a score that is not finite")
    numbers = {"unk": trainer.get(40, 0), "bos": trainer.get(41, 1), "eos": trainer.get(42, 2), "pad": trainer.get(43, -1)}
    # A negative int32 is stored as 64 bits: it means that there is no such token.
    ids = {name: i for name, i in numbers.items() if isinstance(i, int) and 0 <= i < len(tokens)}
    pieces = Pieces(
        tokens,
        scores,
        types,
        unigram=algorithm == 1,
        unknown=ids.pop("unk", None),
        space_prefix=bool(normalizer.get(3, 1)),
        squeeze=bool(normalizer.get(4, 1)),
        charsmap=_message(normalizer.get(2, b"")),
    )
    return pieces, ids


def _message(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a field has another wire type than expected")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: an int for a varint, bytes for all else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {at}")
        size, at = _varint(data, at) if wire == 2 else (8 if wire == 1 else 4, at)
        if at + size > len(data):
            raise ValueError("it is cut off")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, the position after it)."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is too long")
