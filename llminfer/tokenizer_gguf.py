"""The tokenizer described by the metadata of a GGUF file: byte-level BPE ("gpt2") and SentencePiece ("llama", "t5").

Sources: the GGUF specification (tokenizer.ggml.* keys); llama.cpp's names of pre-tokenizers and its defaults where a
key is missing; the patterns are those of the models' own tokenizer.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from llminfer.errors import UserError, refuse
from llminfer.tokenizer import MAX_TOKENS, Tokenizer
from llminfer.tokenizer_spm import CONTROL, UNKNOWN, USER_DEFINED, Pieces, build_backend, package_errors

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*")
_LLAMA3 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
# A word is capitals and then small letters; letters without case, and marks, are both.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_GPT4O = rf"{_CASED[0]}{_SHORT}?|{_CASED[1]}{_SHORT}?|\p{{N}}{{1,3}}|{_REST_SLASH}"
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_REST_SLASH}"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CJK = "[一-龥ࠀ-一가-\ud7ff]+"
# Letters with case, those aside that its makers' list, of an older Unicode, does not have.
_DEEPSEEK_WORD = r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10c7}-\x{10ff}\x{1c80}-\x{1c8f}\x{2d00}-\x{2d2d}\x{a790}-\x{ab68}"
_DEEPSEEK_WORD += r"\x{10570}-\x{105bc}\x{10d50}-\x{10d85}\x{16e40}-\x{1df2f}]]+"
# Patterns, each of which splits further what the ones before it left -> the values of tokenizer.ggml.pre that mean them.
_BY_PATTERNS = {
    (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"): "default",
    (_GPT2,): "gpt-2 phi-2 mpt olmo jais exaone4 trillion gigachat mellum a.x-4.0 granite-docling",
    (r"\p{N}", _GPT2): "smollm starcoder refact command-r codeshell exaone minerva-7b",
    (_LLAMA3,): "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 dbrx smaug-bpe glm4 chatglm-bpe",
    (_QWEN2,): "qwen2 deepseek-r1-qwen stablelm2 megrez hunyuan kormo grok-2 solar-open",
    (_GPT4O,): "gpt-4o llama4 kanana2",
    (_TEKKEN,): "tekken",
    (r"[\r\n]", _DEEPSEEK_WORD, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}"): "deepseek-llm",
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}"): "deepseek-coder",
    (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3): "deepseek-v3 hunyuan-dense",
}
PRE_TOKENIZERS = {name: patterns for patterns, names in _BY_PATTERNS.items() for name in names.split()}
# These take a word that is a token as it is, whatever the merges give, and want a begin token unless the file says otherwise.
_WHOLE_WORDS = frozenset("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 tekken".split())


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer described by a GGUF file's metadata (key -> int, float, bool, str, or list of one of them).

    Supported values of tokenizer.ggml.model: "gpt2" (byte-level BPE) with a tokenizer.ggml.pre of PRE_TOKENIZERS, where
    a missing pre means "default", as in llama.cpp; "llama" (SentencePiece BPE by scores); "t5" (SentencePiece unigram).
    End tokens are the declared eos, end-of-turn and end-of-message ids. Raises UserError for another kind of tokenizer
    and for missing or malformed fields."""
    model = _field(metadata, "model", str)
    if model not in ("gpt2", "llama", "t5"):
        rule = 'not supported in a GGUF file; legal: "gpt2" (byte-level BPE), "llama" (SentencePiece BPE), "t5" (SentencePiece unigram)'
        raise refuse("tokenizer.ggml.model", model, rule)
    tokens, types = _vocabulary(metadata)
    known = {name: _token_id(metadata, f"{name}_token_id", len(tokens)) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    ids = {name: i for name, i in known.items() if i is not None}
    if model == "gpt2":
        pre = _field(metadata, "pre", str, "default")
        if pre not in PRE_TOKENIZERS:
            raise refuse("tokenizer.ggml.pre", pre, f"not supported; legal: {', '.join(PRE_TOKENIZERS)}")
        made = _byte_level_bpe(tokens, types, _array(metadata, "merges", str), pre)
        wanted = {"bos": pre in _WHOLE_WORDS, "eos": False}
    else:
        made = build_backend(_pieces(metadata, tokens, types, model == "t5", ids.get("unknown")))
        wanted = {"bos": model == "llama", "eos": model == "t5"}
    affixes: tuple[list[int], list[int]] = ([], [])
    for (name, default), place in zip(wanted.items(), affixes, strict=True):
        if _field(metadata, f"add_{name}_token", bool, default and name in ids):
            if name not in ids:
                raise refuse(f"tokenizer.ggml.add_{name}_token", True, f"needs tokenizer.ggml.{name}_token_id")
            place.append(ids[name])
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return Tokenizer(
        made,
        eos_ids=[ids[name] for name in ("eos", "eot", "eom") if name in ids],
        bos_id=ids.get("bos"),
        templates=_templates(metadata),
        special={variable: tokens[ids[name]] for name, variable in names.items() if name in ids},
        affixes=affixes,
    )


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Tokens, each there once, and the type of each."""
    tokens = _array(metadata, "tokens", str)
    if not 1 <= len(tokens) <= MAX_TOKENS:
        raise refuse("tokenizer.ggml.tokens", len(tokens), f"its length must be from 1 to {MAX_TOKENS}")
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))
        raise refuse("tokenizer.ggml.tokens", twice, "must not be there twice")
    types = _array(metadata, "token_type", int, [1] * len(tokens))
    if len(types) != len(tokens):
        raise refuse("tokenizer.ggml.token_type", len(types), f"its length must be that of the tokens, {len(tokens)}")
    return tokens, types


def _byte_level_bpe(tokens: list[str], types: list[int], merges: list[str], pre: str) -> tokenizers.Tokenizer:
    for merge in merges:
        if merge.count(" ") != 1:
            raise refuse("tokenizer.ggml.merges", merge, "must be two tokens with one space between")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    with package_errors("tokenizer.ggml.merges", "each merge must join two tokens into a third"):
        bpe = models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre in _WHOLE_WORDS)
    made = tokenizers.Tokenizer(bpe)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]]
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    kinds = (UNKNOWN, CONTROL, USER_DEFINED)
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in kinds and token]
    made.add_tokens([AddedToken(token, special=kind != USER_DEFINED, normalized=False) for token, kind in added])
    return made


def _pieces(metadata: Mapping[str, Any], tokens: list[str], types: list[int], unigram: bool, unknown: int | None) -> Pieces:
    scores = _array(metadata, "scores", float)
    if len(scores) != len(tokens):
        raise refuse("tokenizer.ggml.scores", len(scores), f"its length must be that of the tokens, {len(tokens)}")
    if not all(map(math.isfinite, scores)):
        raise refuse("tokenizer.ggml.scores", next(s for s in scores if not math.isfinite(s)), "must be finite")
    charsmap = _array(metadata, "precompiled_charsmap", int, [])
    return Pieces(
        tokens,
        scores,
        types,
        unigram=unigram,
        unknown=unknown,
        space_prefix=_field(metadata, "add_space_prefix", bool, True),
        squeeze=_field(metadata, "remove_extra_whitespaces", bool, False) and unigram,
        # Arrays of int8 and of uint8 are both in use.
        charsmap=bytes(c & 0xFF for c in charsmap) if unigram else b"",
        # Phi-3 lets its marks swallow the line end that its template writes after them; a GGUF file has no place to say so.
        strip_after=metadata.get("general.architecture") == "phi3",
    )


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
    # One pass in C over what is hundreds of thousands of entries.
    if not set(map(type, values)) <= {kind}:
        wrong = next(v for v in values if type(v) is not kind)
        raise refuse(f"tokenizer.ggml.{name}", wrong, f"must be an array of {kind.__name__}")
    return values


def _token_id(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    value = _field(metadata, name, int, None)
    if value is not None and not 0 <= value < count:
        raise refuse(f"tokenizer.ggml.{name}", value, f"must be from 0 to {count - 1}")
    return value


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """tokenizer.chat_template, and tokenizer.chat_template.NAME for further ones."""
    key = "tokenizer.chat_template"
    found = {"default" if k == key else k[len(key) + 1 :]: v for k, v in metadata.items() if k == key or k.startswith(key + ".")}
    for name, source in found.items():
        if not isinstance(source, str):
            raise refuse(f"{key} ({name})", source, "must be of type str")
    return found
