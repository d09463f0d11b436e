"""Stop strings and what may be shown, token by token; and through the engine."""

from __future__ import annotations

import dataclasses

import pytest

from llminfer import LLM, SamplingParams
from llminfer.text import TextStream

pytestmark = pytest.mark.usefixtures("compiled_fast")


class Spelled:
    """A detokenizer whose tokens are characters."""

    def push(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def flush(self) -> str:
        return ""


def test_what_may_begin_a_stop_string_is_not_shown() -> None:
    stream = TextStream(Spelled(), ("END", "stop"))
    shown = []
    for character in "an ENtry st":
        assert not stream.push(ord(character))
        shown.append(stream.text[: stream.shown])
    assert shown[3:6] == ["an ", "an ", "an ENt"] and shown[-1] == "an ENtry "
    assert not stream.finish()
    assert stream.text[: stream.shown] == "an ENtry st"


def test_the_text_ends_before_the_first_stop_string() -> None:
    stream = TextStream(Spelled(), ("END",))
    found = [stream.push(ord(character)) for character in "abEND"]
    assert found == [False] * 4 + [True]
    assert stream.text == "ab" and stream.shown == 2


def test_a_stop_string_is_the_reason_also_where_the_loop_ran_to_its_length(tiny_directory) -> None:
    llm = LLM(str(tiny_directory), slots=2, context=128, chunk=32, decode_steps=4, dtype="float32")
    params = SamplingParams(max_tokens=5, ignore_eos=True, logit_bias=dict.fromkeys(llm.encode("abcdefgh"), 100.0), presence_penalty=2.0)
    free = llm.generate("Hello", params)[0]
    stop = free.text[2]
    cut = llm.generate("Hello", dataclasses.replace(params, stop=[stop]))[0]
    assert cut.text == free.text[: free.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert llm.stats()["pages_free"] == llm.stats()["pages_total"]
    llm.close()
