"""Text to token ids and back, and a model's chat template. Imports neither jax nor a model.

The segmentation itself is done by the `tokenizers` package, either from a Hugging Face `tokenizer.json` or built from
the arrays of a GGUF file. Decoding is done here, from the bytes of each token, because a stream must never show half
a character and must never take back what it has shown.

Sources: the GGUF specification (tokenizer.ggml.* keys), llama.cpp's names of pre-tokenizers, the Hugging Face
model directory."""

from __future__ import annotations

import codecs
import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from llminfer.chat_template import check_messages, one_line, render
from llminfer.errors import UserError, refuse

MAX_TOKENS = 1 << 21  # entries of a vocabulary, as for ModelConfig.vocab_size

# GGUF token types (tokenizer.ggml.token_type) that are matched in a text as they are written; the others are ordinary.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# tokenizer.ggml.pre -> patterns, each of which splits further what the ones before it left.
PRE_TOKENIZERS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "llama-bpe": (_LLAMA3,),
    "smollm": (r"\p{N}", _GPT2),
}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: a Latin-1 character that prints stands for itself, the other
    bytes, in order, for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


class Detokenizer:
    """Token ids in, printable text out, for one stream. The cost of a token does not depend on the length so far.

    All texts returned by `push`, then `flush`, joined, are `Tokenizer.decode` of all the ids. Not thread-safe."""

    def __init__(self, token_bytes: Callable[[int], bytes], strip_space: bool) -> None:
        self._token_bytes = token_bytes
        self._strip_space = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with these ids, '' where none did. An unfinished UTF-8 character at the end
        is held back; bytes that can no longer become a character give U+FFFD. A negative id raises UserError."""
        return self._emit(b"".join([self._token_bytes(i) for i in ids]), final=False)

    def flush(self) -> str:
        """The held-back rest, as U+FFFD. After it the detokenizer is ready for another stream."""
        text = self._emit(b"", final=True)
        self._at_start = True
        return text

    def _emit(self, data: bytes, final: bool) -> str:
        text = self._utf8.decode(data, final)
        if self._at_start and text:
            self._at_start = False
            if self._strip_space and text[0] == " ":
                return text[1:]
        return text


class Tokenizer:
    """One model's tokenizer; build it with `from_directory` or `from_gguf`. Safe to share between threads.

    vocab_size: the largest token id + 1 (a model's embedding may be padded beyond it). eos_ids: the ids that end a
    generation. bos_id: None where the model has none. chat_template: the Jinja source, None where there is none."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_ids: Iterable[int] = (),
        bos_id: int | None = None,
        templates: Mapping[str, str] | None = None,
        special: Mapping[str, str] | None = None,
        affixes: tuple[list[int], list[int]] = ([], []),
    ) -> None:
        """templates: name -> Jinja source ("default", perhaps "tool_use"); special: the template's variables such as
        bos_token; affixes: ids to add before and after a text, beside what the backend's post-processor adds."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._byte_level, self._strip_space = _decoding(backend)
        self._added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        self._special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._templates = dict(templates or {})
        self._special = dict(special or {})
        self._prefix, self._suffix = affixes
        self._bytes: dict[int, bytes] = {}
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.bos_id = bos_id
        self.vocab_size = max(backend.get_vocab_size(with_added_tokens=True), max(self._added, default=-1) + 1)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`. add_special: also what the model's tokenizer puts around a text (often a begin token);
        False for the output of `apply_chat`, which has written them already. Special tokens spelled in the text
        become those tokens either way. Bytes a vocabulary has no token for are left out, as its makers' tokenizer
        does. Raises UserError for text that is not a str or not Unicode (a lone surrogate)."""
        if not isinstance(text, str):
            raise refuse("text", text, "must be a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = text[error.start]
            raise refuse("text", found, f"lone surrogate at character {error.start}; must be valid Unicode") from None
        ids = self._backend.encode(text, add_special_tokens=add_special).ids
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids beyond the vocabulary nothing. skip_special:
        leave out special tokens such as end-of-turn marks."""
        stream = self.stream(skip_special)
        return stream.push(ids) + stream.flush()

    def stream(self, skip_special: bool = True) -> Detokenizer:
        """A fresh incremental decoder."""
        return Detokenizer(self._shown_bytes if skip_special else self._token_bytes, self._strip_space)

    @property
    def chat_template(self) -> str | None:
        return self._templates.get("default")

    def apply_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The prompt text of a conversation, through the model's own template.

        messages: dicts with str "role" and str "content"; other keys are handed to the template, which decides on the
        roles. tools: JSON schemas; a template named "tool_use" is then preferred. Encode the result with
        add_special=False. Raises UserError: no template, malformed messages, an error inside the template."""
        check_messages(messages)
        if tools is not None and not (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)):
            raise refuse("tools", tools, "must be a list of dicts (JSON schemas)")
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            others = f" (it has, but not by default: {', '.join(sorted(self._templates))})" if self._templates else ""
            raise UserError(f"chat_template: this model has no chat template{others}; give it raw text or token ids")
        variables = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": bool(add_generation_prompt)}
        return render(self._templates[name], {**self._special, **variables})

    def _shown_bytes(self, token: int) -> bytes:
        return b"" if token in self._special_ids else self._token_bytes(token)

    def _token_bytes(self, token: int) -> bytes:
        found = self._bytes.get(token)
        if found is None:
            token = operator.index(token)
            if token < 0:
                raise refuse("token id", token, "must be >= 0")
            if token >= self.vocab_size:
                return b""
            found = self._bytes[token] = self._spell(token)
        return found

    def _spell(self, token: int) -> bytes:
        """The bytes token number `token` stands for."""
        # An added token is matched in a text as it is written, so it is written back as it is: it is not in byte spelling.
        text = self._added.get(token)
        if text is not None:
            return text.encode() if self._byte_level else text.replace("▁", " ").encode()
        text = self._backend.id_to_token(token) or ""
        if self._byte_level:
            codes = [_BYTE_OF.get(c, -1) for c in text]
            return bytes(codes) if -1 not in codes else text.encode()
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()


def _decoding(backend: tokenizers.Tokenizer) -> tuple[bool, bool]:
    """(tokens are spelled in the byte alphabet, one space at the very start is dropped), from the backend's decoder.
    Raises UserError for a decoder that is neither byte-level nor in SentencePiece's manner."""
    decoder = backend.decoder
    state: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "none"}
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False
    if kinds == ["Metaspace"] and steps[0]["replacement"] == "▁":
        return False, steps[0]["prepend_scheme"] != "never"
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and (steps[0]["pattern"], steps[0]["content"]) == ({"String": "▁"}, " "):
        if len(kinds) == 3:
            return False, False
        if kinds[3:] == ["Strip"] and (steps[3]["content"], steps[3]["start"], steps[3]["stop"]) == (" ", 1, 0):
            return False, True
    raise refuse("tokenizer decoder", "+".join(kinds), "not supported; legal: ByteLevel, Metaspace, Replace+ByteFallback+Fuse[+Strip]")


# ---- Hugging Face directories


def from_directory(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face model directory; None where it has no tokenizer.json.

    End tokens: those of generation_config.json (else config.json), then the tokenizer's own eos_token. The chat
    template: chat_template.jinja, else the one in tokenizer_config.json. Raises UserError for damaged files."""
    folder = Path(path)
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    backend = _load(file)
    config = _read_json(folder / "tokenizer_config.json")
    special = {**_special_tokens(_read_json(folder / "special_tokens_map.json")), **_special_tokens(config)}
    model, generation = _read_json(folder / "config.json"), _read_json(folder / "generation_config.json")
    declared = generation if generation.get("eos_token_id") is not None else model
    eos = _token_ids(declared, "eos_token_id")
    bos = _token_ids(generation, "bos_token_id") or _token_ids(model, "bos_token_id")
    if "eos_token" in special and (own := backend.token_to_id(special["eos_token"])) is not None:
        eos.append(own)
    if "bos_token" in special and (own := backend.token_to_id(special["bos_token"])) is not None:
        bos = [own]
    return Tokenizer(
        backend,
        eos_ids=eos,
        bos_id=bos[0] if bos else None,
        templates=_directory_templates(folder, config),
        special=special,
    )


def _load(file: Path) -> tokenizers.Tokenizer:
    model = _read_json(file).get("model")
    # The package ends the process on some BPE files with this field, which no language model uses.
    if isinstance(model, dict) and model.get("continuing_subword_prefix"):
        raise refuse(f"{file}: continuing_subword_prefix", model["continuing_subword_prefix"], 'not supported; legal: null, ""')
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
        backend.encode("")  # a post-processor that names tokens which are not there fails only now
        return backend
    except BaseException as error:
        # The package raises bare Exception for what it cannot read; its panics are no Exception, and of a private type.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise refuse(str(file), one_line(error), "must be a tokenizer.json of the tokenizers package") from None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise refuse(str(file), one_line(error), "must be a readable UTF-8 file") from None


def _read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, {} where there is no such file."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(_read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise refuse(str(file), one_line(error), "must be valid JSON") from None
    if not isinstance(data, dict):
        raise refuse(str(file), type(data).__name__, "must hold a JSON object")
    return data


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and their like, each given as a str or as {"content": str}; null is as good as absent."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None:
            if not isinstance(value, str):
                raise refuse(name, value, 'must be a str or {"content": str}')
            found[name] = value
    return found


def _token_ids(config: dict[str, Any], name: str) -> list[int]:
    value = config.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < MAX_TOKENS:
            raise refuse(name, value, f"must be an integer from 0 to {MAX_TOKENS - 1}, or a list of them")
    return list(ids)


def _directory_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Template name -> source: a chat_template.jinja (and additional_chat_templates/NAME.jinja), else the
    chat_template of tokenizer_config.json, a str or a list of {"name", "template"}."""
    found: dict[str, str] = {}
    files = [("default", folder / "chat_template.jinja")]
    files += [(f.stem, f) for f in sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    found.update((name, _read_text(file)) for name, file in files if file.is_file())
    if found:
        return found
    value = config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    rule = 'must be a str or a list of {"name": str, "template": str}'
    if not isinstance(value, list):
        raise refuse("chat_template", value, rule)
    for item in value:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not isinstance(item.get("template"), str):
            raise refuse("chat_template", item, rule)
        found[item["name"]] = item["template"]
    return found


# ---- GGUF metadata


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer described by a GGUF file's metadata (key -> int, bool, str, or list of int or str).

    Supported: tokenizer.ggml.model "gpt2" (byte-level BPE) with a tokenizer.ggml.pre of PRE_TOKENIZERS; a missing pre
    means "default", as in llama.cpp. End tokens are the declared eos, end-of-turn and end-of-message ids. Raises
    UserError for another kind of tokenizer and for missing or malformed fields."""
    model = _field(metadata, "model", str)
    if model != "gpt2":
        raise refuse("tokenizer.ggml.model", model, 'not supported in a GGUF file; legal: "gpt2" (byte-level BPE)')
    pre = _field(metadata, "pre", str, "default")
    if pre not in PRE_TOKENIZERS:
        raise refuse("tokenizer.ggml.pre", pre, f"not supported; legal: {', '.join(PRE_TOKENIZERS)}")
    tokens = _array(metadata, "tokens", str)
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise refuse("tokenizer.ggml.tokens", len(tokens), f"its length must be from 1 to {MAX_TOKENS}")
    types = _array(metadata, "token_type", int, [1] * len(tokens))
    if len(types) != len(tokens):
        raise refuse("tokenizer.ggml.token_type", len(types), f"its length must be that of the tokens, {len(tokens)}")
    backend = _byte_level_bpe(tokens, types, _array(metadata, "merges", str), pre)
    known = {name: _token_id(metadata, f"{name}_token_id", len(tokens)) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    ids = {name: i for name, i in known.items() if i is not None}
    affixes: tuple[list[int], list[int]] = ([], [])
    # llama.cpp takes llama-bpe vocabularies to want a begin token unless the file says otherwise.
    for name, place, default in (("bos", affixes[0], pre == "llama-bpe"), ("eos", affixes[1], False)):
        if _field(metadata, f"add_{name}_token", bool, default and name in ids):
            if name not in ids:
                raise refuse(f"tokenizer.ggml.add_{name}_token", True, f"needs tokenizer.ggml.{name}_token_id")
            place.append(ids[name])
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return Tokenizer(
        backend,
        eos_ids=[ids[name] for name in ("eos", "eot", "eom") if name in ids],
        bos_id=ids.get("bos"),
        templates=_gguf_templates(metadata),
        special={variable: tokens[ids[name]] for name, variable in names.items() if name in ids},
        affixes=affixes,
    )


def _byte_level_bpe(tokens: list[str], types: Sequence[int], merges: list[str], pre: str) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise refuse("tokenizer.ggml.tokens", twice, "must not be there twice")
    for merge in merges:
        if merge.count(" ") != 1:
            raise refuse("tokenizer.ggml.merges", merge, "must be two tokens with one space between")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        bpe = models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the package raises bare Exception, for a merge whose tokens are unknown
        raise refuse("tokenizer.ggml.merges", one_line(error), "each merge must join two tokens into a third") from None
    backend = tokenizers.Tokenizer(bpe)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL)]
    plain = [AddedToken(t, special=False, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    backend.add_special_tokens([token for token in special if token.content])
    backend.add_tokens([token for token in plain if token.content])
    return backend


_REQUIRED: Any = object()


def _field(metadata: Mapping[str, Any], name: str, kind: type, default: Any = _REQUIRED) -> Any:
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key)
    value = default if value is None else value
    if value is _REQUIRED:
        raise UserError(f"{key}: missing from the file's metadata; this GGUF has no usable tokenizer")
    wrong = isinstance(value, bool) if kind is int else isinstance(value, str) and kind is Sequence
    if value is not None and (wrong or not isinstance(value, kind)):
        raise refuse(key, value, f"must be of type {'array' if kind is Sequence else kind.__name__}")
    return value


def _array(metadata: Mapping[str, Any], name: str, kind: type, default: Any = _REQUIRED) -> list[Any]:
    values = list(_field(metadata, name, Sequence, default))
    # One pass in C over what is tens of thousands of entries.
    if not set(map(type, values)) <= {kind}:
        wrong = next(v for v in values if type(v) is not kind)
        raise refuse(f"tokenizer.ggml.{name}", wrong, f"must be an array of {kind.__name__}")
    return values


def _token_id(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    value = _field(metadata, name, int, None)
    if value is not None and not 0 <= value < count:
        raise refuse(f"tokenizer.ggml.{name}", value, f"must be from 0 to {count - 1}")
    return value


def _gguf_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """tokenizer.chat_template, and tokenizer.chat_template.NAME for further ones."""
    key = "tokenizer.chat_template"
    found = {"default" if k == key else k[len(key) + 1 :]: v for k, v in metadata.items() if k == key or k.startswith(key + ".")}
    for name, source in found.items():
        if not isinstance(source, str):
            raise refuse(f"{key} ({name})", source, "must be of type str")
    return found
