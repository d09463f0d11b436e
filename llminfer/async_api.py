"""AsyncLLM: the engine for asyncio. Requests come and go at any time; one thread runs the engine's steps."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from llminfer.api import LLM, Prompt
from llminfer.errors import UserError
from llminfer.request import RequestOutput, SamplingParams, Sequence


class Stream:
    """One submitted request: iterate over it for pieces of the text of its first sample, await `result()` for everything.
    Both may be used, in any order; a request goes on whether or not anyone reads."""

    def __init__(self, sequences: list[Sequence], loop: asyncio.AbstractEventLoop):
        self.sequences, self._loop = sequences, loop
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._done: asyncio.Future[None] = loop.create_future()
        self._done.add_done_callback(lambda done: done.exception())  # told to whoever awaits it, if anyone does
        self._sent = 0

    def __aiter__(self) -> AsyncIterator[str]:
        return self._read()

    async def _read(self) -> AsyncIterator[str]:
        while (piece := await self._pieces.get()) is not None:
            yield piece
        self._pieces.put_nowait(None)  # whoever iterates again gets the same end
        await self._done

    async def result(self) -> RequestOutput:
        """The finished request. Raises what the engine raised, if it broke."""
        await asyncio.shield(self._done)
        return LLM.output(self.sequences)

    # From the engine's thread.

    def advance(self) -> bool:
        """Hands over what is new; whether all samples have ended."""
        text = self.sequences[0].stream
        new, self._sent = text.text[self._sent : text.shown], max(self._sent, text.shown)
        ended = all(seq.finish is not None for seq in self.sequences)
        self._tell(lambda: self._take(new, ended))
        return ended

    def fail(self, error: BaseException) -> None:
        self._tell(lambda: self._take("", True, error))

    def _tell(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(call)

    def _take(self, new: str, ended: bool, error: BaseException | None = None) -> None:
        if new:
            self._pieces.put_nowait(new)
        if ended and not self._done.done():
            self._done.set_result(None) if error is None else self._done.set_exception(error)
            self._pieces.put_nowait(None)


class AsyncLLM:
    """An LLM whose requests are submitted from coroutines: `AsyncLLM(LLM(...))`, or the arguments of LLM. Use it as an async
    context manager, or call `close`."""

    def __init__(self, llm: LLM | str = "demo", **settings: Any):
        self.llm = llm if isinstance(llm, LLM) else LLM(llm, **settings)
        self._inbox: queue.SimpleQueue[Callable[[bool], None] | None] = queue.SimpleQueue()  # each is told whether it is served
        self._open: dict[int, Stream] = {}  # by id of a sequence
        self._lock, self._over = threading.Lock(), False
        self._broken: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def submit(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Queues a request and returns at once. Raises UserError for what cannot be served."""
        ((ids, chosen),) = self.llm.checked([prompt], params)
        loop = asyncio.get_running_loop()
        placed: asyncio.Future[Stream] = loop.create_future()

        def place(served: bool) -> None:
            if not served:
                loop.call_soon_threadsafe(lambda: placed.done() or placed.set_exception(self._refusal()))
                return
            stream = Stream(self.llm.submit(ids, chosen), loop)
            self._open |= {id(seq): stream for seq in stream.sequences}
            loop.call_soon_threadsafe(lambda: placed.done() or placed.set_result(stream))

        self._send(place)
        return await placed

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncIterator[str]:
        """Yields the text of one completion piece by piece; a reader that leaves aborts it."""
        request = await self.submit(prompt, params)
        try:
            async for piece in request:
                yield piece
        finally:
            self.abort(request)

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput:
        """Completes one prompt; cancelling the caller aborts it."""
        request = await self.submit(prompt, params)
        try:
            return await request.result()
        finally:
            self.abort(request)

    def abort(self, request: Stream) -> None:
        """Ends a request, wherever it is, with finish_reason "abort"; nothing if it has ended."""

        def end(served: bool) -> None:
            if served:
                self._end(request)

        if not request._done.done():
            with contextlib.suppress(UserError):  # an engine that has stopped has ended it
                self._send(end)

    async def rebalance(self) -> None:
        """LLM.rebalance, between two steps of what is being served. Raises UserError as that does."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def move(served: bool) -> None:
            try:
                if not served:
                    raise self._refusal()
                self.llm.rebalance()
            except BaseException as error:
                loop.call_soon_threadsafe(done.set_exception, error)
            else:
                loop.call_soon_threadsafe(done.set_result, None)

        self._send(move)
        await done

    async def close(self) -> None:
        """Ends all requests, then the thread."""
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    def _send(self, call: Callable[[bool], None]) -> None:
        with self._lock:
            if self._over:
                raise self._refusal()
            self._inbox.put(call)

    def _refusal(self) -> UserError:
        return UserError("AsyncLLM: is closed" if self._broken is None else f"AsyncLLM: the engine has stopped: {self._broken}")

    def _run(self) -> None:
        """The engine's thread: what was asked for, then a step, for as long as there is work."""
        try:
            while self._serve_inbox():
                if self.llm.engine.busy:
                    self._deliver(self.llm.engine.step(watched=True))
            for stream in set(self._open.values()):
                self._end(stream)
        except BaseException as error:  # told to everyone who waits
            self._broken = error
            for stream in set(self._open.values()):
                stream.fail(error)
        with self._lock:
            self._over = True
        with contextlib.suppress(queue.Empty):
            while True:
                if (call := self._inbox.get_nowait()) is not None:
                    call(False)

    def _serve_inbox(self) -> bool:
        """Does what was asked for; waits for something where there is no other work. False: close."""
        wait = not self.llm.engine.busy
        with contextlib.suppress(queue.Empty):
            while True:
                call = self._inbox.get(block=wait)
                if call is None:
                    return False
                call(True)
                wait = False
        return True

    def _deliver(self, sequences: list[Sequence]) -> None:
        for stream in {self._open[id(seq)] for seq in sequences if id(seq) in self._open}:
            if stream.advance():
                for seq in stream.sequences:
                    del self._open[id(seq)]

    def _end(self, stream: Stream) -> None:
        for seq in stream.sequences:
            self.llm.engine.abort(seq)
        self._deliver(stream.sequences)
