"""A file of requests: one JSON object a line in, one result a line out as soon as it is there. An interrupted run goes on where it was.

A result carries the number of its line and a digest of the line and of the command's sampling parameters: a result file is taken up
again only where both fit, and what a kill cut off in the middle of a line is computed again. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llminfer.errors import UserError, refuse
from llminfer.progress import Progress, start
from llminfer.request import SamplingParams

# Requests that are queued beside those in slots: enough that no slot stays empty.
QUEUED = 4


def open_batch(source: str, out: str, params: SamplingParams, *, raw: bool) -> BatchFile:
    """Checks both files before a model is loaded. Raises UserError that names the file and line."""
    lines = _read_lines(Path(source))
    common = json.dumps([dataclasses.asdict(params), raw], sort_keys=True)
    digests = [hashlib.sha256(f"{common}\n{json.dumps(item, sort_keys=True)}".encode()).hexdigest()[:16] for item in lines]
    done, whole = _read_results(Path(out), digests)
    return BatchFile(lines, digests, Path(out), whole, params, raw, {result["index"] for result in done}, sum("error" in r for r in done))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for number, line in enumerate(_text(path, "--batch").splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{path} line {number}: not JSON: {error}") from None
        if not isinstance(item, dict) or ("prompt" in item) == ("messages" in item):
            raise UserError(f"{path} line {number}: must be an object with either prompt or messages")
        lines.append(item)
    return lines


def _read_results(path: Path, digests: list[str]) -> tuple[list[dict[str, Any]], int]:
    """The results that are there already, and how many bytes of the file they fill."""
    if not path.exists():
        return [], 0
    text = _text(path, "--out")
    whole = text[: text.rfind("\n") + 1]
    found = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            result = json.loads(line)
            index = result["index"]
            fits = type(index) is int and 0 <= index < len(digests) and result["digest"] == digests[index]
        except (json.JSONDecodeError, RecursionError, KeyError, TypeError):
            fits, result, index = False, {}, -1
        if not fits:
            raise refuse("--out", str(path), f"line {number} is no result of this input with these parameters; remove it or name another")
        found[index] = result
    return list(found.values()), len(whole.encode())


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise refuse(option, str(path), f"cannot be read: {error}") from None


@dataclasses.dataclass
class BatchFile:
    """What is to be done. whole: bytes of `out` that hold results; done: indices of their lines; failed: lines that were refused."""

    lines: list[dict[str, Any]]
    digests: list[str]
    out: Path
    whole: int
    params: SamplingParams
    raw: bool
    done: set[int]
    failed: int = 0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.resumed = len(self.done)

    @property
    def todo(self) -> int:
        return len(self.lines) - len(self.done)

    def summary(self) -> dict[str, Any]:
        return {"requests": len(self.lines), "resumed": self.resumed, "failed": self.failed, "completion_tokens": self.tokens}

    def run(self, llm: Any, progress: Progress | None = None) -> None:
        """Serves what is left. A line that cannot be served becomes a result with an error; the others go on."""
        task = start(progress, "generate", self.todo)
        with self.out.open("ab") as file:
            file.truncate(self.whole)
            for index, result in self._results(llm):
                given = {"id": self.lines[index]["id"]} if "id" in self.lines[index] else {}
                head = {"index": index, "digest": self.digests[index]} | given
                file.write((json.dumps(head | result, ensure_ascii=False) + "\n").encode())
                file.flush()
                self.done.add(index)
                task.advance(1)
            os.fsync(file.fileno())
        task.done()

    def _results(self, llm: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        left = iter([index for index in range(len(self.lines)) if index not in self.done])
        under_way: dict[int, tuple[int, list[Any]]] = {}
        more = True
        while more or llm.engine.busy:
            while more and llm.engine.queued < QUEUED * llm.settings.slots:
                index = next(left, None)
                if index is None:
                    more = False
                    break
                try:
                    sequences = self._submit(llm, self.lines[index])
                except UserError as error:
                    self.failed += 1
                    yield index, {"error": str(error)}
                    continue
                under_way |= {id(seq): (index, sequences) for seq in sequences}
            for seq in llm.engine.step():
                # Samples that end in one step are told of once, with the first of them.
                index, sequences = under_way.get(id(seq), (-1, []))
                if sequences and all(s.finish is not None for s in sequences):
                    for each in sequences:
                        del under_way[id(each)]
                    yield index, self._result(llm.output(sequences))

    def _submit(self, llm: Any, item: dict[str, Any]) -> list[Any]:
        given = {key: value for key, value in item.items() if key not in ("prompt", "messages", "id")}
        chosen = SamplingParams.from_fields({f.name: getattr(self.params, f.name) for f in dataclasses.fields(self.params)} | given)
        if "messages" in item:
            ids = llm.chat_prompt(item["messages"])
        else:
            ids = llm.user_turn(item["prompt"], raw=self.raw) if isinstance(item["prompt"], str) else llm.encode(item["prompt"])
        if chosen.stop:
            llm.encode("")  # refuses stop strings where there is no tokenizer
        return llm.submit(llm.engine.check(ids, chosen), chosen)

    def _result(self, output: Any) -> dict[str, Any]:
        self.tokens += sum(len(o.token_ids) for o in output.outputs)
        return {
            "text": output.text,
            "token_ids": output.token_ids,
            "finish_reason": output.finish_reason,
            "prompt_tokens": output.metrics.prompt_tokens,
            "completion_tokens": output.metrics.completion_tokens,
            "seed": output.outputs[0].seed,
            **({"samples": [o.text for o in output.outputs]} if len(output.outputs) > 1 else {}),
            **{name: told for name in ("logprobs", "prompt_logprobs") if (told := getattr(output, name)) is not None},
        }
