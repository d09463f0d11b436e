"""AsyncLLM: the tokens of LLM, aborts at any time, a broken engine told to everyone, nothing leaked."""

from __future__ import annotations

import asyncio

import pytest

from llminfer import LLM, AsyncLLM, SamplingParams, UserError

pytestmark = pytest.mark.usefixtures("compiled_fast")


@pytest.fixture(scope="module")
def llm(tiny_directory) -> LLM:
    return LLM(str(tiny_directory), slots=4, context=8192, chunk=32, decode_steps=8)


PROMPTS = [f"prompt number {i}" for i in range(10)]
PARAMS = SamplingParams(max_tokens=24, temperature=0.8, seed=3, ignore_eos=True)


def test_many_at_once_give_the_tokens_of_generate(llm: LLM) -> None:
    expected = [out.token_ids for out in llm.generate(list(PROMPTS), PARAMS)]

    async def main() -> tuple[list, list[str]]:
        async with AsyncLLM(llm) as served:
            streams = [await served.submit(prompt, PARAMS) for prompt in PROMPTS]
            with pytest.raises(UserError, match="expert_copies=0: must be at least 1"):
                await served.rebalance()
            outs = await asyncio.gather(*(stream.result() for stream in streams))
            texts = ["".join([piece async for piece in stream]) for stream in streams]
            return outs, texts

    outs, texts = asyncio.run(main())
    assert [out.token_ids for out in outs] == expected
    assert texts == [out.text for out in outs]
    assert llm.stats()["pages_free"] == llm.stats()["pages_total"] and llm.stats()["compiles_after_warmup"] == 0


def test_aborts_cancellations_and_bad_requests_leave_nothing_behind(llm: LLM) -> None:
    long = SamplingParams(max_tokens=8000, ignore_eos=True)  # some seconds: nobody waits for their end

    async def main() -> None:
        async with AsyncLLM(llm) as served:
            first = await served.submit(PROMPTS[0], long)
            with pytest.raises(UserError, match="token id"):
                await served.submit([-1], long)
            cancelled = asyncio.create_task(served.generate(PROMPTS[1], long))
            await asyncio.sleep(0.02)
            cancelled.cancel()
            async for _ in served.stream(PROMPTS[2], long):
                break  # a reader that leaves
            served.abort(first)
            assert (await first.result()).finish_reason == "abort"
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            done = await served.generate(PROMPTS[3], SamplingParams(max_tokens=5, ignore_eos=True))
            assert done.finish_reason == "length" and len(done.token_ids) == 5
            left_open = await served.submit(PROMPTS[4], long)
        assert (await left_open.result()).finish_reason == "abort"
        with pytest.raises(UserError, match="is closed"):
            await served.submit(PROMPTS[0], long)

    asyncio.run(main())
    assert not llm.engine.busy and llm.stats()["pages_free"] == llm.stats()["pages_total"]


def test_a_broken_engine_is_told_to_everyone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_) -> None:
        raise RuntimeError("no device")

    async def main() -> None:
        async with AsyncLLM(llm) as served:
            first = await served.submit(PROMPTS[0], PARAMS)
            with pytest.raises(RuntimeError, match="no device"):
                await first.result()
            with pytest.raises(UserError, match="the engine has stopped: no device"):
                await served.submit(PROMPTS[1], PARAMS)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", broken)
        asyncio.run(main())
    for seq in [*llm.engine.scheduler.running, *llm.engine.scheduler.waiting]:
        llm.engine.abort(seq)
