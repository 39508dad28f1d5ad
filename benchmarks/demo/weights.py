"""Three ways to get a model's weights into a server, and the model built from each.

Owns the download as a server does it today, and the building of a model either by its library from
a directory or around tensors that are already in memory. Every path ends in the same computation,
which the demo compares to the last bit. Knows nothing of HTTP serving, measures nothing.
"""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Way = Literal["download", "path", "handoff"]
WAYS: tuple[Way, ...] = ("download", "path", "handoff")

# The same attention code for every way of loading, so that results can be equal to the last bit.
ATTENTION = "sdpa"
DOWNLOAD_TIMEOUT_S = 60
MOST_LISTED_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the files are, the tensors if they came in memory, and what lives as long as they are used."""

    directory: Path
    tensors: Mapping[str, torch.Tensor] | None
    lease: object


def fetch(way: Way, ref: str, downloads: Path) -> Weights:
    """Get the weights of ``ref``. Raises OSError for a failed download, CachedError from the client."""
    if way == "download":
        return Weights(download(ref, downloads), None, None)
    import cached  # here, so that what it costs to import is counted against it

    model = cached.acquire(ref, on="disk" if way == "path" else "host")
    return Weights(Path(model.path), model.tensors if way == "handoff" else None, model)


def download(ref: str, directory: Path) -> Path:
    """Download every file that ``ref`` lists, one after the other, unproven: as servers do it today."""
    # No proxy: the origin is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(ref + "SHA256SUMS", timeout=DOWNLOAD_TIMEOUT_S) as response:
        listing = response.read(MOST_LISTED_BYTES).decode()
    for line in listing.splitlines():
        path = line.split("  ", 1)[1]
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with opener.open(ref + path, timeout=DOWNLOAD_TIMEOUT_S) as response, target.open("wb") as file:
            shutil.copyfileobj(response, file, 1024 * 1024)
    return directory


def model_class(directory: Path) -> Any:
    """The library's class that the checkpoint's configuration names."""
    import transformers

    (name,) = json.loads((directory / "config.json").read_text())["architectures"]
    return getattr(transformers, name)


def build(weights: Weights) -> Any:
    """The model, ready to compute: around ``weights.tensors`` where there are any, else by its library."""
    if weights.tensors is None:
        return from_directory(weights.directory)
    return from_tensors(weights.directory, weights.tensors)


def from_directory(directory: Path) -> Any:
    """What every server does today: the library opens the files."""
    return (
        model_class(directory)
        .from_pretrained(directory, local_files_only=True, attn_implementation=ATTENTION)
        .eval()
    )


def from_tensors(directory: Path, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The model around ``tensors``, of which none is copied. Raises ValueError when they are not its own.

    Built on the meta device, a model has shapes and no memory. The checkpoint's tensors become its
    parameters; what no checkpoint holds is then made as the library makes it: tied weights, and the
    buffers that are computed from the configuration.
    """
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, local_files_only=True, attn_implementation=ATTENTION)
    dtype = config.dtype or torch.get_default_dtype()
    with torch.device("meta"):
        model = model_class(directory)._from_config(config, dtype=dtype)
    model.load_state_dict(known(model, tensors), strict=False, assign=True)
    model.tie_weights()
    compute_buffers(model)
    empty = [name for name, tensor in everything(model) if tensor.is_meta]
    if empty:
        raise ValueError(f"the checkpoint in {directory} lacks {', '.join(empty[:5])} ({len(empty)} in all)")
    return model.eval()


def known(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``tensors`` without those that older checkpoints hold and the model computes by itself."""
    computed = {name for name, _ in model.named_non_persistent_buffers()}
    own = {name: tensor for name, tensor in tensors.items() if name not in computed}
    unknown = own.keys() - model.state_dict().keys()
    if unknown:
        raise ValueError(
            f"the model has no place for {', '.join(sorted(unknown)[:5])} ({len(unknown)} in all)"
        )
    return own


def compute_buffers(model: Any) -> None:
    """Fill the buffers that no checkpoint holds (rotary frequencies, position ids) from the configuration."""
    import torch

    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, torch.empty_like(buffer, device="cpu"))
    # The library initialises whatever does not bear this mark; the weights must stay as they are.
    for _, parameter in everything(model, buffers=False):
        parameter._is_hf_initialized = True
    model.initialize_weights()


def everything(model: Any, buffers: bool = True) -> list[tuple[str, Any]]:
    """Every parameter, and with ``buffers`` every buffer, by name."""
    return [*model.named_parameters(), *(model.named_buffers() if buffers else ())]
