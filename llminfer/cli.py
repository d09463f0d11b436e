"""What the commands share: the model's options, JSON on the last line, and one clear line for a user's mistake."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from llminfer.config import EngineConfig, parse_setting
from llminfer.errors import UserError, refuse

_loaded: list[Any] = []  # the model of the command that runs, for `leave`


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake, instead of the usage before it."""
        raise UserError(f"{message} (--help lists the options)")


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """An argument parser with the options that every command on a model has."""
    made = Parser(prog=f"python -m llminfer.{command}", description=description)
    made.add_argument(
        "--model",
        default="demo",
        help="demo, a directory, a .gguf file, a Hugging Face id, or config:NAME (default: demo)",
    )
    made.add_argument("--quantize", default=None, help="int8, fp8, int4, mxfp4, mxfp4_experts, or w8a8 and w8a8_fp8 (tokens in 8 bits too)")
    axes = "dp replicas, pp stages of layers, ep experts, sp pages of a context, tp heads and columns"
    made.add_argument("--mesh", default="", help=f"devices of each axis, such as dp=2,tp=4: {axes}")
    made.add_argument("--seed", type=int, default=None, help="of sampling, and of the weights of config: models")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a field of the engine's settings")
    made.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    return made


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Engine settings from the options; checked here, before jax is imported. Raises UserError."""
    chosen = dict(parse_setting(text) for text in arguments.set)
    if arguments.quantize is not None:
        chosen["quantize"] = arguments.quantize
    if arguments.mesh:
        chosen["mesh"] = arguments.mesh
    if arguments.seed is not None:
        chosen["seed"] = arguments.seed
    if getattr(arguments, "speculate", None) is not None:
        chosen["speculate"] = arguments.speculate
    EngineConfig.from_settings(chosen)
    return chosen


def main(body: Callable[[list[str]], int], arguments: list[str] | None = None) -> int:
    """Runs a command; a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    # XLA's C++ side reports what is of no use to the user of a command.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        return body(sys.argv[1:] if arguments is None else arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read us has left
        return 141


def leave(code: int) -> None:
    """Ends the process without waiting for programs that are still being compiled."""
    for llm in _loaded:
        llm.engine.end_profile()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def load(arguments: argparse.Namespace, expect: Any = None) -> Any:
    """The LLM that the options describe, with progress on a terminal; expect: see LLM."""
    chosen = settings(arguments)
    from llminfer.api import LLM
    from llminfer.progress import RichProgress

    with RichProgress() as progress:
        llm = LLM(arguments.model, expect=expect, progress=progress, **chosen)
        _loaded[:] = [llm]
        llm.engine.programs.wait_first()  # nothing can be served before, and the bars end with this block
        return llm


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def positive(text: str, name: str) -> int:
    """An integer option >= 1. Raises UserError."""
    try:
        number = int(text)
    except ValueError:
        raise refuse(name, text, "must be an integer") from None
    if number < 1:
        raise refuse(name, number, "must be an integer >= 1")
    return number
