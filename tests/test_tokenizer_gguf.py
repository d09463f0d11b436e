"""llminfer.tokenizer_gguf: byte-level BPE, its pre-tokenizers, flags, refusals; ids of real models."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import unicodedata
from pathlib import Path

import pytest
from goldens.make_tokenizer import digest, strings
from hypothesis import given
from hypothesis import strategies as st

from llminfer.errors import UserError
from llminfer.tokenizer import Tokenizer, _byte_alphabet
from llminfer.tokenizer_gguf import PRE_TOKENIZERS, from_gguf

SPELL = {byte: character for character, byte in _byte_alphabet().items()}
SPECIAL = ["<|end|>", "<|start|>", "<|turn|>"]  # ids 0, 1, 2
FIRST_BYTE = 5
MERGES = ["1 2", "12 3", "123 4", "Ġ a", "Ġa b", "a b", "Ã ©", "Ġ Ġ", "Ċ Ċ", "' s", "! !"]
NORMAL_TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n1234ab'sé!😀"), max_size=30)
TOP = FIRST_BYTE + 256 + len(MERGES) + 1


def metadata(pre: str = "smollm", template: str | None = None, **fields) -> dict:
    """A byte-level vocabulary: 3 control tokens, 2 of the user's, 256 bytes, a few merges, one whole word."""
    tokens = [*SPECIAL, "<é b>", "    ", *(SPELL[b] for b in range(256)), *(m.replace(" ", "") for m in MERGES), "Ġword"]
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3, 3, 3, 4, 4] + [1] * (len(tokens) - 5),
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 0,
        **fields,
    }
    found = {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}
    return found | ({} if template is None else {"tokenizer.chat_template": template})


SMALL = from_gguf(metadata())


def test_gguf_properties():
    assert (SMALL.vocab_size, SMALL.eos_ids, SMALL.bos_id, SMALL.chat_template) == (TOP, (0,), 1, None)
    with_turns = from_gguf(metadata(eot_token_id=2, eom_token_id=0))
    assert with_turns.eos_ids == (0, 2)
    nothing = from_gguf(metadata(bos_token_id=None, eos_token_id=None))
    assert (nothing.eos_ids, nothing.bos_id) == ((), None)
    assert from_gguf(metadata(token_type=None)).encode("<|end|>") != [0]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@given(text=NORMAL_TEXT)
def test_decode_inverts_encode(pre, text):
    tokenizer = BY_PRE[pre]
    assert tokenizer.decode(tokenizer.encode(text, add_special=False), skip_special=False) == text


BY_PRE = {pre: from_gguf(metadata(pre)) for pre in PRE_TOKENIZERS}


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "12345 12", ["1", "2", "3", "4", "5", " ", "1", "2"]),
        ("gpt-2", "12345 12", ["1234", "5", " ", "12"]),
        ("llama-bpe", "12345 12", ["123", "4", "5", " ", "12"]),
        ("default", "12345 12", ["123", "4", "5", " ", "12"]),
        ("smollm", "a\n\n1", ["a", "\n\n", "1"]),  # the digit is cut off first, so that the run of line ends is whole
        ("gpt-2", "a\n\n1", ["a", "\n", "\n", "1"]),
        ("gpt-2", "   ab", ["  ", " ab"]),
        ("llama-bpe", "   ab", ["  ", " ab"]),
        ("gpt-2", "ab's é!!", ["ab", "'s", " ", "é", "!!"]),
        ("llama-bpe", "ab'S", ["ab", "'", "S"]),
    ],
)
def test_pre_tokenizers_split_where_they_should(pre, text, pieces):
    tokenizer = BY_PRE[pre]
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text, add_special=False)] == pieces


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("default", "It ' S _ 123 45 _ _aBcDe !/ LL _中a _म ि ' ll"),
        ("gpt-2", "It ' S _12345 _ _aBcDe !/ LL _中a _म ि' ll"),
        ("command-r", "It ' S _ 1 2 3 4 5 _ _aBcDe !/ LL _中a _म ि' ll"),
        ("dbrx", "It 'S _ 123 45 _ _aBcDe !/LL _中a _म ि' ll"),
        ("qwen2", "It 'S _ 1 2 3 4 5 _ _aBcDe !/LL _中a _म ि' ll"),
        ("gpt-4o", "It'S _ 123 45 _ _a Bc De !/LL _中a _मि'll"),
        ("tekken", "It 'S _ 1 2 3 4 5 _ _a Bc De !/LL _中a _मि 'll"),
        ("deepseek-llm", "It ' S _ 1 2 3 4 5 _ _aBcDe !/ L L _ 中 a _ मि ' ll"),
        ("deepseek-coder", "It ' S _ 1 2 3 4 5 _ _aBcDe !/ L L _ 中 a _ म ि ' ll"),
        ("deepseek-v3", "It 'S _ 123 45 _ _aBcDe !/LL _ 中 a _मि 'll"),
    ],
)
def test_every_pre_tokenizer(pre, pieces):
    split = BY_PRE[pre]._backend.pre_tokenizer
    found = [bytes(_byte_alphabet()[c] for c in piece).decode() for piece, _ in split.pre_tokenize_str("It'S 12345  aBcDe!/\n\n 中a मि'll")]
    assert found == [piece.replace("_", " ").replace("L", "\n") for piece in pieces.split()]


def test_missing_pre_is_the_default():
    ids = from_gguf(metadata(pre=None)).encode("a1234!!\n\n 12")
    assert ids == BY_PRE["default"].encode("a1234!!\n\n 12")


def test_llama_bpe_takes_whole_words_and_adds_bos():
    word, bos = TOP - 1, 1
    assert BY_PRE["llama-bpe"].encode(" word") == [bos, word]
    assert BY_PRE["llama-bpe"].encode(" word", add_special=False) == [word]
    assert word not in BY_PRE["gpt-2"].encode(" word")
    assert from_gguf(metadata("llama-bpe", add_bos_token=False)).encode(" word") == [word]
    assert from_gguf(metadata("llama-bpe", bos_token_id=None)).encode(" word") == [word]


def test_bos_and_eos_flags():
    a = FIRST_BYTE + ord("a")
    both = from_gguf(metadata(add_bos_token=True, add_eos_token=True))
    assert both.encode("a") == [1, a, 0]
    assert both.encode("") == [1, 0]
    assert both.encode("a", add_special=False) == [a]
    assert SMALL.encode("a") == [a]


def test_special_and_user_tokens():
    ids = SMALL.encode("<|start|>a<é b><|end|>", add_special=False)
    assert ids == [1, FIRST_BYTE + ord("a"), 3, 0]
    assert SMALL.decode(ids) == "a<é b>"  # the user's tokens are text: shown, and as they are written
    assert SMALL.decode(ids, skip_special=False) == "<|start|>a<é b><|end|>"
    assert SMALL.encode("a<|end|>") == [FIRST_BYTE + ord("a"), 0]
    assert SMALL.encode("<|en") == [FIRST_BYTE + ord(c) for c in "<|en"]


def test_bytes_without_a_token_are_left_out():
    tokens = [t for t in metadata()["tokenizer.ggml.tokens"] if t != SPELL[4]]
    assert (lambda t: t.decode(t.encode("a\x04b")))(from_gguf(metadata(tokens=tokens, token_type=None))) == "ab"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "bert"}, ["tokenizer.ggml.model", "bert", "gpt2", "llama"]),
        ({"model": None}, ["tokenizer.ggml.model", "missing"]),
        ({"model": 7}, ["tokenizer.ggml.model", "str"]),
        ({"pre": "kimi-k2"}, ["tokenizer.ggml.pre", "kimi-k2", "smollm", "llama-bpe"]),
        ({"pre": 3}, ["tokenizer.ggml.pre"]),
        ({"tokens": None}, ["tokenizer.ggml.tokens", "missing"]),
        ({"tokens": []}, ["tokenizer.ggml.tokens", "length"]),
        ({"tokens": "abc"}, ["tokenizer.ggml.tokens", "array"]),
        ({"tokens": ["a", 1]}, ["tokenizer.ggml.tokens", "str"]),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, ["tokenizer.ggml.tokens", "twice"]),
        ({"token_type": [1]}, ["tokenizer.ggml.token_type", "length"]),
        ({"token_type": ["1"] * TOP}, ["tokenizer.ggml.token_type", "int"]),
        ({"merges": None}, ["tokenizer.ggml.merges", "missing"]),
        ({"merges": ["ab"]}, ["tokenizer.ggml.merges", "ab", "space"]),
        ({"merges": ["a b c"]}, ["tokenizer.ggml.merges", "space"]),
        ({"merges": ["x yz"]}, ["tokenizer.ggml.merges", "yz"]),
        ({"merges": [1]}, ["tokenizer.ggml.merges", "str"]),
        ({"bos_token_id": TOP}, ["tokenizer.ggml.bos_token_id", str(TOP - 1)]),
        ({"eos_token_id": -1}, ["tokenizer.ggml.eos_token_id"]),
        ({"eos_token_id": True}, ["tokenizer.ggml.eos_token_id"]),
        ({"add_bos_token": 1}, ["tokenizer.ggml.add_bos_token", "bool"]),
        ({"add_bos_token": True, "bos_token_id": None}, ["tokenizer.ggml.add_bos_token", "bos_token_id"]),
    ],
)
def test_gguf_refusals(fields, words):
    with pytest.raises(UserError) as caught:
        from_gguf(metadata(**fields))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_gguf_template_of_a_wrong_type():
    with pytest.raises(UserError, match="chat_template"):
        from_gguf(metadata() | {"tokenizer.chat_template": 1})


# ---- chat templates

MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "é😀 <|end|>"}]
TURNS = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"


def test_chat_template_of_a_gguf():
    tokenizer = from_gguf(metadata(template=TURNS, add_bos_token=True))
    assert tokenizer.chat_template == TURNS
    text = tokenizer.apply_chat(MESSAGES)
    assert text == "<|start|>system: S<|end|>user: é😀 <|end|><|end|>"
    assert tokenizer.encode(text, add_special=False).count(1) == 1


def test_named_templates_of_a_gguf():
    tokenizer = from_gguf(metadata(template="plain") | {"tokenizer.chat_template.tool_use": "{{ tools[0]['name'] }}"})
    assert tokenizer.apply_chat(MESSAGES, tools=[{"name": "search"}]) == "search"


# ---- the demo model


@pytest.fixture(scope="module")
def smollm2(demo_path) -> Tokenizer:
    from llminfer.weights.gguf import GgufFile

    return from_gguf(GgufFile(demo_path).metadata)


@pytest.mark.demo
def test_smollm2_goldens(smollm2):
    golden = json.loads((Path(__file__).parent / "goldens" / "tokenizer_smollm2.json").read_text())
    for text, ids in golden["encode"]:
        assert smollm2.encode(text) == ids, text
    for ids, text, shown in golden["decode"]:
        assert (smollm2.decode(ids, skip_special=False), smollm2.decode(ids)) == (text, shown)
    for messages, prompt, text in golden["chat"]:
        assert smollm2.apply_chat(messages, add_generation_prompt=prompt) == text


@pytest.mark.demo
def test_smollm2_properties(smollm2):
    assert (smollm2.vocab_size, smollm2.eos_ids, smollm2.bos_id) == (49152, (2,), 1)
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(49152) for _ in range(40)]
        stream = smollm2.stream()
        assert "".join(stream.push([i]) for i in ids) + stream.flush() == smollm2.decode(ids) == smollm2._backend.decode(ids)


@pytest.mark.demo
def test_smollm2_splits_every_number_character(smollm2):
    for c in map(chr, range(0x110000)):
        if unicodedata.category(c)[0] == "N" and ord(c) < 0x3400:
            assert smollm2.encode(f"a {c}{c}b") == [i for piece in ("a ", c, c, "b") for i in smollm2.encode(piece)], c


# ---- random and nasty strings

GOLDEN = Path(__file__).parent / "goldens" / "tokenizer_random.json"


def check_random(tokenizer: Tokenizer, name: str, agreed: int) -> None:
    """The ids of 2,000 strings are those that transformers and llama.cpp agree on, and give the string again."""
    golden, texts = json.loads(GOLDEN.read_text()), strings()
    assert hashlib.sha256("\0".join(texts).encode()).hexdigest() == golden["strings"], "the generator of strings has changed"
    digests, compared = base64.b64decode(golden[name]), 0
    for i, text in enumerate(texts):
        ids, expected = tokenizer.encode(text, add_special=False), digests[4 * i : 4 * i + 4]
        compared += expected != bytes(4)
        assert expected in (bytes(4), digest(ids)), text
        lost = {c for c in text if tokenizer.decode(tokenizer.encode(c, add_special=False), skip_special=False) not in (c, " ")}
        if not lost:  # SmolLM2 has no tokens for the first bytes of the rarest characters
            assert tokenizer.decode(ids, skip_special=False) == (text if name == "smollm2" else text.replace("▁", " "))
    assert compared == agreed


@pytest.mark.demo
def test_smollm2_random_strings(smollm2):
    check_random(smollm2, "smollm2", 2000)


@pytest.mark.parity
def test_gemma3_random_strings(request):
    from llminfer.weights.gguf import GgufFile

    path = request.config.getoption("--gemma", default=None)
    if path is None:
        pytest.skip("--gemma FILE: the GGUF of Gemma 3 270M")
    gemma = from_gguf(GgufFile(Path(path)).metadata)
    check_random(gemma, "gemma3", 1954)
    # Beyond 16 spaces, SentencePiece itself: the longest token first.
    assert gemma.encode(" " * 40 + "x") == [2, 167, 145, 236781]
    assert gemma.encode("▁▁a") == [2, 138, 236746]
