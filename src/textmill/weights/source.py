"""Where a model comes from: the embedded default, a local folder or file, or the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from textmill.errors import ModelError
from textmill.weights import embedded
from textmill.weights.progress import Progress, TerminalProgress

Kind = Literal["gguf", "safetensors", "torch"]

_ONLY_BIN = ".bin weights, but no pytorch_model.bin; convert them to safetensors"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this disk. `path` is a .gguf file or a folder; `revision` is the hub's commit, else ""."""

    model_id: str
    path: Path
    kind: Kind
    revision: str


def resolve(
    model_id: str | None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> ModelSource:
    """Finds the model, fetching it first if need be. None is the embedded default; `cache_dir` is the hub's cache.

    Progress goes to standard error unless `progress` takes it. Raises ModelError with one line to act on.
    """
    if model_id is None or (model_id == embedded.NAME and not Path(model_id).exists()):
        with TerminalProgress() if progress is None else nullcontext(progress) as shown:
            return ModelSource(embedded.NAME, embedded.ensure(shown), "gguf", "")
    path = Path(model_id).expanduser()
    if path.exists():
        return _local(model_id, path)
    if model_id.startswith(("/", ".", "~")) or model_id.endswith(".gguf"):
        raise ModelError(f"{model_id}: there is no such file or folder")
    return _from_hub(model_id, revision, cache_dir)


def _local(model_id: str, path: Path) -> ModelSource:
    path = path.resolve()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{path}: a model is a folder or a .gguf file")
        return ModelSource(model_id, path, "gguf", "")
    kind, file = _pick(str(path), [item.name for item in path.iterdir()])
    return ModelSource(model_id, path / file if file else path, kind, "")


def _pick(where: str, names: Sequence[str]) -> tuple[Kind, str | None]:
    """Which of a folder's files are the model: safetensors, the only .gguf file (then with its name), PyTorch's own."""
    if any(name.endswith(".safetensors") for name in names):
        if "config.json" not in names:
            raise ModelError(f"{where}: there is no config.json beside the safetensors files")
        return "safetensors", None
    files = sorted(name for name in names if name.endswith(".gguf"))
    if len(files) == 1:
        return "gguf", files[0]
    if files:
        raise ModelError(f"{where}: several .gguf files; name one of them by its path: {', '.join(files)}")
    if "config.json" in names and any(_is_torch(name) for name in names):
        return "torch", None
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        raise ModelError(f"{where}: {_ONLY_BIN}")
    raise ModelError(f"{where}: there is no model here (no safetensors, no .gguf file)")


def _is_torch(name: str) -> bool:
    """Weights in PyTorch's own format; other .bin files beside them hold what training left."""
    return name.startswith("pytorch_model") and name.endswith(".bin")


def _from_hub(model_id: str, revision: str | None, cache_dir: str | Path | None) -> ModelSource:
    """Through huggingface_hub, with its cache, token, offline switch and progress bars."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        try:
            wanted = _wanted(model_id, _hub_names(model_id, revision))
            folder = snapshot_download(model_id, revision=revision, cache_dir=cache_dir, allow_patterns=wanted)
        except (OfflineModeIsEnabled, ConnectionError):
            names = _cached_names(model_id, revision, cache_dir)
            cached = None if names is None else _wanted(model_id, names)
            folder = snapshot_download(
                model_id, revision=revision, cache_dir=cache_dir, allow_patterns=cached, local_files_only=True
            )
    except HFValidationError as error:
        raise ModelError(f"{model_id}: neither a file or folder here nor the name of a hub model") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{model_id}: not (or not wholly) in the local cache, and the hub cannot be reached"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{model_id}: cannot be fetched from the hub: {_first_line(error)}") from error
    path = Path(folder)
    kind, file = _pick(model_id, [item.name for item in path.iterdir()])
    return ModelSource(model_id, path / file if file else path, kind, path.name)


def _hub_names(model_id: str, revision: str | None) -> list[str]:
    """The files at the top of a hub repository; ConnectionError if the hub is not to be asked or does not answer."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("HF_HUB_OFFLINE is set")
    try:
        siblings = HfApi().model_info(model_id, revision=revision).siblings or []
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception as error:  # fault boundary: its HTTP library, and with it their class, changed between releases
        raise ConnectionError(f"the hub cannot be reached: {error}") from error
    return [item.rfilename for item in siblings if "/" not in item.rfilename]


def _cached_names(model_id: str, revision: str | None, cache_dir: str | Path | None) -> list[str] | None:
    """The same from the local cache, so that an interrupted download is noticed; None if it does not know."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # the oldest release that we accept keeps no list
        return None
    try:
        found = get_cached_repo_tree(model_id, revision=revision, cache_dir=cache_dir)
    except CachedRepoTreeNotFoundError:
        return None
    return [item.path for item in found if "/" not in item.path]


def _wanted(model_id: str, names: list[str]) -> list[str]:
    """The files to fetch: the weights that `_pick` chooses, configuration, tokenizer, templates."""
    kind, file = _pick(model_id, names)
    around = [name for name in names if name.endswith((".json", ".jinja", ".txt", ".model", ".py"))]
    if kind == "gguf":
        return [*around, str(file)]
    if kind == "torch":
        return [*around, *filter(_is_torch, names)]
    weights = [name for name in names if name.endswith(".safetensors")]
    # Some repositories hold the same weights twice, once in their makers' own layout.
    named = [name for name in weights if name.startswith("model")]
    return [*around, *(named or weights)]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
