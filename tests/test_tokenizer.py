"""llminfer.tokenizer: text in and out, streams that never show half a character, Hugging Face directories, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer_gguf import FIRST_BYTE, MERGES, MESSAGES, NORMAL_TEXT, SMALL, SPECIAL, TOP
from tokenizers import decoders, models, normalizers, processors

from llminfer.errors import UserError
from llminfer.tokenizer import Detokenizer, Tokenizer, _byte_alphabet, from_directory

# ---- text in, text out


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "\ud83d \ude00"])
def test_lone_surrogates_are_refused(text):
    with pytest.raises(UserError, match="surrogate"):
        SMALL.encode(text)


@pytest.mark.parametrize("text", [b"bytes", None, 3, ["a"]])
def test_only_str_is_encoded(text):
    with pytest.raises(UserError, match="must be a str"):
        SMALL.encode(text)


def test_ids_outside_the_vocabulary():
    assert SMALL.decode([FIRST_BYTE + ord("a"), TOP, 2**40, FIRST_BYTE + ord("b")]) == "ab"
    with pytest.raises(UserError, match="token id"):
        SMALL.decode([-1])


# ---- streams

# The beginnings of characters that a next byte can still complete.
BEGINNINGS = {chr(c).encode()[:n] for c in range(0x80, 0x110000, 0x40) if not 0xD800 <= c < 0xE000 for n in range(1, len(chr(c).encode()))}


def certain(data: bytes) -> str:
    """What may be shown of `data` when more bytes may follow."""
    tail = next((n for n in (3, 2, 1) if data[-n:] in BEGINNINGS and n <= len(data)), 0)
    return data[: len(data) - tail].decode(errors="replace")


# Mostly bytes, so that characters meet, break off and go wrong.
IDS = st.lists(
    st.integers(0, TOP + 3) | st.sampled_from([FIRST_BYTE + b for b in (0x41, 0x80, 0xBF, 0xA0, 0xC3, 0xE2, 0xED, 0xF0, 0x9F, 0xF4, 0xFF)]),
    max_size=25,
)
TOKEN_BYTES = [t.encode() for t in [*SPECIAL, "<é b>", "    "]] + [bytes([b]) for b in range(256)]
TOKEN_BYTES += [bytes(_byte_alphabet()[c] for c in m if c != " ") for m in MERGES] + [b" word"] + [b""] * 4


@given(
    ids=IDS | st.text(max_size=20).map(lambda t: [FIRST_BYTE + b for b in t.encode()]),
    cuts=st.lists(st.integers(0, 25)),
    skip=st.booleans(),
)
def test_stream_shows_all_that_is_certain_and_no_more(ids, cuts, skip):
    stream, shown, done, data = SMALL.stream(skip_special=skip), "", 0, b""
    for end in [*sorted(cuts), len(ids)]:
        shown += stream.push(ids[done:end])
        data += b"".join(TOKEN_BYTES[i] for i in ids[done:end] if not (skip and i < 3))
        done = max(done, min(end, len(ids)))
        assert shown == certain(data)
    shown += stream.flush()
    assert shown == data.decode(errors="replace") == SMALL.decode(ids, skip_special=skip)
    assert stream.push([FIRST_BYTE + ord("x")]) == "x"  # nothing is left over after a flush


def test_stream_of_an_emoji():
    stream = SMALL.stream()
    assert [stream.push([FIRST_BYTE + b]) for b in "a😀".encode()] == ["a", "", "", "", "😀"]
    assert stream.flush() == ""
    # A special token that is left out does not break the character around it.
    assert stream.push([FIRST_BYTE + 0xC3, 0, FIRST_BYTE + 0xA9]) == "é"
    # 0xC3 cannot be completed by a letter; 0xFF never begins a character.
    assert [stream.push([FIRST_BYTE + b]) for b in (0xC3, 0x41, 0xFF)] == ["", "\ufffdA", "\ufffd"]
    assert (stream.push([FIRST_BYTE + 0xF0]), stream.flush(), stream.flush()) == ("", "\ufffd", "")


def test_stream_looks_at_each_token_once():
    seen = []
    stream = Detokenizer(lambda i: seen.append(i) or b"\xc3", strip_space=False)
    text = "".join(stream.push([i]) for i in range(2000))
    assert seen == list(range(2000))
    assert text + stream.flush() == "\ufffd" * 2000


# ---- Hugging Face directories


def write(folder: Path, **files) -> Path:
    """Each file NAME__EXT=content: a str as it is, anything else as JSON."""
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def byte_level() -> tokenizers.Tokenizer:
    """SMALL as a tokenizers object that puts <|start|> before a text."""
    backend = tokenizers.Tokenizer.from_str(SMALL._backend.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
    return backend


@pytest.fixture
def folder(tmp_path) -> Path:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_no_tokenizer_file(tmp_path):
    assert from_directory(tmp_path) is None
    assert from_directory(str(tmp_path / "nowhere")) is None


def test_directory_alone(folder):
    tokenizer = from_directory(folder)
    assert (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.bos_id, tokenizer.chat_template) == (TOP, (), None, None)
    text = "ab 12 é😀<|end|>"
    assert tokenizer.encode(text, add_special=False) == SMALL.encode(text)
    assert tokenizer.encode(text) == [1, *SMALL.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == "ab 12 é😀"


def test_directory_ends_and_variables(folder):
    write(
        folder,
        tokenizer_config__json={
            "bos_token": {"content": "<|start|>"},
            "eos_token": "<|end|>",
            "chat_template": "{{ bos_token + eos_token }}",
        },
        config__json={"eos_token_id": 4, "bos_token_id": 0},
    )
    tokenizer = from_directory(folder)
    assert (tokenizer.eos_ids, tokenizer.bos_id) == ((4, 0), 1)
    assert tokenizer.apply_chat(MESSAGES) == "<|start|><|end|>"
    write(folder, generation_config__json={"eos_token_id": [2, 0]})
    assert from_directory(folder).eos_ids == (2, 0)
    write(folder, tokenizer_config__json={}, special_tokens_map__json={"eos_token": {"content": "<|turn|>"}, "bos_token": None})
    assert (from_directory(folder).eos_ids, from_directory(folder).bos_id) == ((2, 0), 0)


def test_directory_templates(folder):
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    write(folder, tokenizer_config__json={"chat_template": named})
    assert from_directory(folder).apply_chat(MESSAGES, tools=[{}]) == "t"
    assert from_directory(folder).chat_template == "d"
    write(folder, chat_template__jinja="file é")
    assert from_directory(folder).apply_chat(MESSAGES, tools=[{}]) == "file é"
    (folder / "additional_chat_templates").mkdir()
    write(folder / "additional_chat_templates", tool_use__jinja="more")
    assert from_directory(folder).apply_chat(MESSAGES, tools=[{}]) == "more"


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(from_directory(tmp_path).encode("abcabcabc", add_special=False)) == len(SMALL.encode("abcabcabc")) == 6


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tokenizer__json": "{"}, "tokenizer.json"),
        ({"tokenizer__json": "[]"}, "tokenizer.json"),
        ({"tokenizer__json": {"model": {"type": "Novel"}}}, "tokenizer.json"),
        ({"tokenizer_config__json": "{]"}, "tokenizer_config.json"),
        ({"tokenizer_config__json": []}, "tokenizer_config.json"),
        ({"tokenizer_config__json": "[" * 100_000}, "tokenizer_config.json"),
        ({"tokenizer_config__json": {"bos_token": 5}}, "bos_token"),
        ({"tokenizer_config__json": {"chat_template": 5}}, "chat_template"),
        ({"tokenizer_config__json": {"chat_template": [{"name": "x"}]}}, "chat_template"),
        ({"generation_config__json": {"eos_token_id": "2"}}, "eos_token_id"),
        ({"generation_config__json": {"eos_token_id": [True]}}, "eos_token_id"),
        ({"config__json": {"eos_token_id": -1}}, "eos_token_id"),
        ({"special_tokens_map__json": "nonsense"}, "special_tokens_map.json"),
    ],
)
def test_damaged_directories(folder, files, words):
    with pytest.raises(UserError) as caught:
        from_directory(write(folder, **files))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_that_would_end_the_process(folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["continuing_subword_prefix"] = "xyz"
    for text in (json.dumps(data), json.dumps(data).replace("continuing", r"\u0063ontinuing")):
        with pytest.raises(UserError, match="continuing_subword_prefix"):
            from_directory(write(folder, tokenizer__json=text))


def test_a_post_processor_of_unknown_tokens(folder):
    data = json.loads((folder / "tokenizer.json").read_text())
    data["post_processor"]["special_tokens"] = {}
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        from_directory(write(folder, tokenizer__json=data))


def test_files_that_are_not_text(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        from_directory(folder)
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        from_directory(folder)


def sentencepiece(decoder) -> tokenizers.Tokenizer:
    """A vocabulary in SentencePiece's manner: <s>, 256 bytes, a few pieces."""
    tokens = ["<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "ab"]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a"), ("a", "b")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoder
    backend.add_special_tokens(["<s>"])
    return backend


LLAMA2 = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


@given(text=NORMAL_TEXT.filter(bool))
def test_sentencepiece_decodes_as_the_package_does(text):
    backend = sentencepiece(decoders.Sequence(LLAMA2))
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == backend.decode(ids)
    stream = tokenizer.stream()
    assert "".join(stream.push([i]) for i in ids) + stream.flush() == backend.decode(ids)
    if "▁" not in text and "<s>" not in text:
        assert tokenizer.decode(ids) == text


def test_first_space_is_dropped_once():
    tokenizer, kept = Tokenizer(sentencepiece(decoders.Sequence(LLAMA2))), Tokenizer(sentencepiece(decoders.Sequence(LLAMA2[:3])))
    ids = [0, *tokenizer.encode("a a é")]
    assert tokenizer.decode(ids) == "a a é"
    assert kept.decode(ids) == " a a é"
    assert tokenizer.decode(ids, skip_special=False) == "<s> a a é"
    stream = tokenizer.stream()
    first = [stream.push(ids[:2]), stream.push(ids[2:]), stream.flush()]
    assert first == ["a", " a é", ""]
    assert stream.push(ids[1:2]) == "a"  # a new stream begins after a flush
    assert Tokenizer(sentencepiece(decoders.Metaspace())).decode(ids[:3]) == "a a"


@pytest.mark.parametrize("steps", [LLAMA2[:1], LLAMA2[:2], [LLAMA2[0], *LLAMA2[2:]], [LLAMA2[0], LLAMA2[2]]])
def test_shorter_decoders(steps):
    backend = sentencepiece(decoders.Sequence(steps))
    ids = backend.encode("a ab a").ids
    assert Tokenizer(backend).decode(ids) == backend.decode(ids)


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])])
def test_other_decoders_are_refused(decoder):
    with pytest.raises(UserError, match="decoder"):
        Tokenizer(sentencepiece(decoder))
