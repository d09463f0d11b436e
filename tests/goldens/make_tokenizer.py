"""Makes tokenizer_smollm2.json beside this script with transformers.

    python tests/goldens/make_tokenizer.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf

Needs transformers and gguf, not torch. Last made with transformers 5.23.0 and tokenizers 0.23.3.

Transformers builds a GGUF's vocabulary, merges and special tokens, but gives every one the pre-tokenizer of GPT-2,
whatever tokenizer.ggml.pre says. Here it is replaced by the one SmolLM2 was trained with: single digits, then GPT-2's.

encode   list of [text, ids]
decode   list of [ids, text with special tokens, text without]: ids cut in the midst of characters, and random ones
chat     list of [messages, add_generation_prompt, text]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", type=Path, required=True)
    gguf = parser.parse_args().gguf
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
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
