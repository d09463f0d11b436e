"""Makes tokenizer_smollm2.json and tokenizer_random.json beside this script.

    python tests/goldens/make_tokenizer.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf
    python tests/goldens/make_tokenizer.py --random smollm2=SmolLM2-135M-Instruct.Q4_1.gguf --random gemma3=gemma-3-270m.gguf

Needs transformers and gguf, the second also llama-cpp-python; not torch. Last made with transformers 5.24.0, tokenizers
0.23.3 and llama-cpp-python 0.3.36. Tests import `strings` and `digest`: they need neither.

Transformers builds a GGUF's vocabulary, merges and special tokens, but gives every one the pre-tokenizer of GPT-2,
whatever tokenizer.ggml.pre says. Here it is replaced by the one SmolLM2 was trained with: single digits, then GPT-2's.

tokenizer_smollm2.json
encode   list of [text, ids]
decode   list of [ids, text with special tokens, text without]: ids cut in the midst of characters, and random ones
chat     list of [messages, add_generation_prompt, text]

tokenizer_random.json
strings  the SHA-256 of the strings, so that a change of the generator is noticed
MODEL    in base64, four bytes a string: its `digest` where transformers and llama.cpp agree on the ids, else zeros. They
         part where a vocabulary lacks a byte (SmolLM2), and for Gemma at more than 16 spaces, where llama.cpp does as
         SentencePiece does, and at a written ▁ beside a space, where transformers does.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    " \n \t\r\n  x",
    "Hello, world!",
    " The quick brown fox jumps over the lazy dog.",
    "I'll we've don't I'M THEY'RE 'tis ''s",
    "0123456789 12 345  6\n7 3.14159 -1e10 1,000,000",
    "x1y22z333 ²½Ⅷ ٣٤٥ १२३ 12²  ½",
    "tab\tand\x0bvertical\x0cfeed\x85next\xa0hard\u2028line\u3000wide",
    "zero\x00width\u200bjoin\u200d\ufeffmark",
    "\x00\x01\x02\x03\x04\x05\x06\x13\x14\x16\x1d\x7f",
    "café cafe\u0301 naïve ﬁ ß İ ſ 'ſ",
    "Привет, мир! Καλημέρα κόσμε שלום עולם مرحبا بالعالم",
    "日本語のテキスト、中文字符，한국어 텍스트 ภาษาไทย हिन्दी",
    "😀😃 👨\u200d👩\u200d👧\u200d👦 🇩🇪🇯🇵 ❤\ufe0f 👍🏽",
    "𝒳𝓎 𐍈 \U0010ffff \ue000 \ufffd \uffff",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # comment\n\n\nclass A:\n\tpass\n",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", 1 << 31); return 0; }',
    '{"key": [1, 2.5, null, true], "nested": {"a\\u00e9": "\\\\"}}',
    "https://www.example.com/path?q=1&r=%20#frag user@example.com",
    "$\\frac{1}{2}\\sum_{i=0}^{n} x_i^2$ `code` **bold** _em_ ~~~ --- === ...",
    "a" * 200,
    " " * 100 + "x" + "\n" * 50,
    "_-_-" * 20 + "!?" * 20,
    "Ġ Ċ ▁ <0x0A> âĢĻ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <|endoftext|> c<|im_end|><|im_end|>",
    "<|im_ start|> <|IM_START|> <|im_start <|im_start||> <<|im_end|>>",
    "<repo_name>x<file_sep>y<filename><gh_stars>100-1000<issue_start><empty_output>",
]
CHATS = [
    ([{"role": "user", "content": "Hi <b> & é 😀"}], True),
    (
        [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": " 1 "}, {"role": "assistant", "content": "{{ 2 }}"}],
        False,
    ),
]


WORDS = """the quick brown fox don't I'LL we've They'Re def return class import self None True print( ) { } [ ] ; := == != -> => // /*
*/ # $ % & @ ~ ^ | \\ naïve café über straße Привет мир καλημέρα שלום مرحبا العالم हिन्दी ภาษาไทย 日本語 中文字符 한국어 テスト ｆｕｌｌ
ﬁ ẞ ſ İı Ǆ ǅ ⅷ ½ ² ٣ १२ 0 1 12 123 1234 3.14 1e-10 0xFF""".split()
EMOJI = [
    "😀",
    "👨\u200d👩\u200d👧\u200d👦",
    "🇩🇪",
    "❤\ufe0f",
    "👍🏽",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "☕\ufe0f",
]
SPACES = [
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\t\t",
    "\xa0",
    "\u3000",
    "\u2028",
    "\x0b",
    "\x0c",
    "\x85",
    " " * 15,
    "\n" * 7,
    "\t" * 5,
]
ODD = ["\0", "\x01", "\x1b", "\x7f", "e\u0301", "a\u0300\u0316", "\u200b", "\u200d", "\u202e", "\ufeff", "\ufffd", "\uffff", "\U0010ffff"]
ODD += ["\ue000", "Ġ", "Ċ", "▁", "<0x0A>", "<0xE2>", "<|im_end", "|>", "<", "<unk>", "[INST]"]
PIECES = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<unused5>", "<table>", "<eos>"]
RANGES = [(0x20, 0x7F), (0xA0, 0x250), (0x370, 0x600), (0x900, 0xE80), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3)]
RANGES += [(0x1F300, 0x1FAFF), (0, 0xD7FF), (0xE000, 0x110000)]


def strings(count: int = 2000, seed: int = 0) -> list[str]:
    """Random texts of 1 to 13 parts: words of many scripts, emoji, white space, control and special characters, digits,
    special tokens and what looks like them, random characters, runs of one character."""
    draw = random.Random(seed)
    kinds: list[Callable[[], str]] = [
        lambda: draw.choice(WORDS) + draw.choice(["", " ", " "]),
        lambda: draw.choice(WORDS) + draw.choice(["", " ", " "]),
        lambda: draw.choice(SPACES) * draw.choice([1, 1, 1, 2, 3]),
        lambda: draw.choice(EMOJI),
        lambda: draw.choice(ODD),
        lambda: draw.choice(PIECES),
        lambda: str(draw.randrange(10 ** draw.randrange(1, 9))),
        lambda: "".join(chr(draw.randrange(*draw.choice(RANGES))) for _ in range(draw.randrange(1, 6))),
        lambda: draw.choice("abcxyz=-_.#*/ ") * draw.randrange(1, 40),
    ]
    return ["".join(draw.choice(kinds)() for _ in range(draw.randrange(1, 14))) for _ in range(count)]


def digest(ids: list[int]) -> bytes:
    """Four bytes that stand for a list of ids."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).digest()[:4]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", type=Path, help="SmolLM2: makes tokenizer_smollm2.json")
    parser.add_argument("--random", action="append", metavar="NAME=GGUF", help="makes tokenizer_random.json")
    arguments = parser.parse_args()
    if arguments.gguf:
        make_smollm2(arguments.gguf)
    if arguments.random:
        make_random(dict(item.split("=", 1) for item in arguments.random))


def load(gguf: Path) -> Any:
    """Transformers' tokenizer of a GGUF file, with SmolLM2's pre-tokenizer where it has GPT-2's."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        digits = pre_tokenizers.Digits(individual_digits=True)
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    return tokenizer


def llama_cpp_encode(gguf: Path) -> Callable[[str], list[int]]:
    """llama.cpp's tokenizer of a GGUF file; special tokens in the text are taken as such, none is added."""
    import llama_cpp

    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), parameters)
    assert model is not None, gguf
    vocab = llama_cpp.llama_model_get_vocab(model)
    assert vocab is not None, gguf

    def encode(text: str) -> list[int]:
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 16))()
        return list(room[: llama_cpp.llama_tokenize(vocab, data, len(data), room, len(room), False, True)])

    return encode


def make_random(models: dict[str, str]) -> None:
    texts = strings()
    golden: dict[str, Any] = {"strings": hashlib.sha256("\0".join(texts).encode()).hexdigest()}
    for name, path in models.items():
        ours, theirs = load(Path(path)), llama_cpp_encode(Path(path))
        pairs = [(ours.encode(text, add_special_tokens=False), theirs(text)) for text in texts]
        print(f"{name}: transformers and llama.cpp agree on {sum(a == b for a, b in pairs)} of {len(pairs)}")
        golden[name] = base64.b64encode(b"".join(digest(a) if a == b else bytes(4) for a, b in pairs)).decode()
    Path(__file__).with_name("tokenizer_random.json").write_text(json.dumps(golden, indent=1) + "\n")


def make_smollm2(gguf: Path) -> None:
    tokenizer = load(gguf)
    encoded = [(text, tokenizer.encode(text)) for text in TEXTS]
    draw = random.Random(0)
    sequences = [ids[cut::2] for _, ids in encoded[12:20] for cut in (0, 1)]
    sequences += [[draw.randrange(len(tokenizer)) for _ in range(20)] for _ in range(10)]
    sequences += [[draw.randrange(100, 260) for _ in range(30)] for _ in range(10)]
    golden = {
        "encode": encoded,
        "decode": [(ids, tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)) for ids in sequences],
        "chat": [(m, prompt, tokenizer.apply_chat_template(m, add_generation_prompt=prompt, tokenize=False)) for m, prompt in CHATS],
    }
    lines = [f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]" for name, rows in golden.items()]
    Path(__file__).with_name("tokenizer_smollm2.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
