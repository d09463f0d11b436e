"""llminfer: large language model inference as a small set of XLA programs.

    from llminfer import LLM, SamplingParams
    llm = LLM("demo")
    print(llm.generate("The capital of France is", SamplingParams(max_tokens=16))[0].text)

Names are imported on first use, so that a command can check its arguments before jax is loaded.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llminfer.api import LLM
    from llminfer.async_api import AsyncLLM
    from llminfer.errors import UserError
    from llminfer.request import Completion, RequestOutput, SamplingParams

__all__ = ["LLM", "AsyncLLM", "Completion", "RequestOutput", "SamplingParams", "UserError"]
__version__ = "0.1.0"
_HOMES = {
    **{"LLM": "api", "AsyncLLM": "async_api", "UserError": "errors"},
    **{"SamplingParams": "request", "RequestOutput": "request", "Completion": "request"},
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'llminfer' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"llminfer.{_HOMES[name]}"), name)
