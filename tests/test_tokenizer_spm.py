"""llminfer.tokenizer_spm: SentencePiece vocabularies against a plain reading of the algorithm; GGUF metadata and tokenizer.model."""

from __future__ import annotations

import itertools
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llminfer.errors import UserError
from llminfer.tokenizer import Tokenizer, from_directory
from llminfer.tokenizer_gguf import from_gguf
from llminfer.tokenizer_spm import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Pieces, build_backend, read_model

HEAD = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), ("<turn>", CONTROL), ("<t>", USER_DEFINED)]
BYTES = [(f"<0x{b:02X}>", BYTE) for b in range(256)]
FIRST_BYTE = len(HEAD)
SINGLE = ["▁", *"abcdefgh"]
JOINED = ["▁a", "ab", "abc", "cd", "▁ab", "aa", "aaa", "aaaa", "de", "bcd", "ba", "aba"]
WORDS = FIRST_BYTE + 256
MORE = [("unused", UNUSED), ("  ", USER_DEFINED), ("    ", USER_DEFINED)]
ALL = [*HEAD, *BYTES, *((piece, NORMAL) for piece in SINGLE + JOINED), *MORE]
TOKENS, TYPES = [token for token, _ in ALL], [kind for _, kind in ALL]
WHOLE = [piece for piece, kind in HEAD + MORE if kind != UNUSED]  # never cut, and found before anything is joined
TEXT = st.text(st.sampled_from("aaabbcde fgh é\n😀") | st.characters(exclude_categories=["Cs"]), max_size=25)


def scores_of(order: list[int]) -> list[float]:
    """Joined pieces score by their place in `order`, all other tokens at the end, as in a trained model."""
    found = [-1000.0] * len(TOKENS)
    for rank, i in enumerate(order):
        found[WORDS + len(SINGLE) + i] = -float(rank)
    return found


def metadata(**fields) -> dict:
    values = {
        "model": "llama",
        "tokens": TOKENS,
        "token_type": TYPES,
        "scores": scores_of(list(range(len(JOINED)))),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **fields,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}


def plain_bpe(text: str, scores: list[float]) -> list[int]:
    """Joins the two neighbours whose joined piece scores highest, the leftmost first, until none is a piece."""
    pieces = {token: i for i, (token, kind) in enumerate(ALL) if kind == NORMAL}
    parts = list(text)
    while True:
        pairs = [(-scores[pieces[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in pieces]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [i for part in parts for i in ([pieces[part]] if part in pieces else [FIRST_BYTE + b for b in part.encode()])]


@settings(max_examples=300)
@given(text=TEXT.filter(lambda t: not any(piece in t for piece in WHOLE)), order=st.permutations(range(len(JOINED))), prefix=st.booleans())
def test_bpe_is_that_of_sentencepiece(text, order, prefix):
    tokenizer = from_gguf(metadata(scores=scores_of(order), add_space_prefix=prefix, add_bos_token=False))
    spelled = (" " + text if prefix and text else text).replace(" ", "▁")
    ids = tokenizer.encode(text)
    assert ids == plain_bpe(spelled, scores_of(order))
    assert tokenizer.decode(ids) == text.replace("▁", " ")


LLAMA, GEMMA = from_gguf(metadata()), from_gguf(metadata(add_space_prefix=False))


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return [TOKENS[i] for i in tokenizer.encode(text)]


def test_defaults_and_special_tokens():
    assert (LLAMA.bos_id, LLAMA.eos_ids, LLAMA.vocab_size) == (1, (2,), len(TOKENS))
    assert pieces_of(LLAMA, "ab") == ["<s>", "▁ab"]
    assert LLAMA.encode("") == [1]
    assert from_gguf(metadata(add_bos_token=False, add_eos_token=True)).encode("a") == [WORDS + len(SINGLE), 2]
    assert from_gguf(metadata(bos_token_id=None)).encode("") == []
    # The space goes before every stretch of text; what is no token of its own, or not to be merged, is text.
    assert pieces_of(LLAMA, "a<turn>a<t>b")[1:] == ["▁a", "<turn>", "▁a", "<t>", "▁", "b"]
    assert LLAMA.decode(LLAMA.encode("a<turn>a<t>b")) == "a a<t> b"
    assert pieces_of(GEMMA, "a<turn>a<t>b")[1:] == ["a", "<turn>", "a", "<t>", "b"]
    assert "unused" not in pieces_of(GEMMA, "unused")
    assert "<0x41>" not in pieces_of(GEMMA, "<0x41>")
    assert GEMMA.decode(GEMMA.encode("<0x41>")) == "<0x41>"


def test_runs_of_spaces_that_are_tokens():
    assert pieces_of(GEMMA, "a" + " " * 7 + "b")[1:] == ["a", "    ", "  ", "▁", "b"]
    assert pieces_of(GEMMA, "▁ ▁▁a")[1:] == ["    ", "a"]
    assert GEMMA.decode(GEMMA.encode(" " * 7)) == LLAMA.decode(LLAMA.encode(" " * 7)) == " " * 7


def test_bytes_are_never_shown_by_halves():
    stream = GEMMA.stream()
    assert [stream.push([i]) for i in GEMMA.encode("a😀")] == ["", "a", "", "", "", "😀"]
    assert (stream.push([FIRST_BYTE + 0xC3]), stream.flush()) == ("", "\ufffd")


def test_phi3_marks_swallow_white_space():
    phi = from_gguf(metadata() | {"general.architecture": "phi3"})
    assert pieces_of(phi, "<turn>\n ab")[1:] == ["<turn>", "▁ab"]
    assert pieces_of(phi, "<s> ab")[1:] == ["<s>", "▁", "▁ab"]


def test_unigram_takes_the_likeliest_path():
    scores = [-1.0 if token in ("ab", "cd") else -1.5 if token == "abc" else -3.0 for token in TOKENS]
    kinds = [UNUSED if " " in token else kind for token, kind in ALL]
    t5 = from_gguf(metadata(model="t5", scores=scores, token_type=kinds, remove_extra_whitespaces=True))
    assert pieces_of(t5, "  abcd   é ") == ["▁ab", "cd", "▁", "<0xC3>", "<0xA9>", "</s>"]
    assert t5.decode(t5.encode(" abcd  é")) == "abcd é"


def test_a_damaged_charsmap_is_one_line():
    charsmap = list(struct.pack("<II", 4, 0x7FFFFC00) + b"x\0")  # a trie of one node, whose children lie far outside
    damaged = from_gguf(metadata(model="t5", precompiled_charsmap=charsmap))
    with pytest.raises(UserError, match="this model's tokenizer is damaged") as caught:
        damaged.encode("ab")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scores": None}, "scores.*missing"),
        ({"scores": [0.0]}, "scores.*length"),
        ({"scores": [1] * len(TOKENS)}, "scores.*array of float"),
        ({"scores": [float("nan")] * len(TOKENS)}, "scores.*finite"),
        ({"add_space_prefix": 1}, "add_space_prefix.*bool"),
        ({"model": "t5", "precompiled_charsmap": [1, 2, 3]}, "tokenizer"),
    ],
)
def test_gguf_refusals(fields, words):
    with pytest.raises(UserError, match=words) as caught:
        from_gguf(metadata(**fields))
    assert "\n" not in str(caught.value)


# ---- tokenizer.model


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protobuf message."""

    def varint(n: int) -> bytes:
        return bytes([n & 0x7F | 0x80]) + varint(n >> 7) if n > 0x7F else bytes([n])

    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value % (1 << 64))
    return varint(number << 3 | 2) + varint(len(value)) + value


def model_bytes(pieces: Pieces, *, algorithm: int = 2, trainer: bytes = b"") -> bytes:
    rows = zip(pieces.tokens, pieces.scores, pieces.types, strict=True)
    listed = [
        field(1, field(1, (t.replace(" ", "▁") if k == USER_DEFINED else t).encode()) + field(2, s) + (field(3, k) if k != NORMAL else b""))
        for t, s, k in rows
    ]
    flags = field(3, int(pieces.space_prefix)) + field(4, int(pieces.squeeze))
    return b"".join(listed) + field(2, field(3, algorithm) + trainer) + field(3, flags) + field(9, 1.5) + field(10, 7)


PIECES = Pieces(TOKENS, scores_of(list(range(len(JOINED)))), TYPES, unigram=False, unknown=0, space_prefix=True)


def test_model_file(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(model_bytes(PIECES, trainer=field(43, -1)))
    assert read_model(file) == (PIECES, {"bos": 1, "eos": 2})
    file.write_bytes(model_bytes(PIECES, algorithm=1, trainer=field(40, 3) + field(41, -1) + field(43, 4)))
    pieces, ids = read_model(file)
    assert (pieces.unigram, pieces.unknown, ids) == (True, 3, {"eos": 2, "pad": 4})


def test_directory_with_a_model_file_only(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_bytes(PIECES))
    tokenizer, text = from_directory(tmp_path), "ab <turn> cd é<t>  a"
    assert tokenizer is not None and tokenizer.encode(text) == LLAMA.encode(text)
    last = len(TOKENS) + 1
    added = {"3": {"content": "<|user|>", "special": True}, str(last): {"content": "<new>"}}
    config = {"added_tokens_decoder": added, "add_eos_token": True, "eos_token": "<|user|>", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    renamed = from_directory(tmp_path)
    assert renamed is not None and (renamed.bos_id, renamed.eos_ids, renamed.vocab_size) == (1, (3,), last + 1)
    assert renamed.encode("a<|user|><new>") == [1, WORDS + len(SINGLE), 3, last, 3]
    assert renamed.decode([3, last, last - 1]) == f"<new>[UNUSED {last - 1}]"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "a"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"99999999": {"content": "a"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": {"content": "ab"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("added_tokens.json", {"a": "x"}),
    ],
)
def test_damaged_added_tokens(tmp_path, name, content):
    (tmp_path / "tokenizer.model").write_bytes(model_bytes(PIECES))
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match="added tokens"):
        from_directory(tmp_path)


GOOD = model_bytes(Pieces(TOKENS[:9], [-1.0] * 9, TYPES[:9], unigram=False, unknown=0, space_prefix=True))


@settings(max_examples=300)
@given(at=st.integers(0, len(GOOD)), put=st.binary(max_size=4), cut=st.integers(0, 8), data=st.none() | st.binary(max_size=60))
def test_a_damaged_model_file_is_one_line(tmp_path_factory, at, put, cut, data):
    file = tmp_path_factory.getbasetemp() / "damaged.model"
    file.write_bytes(GOOD[:at] + put + GOOD[at + cut :] if data is None else data)
    try:
        pieces, _ = read_model(file)
        Tokenizer(build_backend(pieces)).encode("ab")
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600


def test_other_files_are_refused(tmp_path):
    file = Path(tmp_path / "tokenizer.model")
    for data in (b"", b"IQ== 0\nIg== 1\n", GOOD[:-3], GOOD + field(1, field(1, TOKENS[0].encode())), model_bytes(PIECES, algorithm=3)):
        file.write_bytes(data)
        with pytest.raises(UserError, match=r"tokenizer\.model.*must be a SentencePiece model"):
            from_directory(tmp_path)
