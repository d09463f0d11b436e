"""Models on the Hugging Face hub, by id: only the files that a model is read from, of one commit, through the hub's own cache."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llminfer.errors import UserError, refuse
from llminfer.progress import Progress, Task, start

# org/name, or org/name@revision: a branch, a tag or a commit.
ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
# What a tokenizer is read from, and the end tokens.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)
# No code and no pickles. The pattern of shards leaves out other forms of the same weights ("consolidated", "original/", "onnx/").
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
FILES = ("config.json", *TOKENIZER_FILES, *WEIGHT_FILES)
TIMEOUT = 10.0  # seconds without an answer after which the hub counts as out of reach


def is_id(model: str) -> bool:
    return ID.fullmatch(model) is not None


def fetch(model: str, check: Callable[[Path], Any], progress: Progress | None = None) -> tuple[Path, str]:
    """The folder with a model's files, and its name with the commit: "org/name@sha". `check` is called with the folder when it has
    config.json: what it refuses is not downloaded.

    The revision is looked up once, and everything is of that commit. What is in the hub's cache is not downloaded again, and where the
    hub cannot be reached it is used as it is. Raises UserError: no network, no such repository or revision, no access, no safetensors."""
    from huggingface_hub import snapshot_download

    found = ID.fullmatch(model)
    if found is None:
        raise refuse("model", model, "must be org/name or org/name@revision")
    repo, revision = found.groups()
    sizes, unreached = _listing(model, repo, revision)
    if sizes is not None:
        _check_files(model, list(sizes))
    get = functools.partial(snapshot_download, repo, local_files_only=sizes is None)
    task = start(progress, f"Downloading {repo}", sum(sizes.values()) if sizes else None)
    try:
        folder = Path(get(revision=revision, allow_patterns=["config.json"], tqdm_class=_bars(None)))
        check(folder)
        folder = Path(get(revision=folder.name, allow_patterns=list(FILES), tqdm_class=_bars(task)))
    except UserError:
        raise
    except Exception as error:
        raise _refusal(model, repo, revision, unreached or error) from None
    task.done()
    return folder, f"{repo}@{folder.name}"


def _listing(model: str, repo: str, revision: str | None) -> tuple[dict[str, int] | None, Exception | None]:
    """(file -> bytes of what we would download, and 0 of other files; None), or (None, why the hub does not say). One attempt: the
    library's own downloads try for half a minute. Raises UserError where the hub says that there is nothing."""
    from huggingface_hub import HfApi, errors

    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise _refusal(model, repo, revision, error) from None
    except Exception as error:  # of one of several HTTP libraries, by version
        return None, error
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return {name: size if any(fnmatch.fnmatch(name, pattern) for pattern in FILES) else 0 for name, size in sizes.items()}, None


def _check_files(model: str, names: list[str]) -> None:
    """Refuses a repository without the files that we need, before anything is downloaded."""
    if "config.json" in names and any(fnmatch.fnmatch(name, pattern) for name in names for pattern in WEIGHT_FILES):
        return
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        shown = ", ".join(ggufs[:5]) + (f" and {len(ggufs) - 5} more" if len(ggufs) > 5 else "")
        raise refuse("model", model, f"the repository has GGUF files and no safetensors; download one and give its path: {shown}")
    raise refuse("model", model, f"the repository has no config.json with safetensors; there is: {', '.join(names[:8]) or 'nothing'}")


def _refusal(model: str, repo: str, revision: str | None, error: Exception) -> UserError:
    """What an error of huggingface_hub means, in one line."""
    from huggingface_hub import errors

    reason = " ".join(str(error).split())[:160]
    if isinstance(error, errors.GatedRepoError):
        rule = f"its license must be accepted first, at huggingface.co/{repo}, and a token given (hf auth login)"
    elif isinstance(error, errors.RevisionNotFoundError):
        rule = f"the repository has no revision {revision or 'main'}; legal: a branch, a tag or a commit"
    elif isinstance(error, errors.RepositoryNotFoundError):
        rule = "there is no such path and no such repository on the Hugging Face hub; a private one needs a token (hf auth login)"
    elif isinstance(error, errors.HFValidationError):
        rule = f"there is no such path, and it is no id of the Hugging Face hub ({reason})"
    elif isinstance(error, OSError) and error.errno is not None:
        rule = f"it cannot be stored in the cache of the Hugging Face hub ({error.strerror})"
    else:
        rule = f"there is no such path, it is not in the cache of the Hugging Face hub, and the hub cannot be reached ({reason})"
    return refuse("model", model, rule)


def _bars(task: Task | None) -> Any:
    """A class of progress bars for huggingface_hub that shows none and hands the downloaded bytes to `task`."""
    from tqdm.auto import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            # Newer versions count what comes over the network besides, which deduplication makes less.
            self._counts = options.get("unit") == "B" and options.get("desc") != "Downloading bytes"
            options.pop("name", None)
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if task is not None and self._counts and n:
                task.advance(n)
            return super().update(n)

    return Bar
