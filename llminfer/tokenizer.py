"""Text to token ids and back, and a model's chat template. Imports neither jax nor a model.

The segmentation itself is done by the `tokenizers` package, from the `tokenizer.json` or the `tokenizer.model` of a
Hugging Face directory; tokenizer_gguf builds it from a GGUF file's metadata. Decoding is done here, from the bytes of
each token, because a stream must never show half a character and must never take back what it has shown.

Source: the layout of Hugging Face model directories."""

from __future__ import annotations

import codecs
import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from llminfer.chat_template import check_dicts, check_messages, one_line, render_chat
from llminfer.errors import UserError, refuse
from llminfer.tokenizer_spm import CONTROL, UNUSED, USER_DEFINED, build_backend, package_errors, read_model

MAX_TOKENS = 1 << 21  # entries of a vocabulary, as for ModelConfig.vocab_size


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
    """One model's tokenizer; build it with `from_directory` or `tokenizer_gguf.from_gguf`. Safe to share between threads.

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
        with package_errors("tokenizer", "this model's tokenizer is damaged"):
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
        add_generation_prompt: bool | None = None,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation, through the model's own template.

        messages: see `check_messages`; other keys (tool_calls, name, reasoning_content) are handed to the template, which
        decides on the roles. add_generation_prompt: begin the assistant's turn (None: unless continuing). tools: JSON
        schemas. documents: texts to ground the answer in, usually {"title", "text"}. continue_final_message: leave the
        last message open for the model to go on, True for its content, or the name of another field of it.
        chat_template: the name of one of the model's templates; None: "tool_use", where there is one and tools are given,
        else "default". variables: what else the template knows, such as enable_thinking. Encode the result with
        add_special=False. Raises UserError: no template, malformed messages, an error inside the template."""
        check_messages(messages)
        check_dicts("tools", tools, "JSON schemas")
        check_dicts("documents", documents, '{"title": str, "text": str}')
        if not isinstance(continue_final_message, (bool, str)):
            raise refuse("continue_final_message", continue_final_message, "must be a bool or the name of a field")
        if add_generation_prompt and continue_final_message:
            raise refuse("add_generation_prompt", add_generation_prompt, "must not be set beside continue_final_message")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        given = {"tools": tools, "documents": documents, "add_generation_prompt": bool(add_generation_prompt)}
        source = self._template(chat_template, tools is not None)
        return render_chat(source, messages, {**self._special, **variables, **given}, continue_final_message)

    def _template(self, name: str | None, with_tools: bool) -> str:
        if name is None:
            name = "tool_use" if with_tools and "tool_use" in self._templates else "default"
            if name not in self._templates:
                others = f" (it has, but not by default: {', '.join(sorted(self._templates))})" if self._templates else ""
                raise UserError(f"chat_template: this model has no chat template{others}; give it raw text or token ids")
        if name not in self._templates:
            raise refuse("chat_template", name, f"this model has none of that name; legal: {', '.join(sorted(self._templates)) or None}")
        return self._templates[name]

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, with what is put around a text as its post-processor, and tokenizer_config.json into `folder`."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        before, after = ([str(backend.id_to_token(i)) for i in ids] for ids in (self._prefix, self._suffix))
        if before or after:
            special = [(token, backend.token_to_id(token)) for token in dict.fromkeys(before + after)]
            single = [*before, "$A", *after]
            around = processors.TemplateProcessing(single=single, pair=[*single, "$B:1", *after], special_tokens=special)
            backend.post_processor = around if backend.post_processor is None else processors.Sequence([backend.post_processor, around])
        backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self._special}
        if self._templates:
            named = [{"name": name, "template": source} for name, source in self._templates.items()]
            config["chat_template"] = self._templates["default"] if list(self._templates) == ["default"] else named
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

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
    if kinds[0] == "Replace" and (steps[0]["pattern"], steps[0]["content"]) == ({"String": "▁"}, " "):
        rest = kinds[1:] if "ByteFallback" not in kinds[1:2] else kinds[2:]
        if rest in ([], ["Fuse"]):
            return False, False
        if rest == ["Fuse", "Strip"] and (steps[-1]["content"], steps[-1]["start"], steps[-1]["stop"]) == (" ", 1, 0):
            return False, True
    raise refuse("tokenizer decoder", "+".join(kinds), "not supported; legal: ByteLevel, Metaspace, Replace[+ByteFallback][+Fuse[+Strip]]")


# ---- Hugging Face directories


def from_directory(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face model directory; None where it has neither tokenizer.json nor tokenizer.model.

    tokenizer.json is preferred. End tokens: those of generation_config.json (else config.json), then the tokenizer's own
    eos_token. The chat template: chat_template.jinja, else the one in tokenizer_config.json. Raises UserError for damaged
    files."""
    folder = Path(path)
    config = _read_json(folder / "tokenizer_config.json")
    affixes: tuple[list[int], list[int]] = ([], [])
    if (folder / "tokenizer.json").is_file():
        made = _load(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        made, affixes = _load_sentencepiece(folder, config)
    else:
        return None
    special = {**_special_tokens(_read_json(folder / "special_tokens_map.json")), **_special_tokens(config)}
    model, generation = _read_json(folder / "config.json"), _read_json(folder / "generation_config.json")
    declared = generation if generation.get("eos_token_id") is not None else model
    eos = _token_ids(declared, "eos_token_id")
    bos = _token_ids(generation, "bos_token_id") or _token_ids(model, "bos_token_id")
    if "eos_token" in special and (own := made.token_to_id(special["eos_token"])) is not None:
        eos.append(own)
    if "bos_token" in special and (own := made.token_to_id(special["bos_token"])) is not None:
        bos = [own]
    return Tokenizer(
        made,
        eos_ids=eos,
        bos_id=bos[0] if bos else None,
        templates=_directory_templates(folder, config),
        special=special,
        affixes=affixes,
    )


def _load(file: Path) -> tokenizers.Tokenizer:
    # The package ends the process on some BPE files with this field, which no language model uses. Reading 30 MB of JSON
    # only to look for it takes as long as loading: it is done where the text has the field, or letters hidden in escapes.
    suspect = re.search(r'"continuing_subword_prefix"\s*:\s*[^\sn]|\\u00[2-7]', _read_text(file))
    model = _read_json(file).get("model") if suspect else None
    if isinstance(model, dict) and model.get("continuing_subword_prefix"):
        raise refuse(f"{file}: continuing_subword_prefix", model["continuing_subword_prefix"], 'not supported; legal: null, ""')
    with package_errors(str(file), "must be a tokenizer.json of the tokenizers package"):
        backend = tokenizers.Tokenizer.from_file(str(file))
        backend.encode("")  # a post-processor that names tokens which are not there fails only now
        return backend


def _load_sentencepiece(folder: Path, config: dict[str, Any]) -> tuple[tokenizers.Tokenizer, tuple[list[int], list[int]]]:
    """From tokenizer.model and what tokenizer_config.json adds to it: renamed and further tokens, and the ids to put
    before and after a text (a begin token unless it says otherwise)."""
    pieces, ids = read_model(folder / "tokenizer.model")
    tokens, scores, types = list(pieces.tokens), list(pieces.scores), list(pieces.types)
    for i, text, special in _added_tokens(folder, config):
        for gap in range(len(tokens), i + 1):
            tokens.append(f"[UNUSED {gap}]")
            scores.append(0.0)
            types.append(UNUSED)
        tokens[i], types[i] = text, CONTROL if special else USER_DEFINED
    if len(set(tokens)) != len(tokens):
        raise refuse(f"{folder}: added tokens", len(tokens) - len(set(tokens)), "tokens are there twice")
    affixes: tuple[list[int], list[int]] = ([], [])
    for (name, default), place in zip({"bos": True, "eos": False}.items(), affixes, strict=True):
        token = _special_tokens(config).get(f"{name}_token")
        number = ids.get(name) if token not in tokens else tokens.index(token)
        if config.get(f"add_{name}_token", default) and number is not None:
            place.append(number)
    return build_backend(replace(pieces, tokens=tokens, scores=scores, types=types)), affixes


def _added_tokens(folder: Path, config: dict[str, Any]) -> list[tuple[int, str, bool]]:
    """(id, token, it is special) by id, of tokenizer_config.json's added_tokens_decoder, else of added_tokens.json."""
    listed = config.get("added_tokens_decoder")
    if listed is None:
        listed = {i: {"content": token, "special": False} for token, i in _read_json(folder / "added_tokens.json").items()}
    try:
        found = [(int(i), token["content"], bool(token.get("special", False))) for i, token in listed.items()]
    except (AttributeError, KeyError, TypeError, ValueError):
        found = [(-1, "", False)]
    if not all(0 <= i < MAX_TOKENS and isinstance(token, str) and token for i, token, _ in found):
        raise refuse(f"{folder}: added tokens", listed, 'must be {id: {"content": str}} or {str: id}')
    return sorted(found)


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
