"""Tensors over mapped files: every dtype, every odd shape, and what torch cannot hold."""

from __future__ import annotations

import itertools
import mmap
from pathlib import Path

import pytest
import torch

from cached.client.errors import CachedError
from cached.client.files import Files
from cached.client.handoff import File, Index, Place
from cached.client.pages import Pages, map_blob
from cached.client.tensors import DTYPES, Tensors

CONTENT = bytes(range(256)) * 16
START = 64


def over(folder: Path, *places: Place, content: bytes = CONTENT, private: tuple[str, ...] = ()) -> Tensors:
    """Tensors at these places of one file."""
    (folder / "file").write_bytes(content)
    index = index_of(*places)
    return Tensors(index, Pages(Files(index.files, folder)), private)


def index_of(*places: Place) -> Index:
    return Index("sha256:x", "ref", "revision", True, (File("file", len(CONTENT), "digest"),), places)


def is_copy(tensors: Tensors, name: str) -> bool:
    """Whether a write through one access is not seen by the next one."""
    tensors[name].view(-1).view(torch.uint8)[0] = 99
    return int(tensors[name].view(-1).view(torch.uint8)[0]) != 99


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "F4"])
def test_every_dtype_is_wrapped_bit_by_bit(tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, DTYPES[name])
    size = 6 * dtype.itemsize
    content = bytearray(CONTENT)
    if name == "BOOL":
        content[START : START + 6] = b"\1\0\1\1\0\0"
    tensors = over(tmp_path, Place("t", name, (2, 3), 0, START, size), content=bytes(content))
    tensor = tensors["t"]
    assert tensor.dtype == dtype and tensor.shape == (2, 3) and tensor.is_contiguous()
    assert bytes(tensor.view(-1).view(torch.uint8).tolist()) == content[START : START + size]
    assert tensor.data_ptr() % mmap.PAGESIZE == START
    if name == "BOOL":
        assert tensor.tolist() == [[True, False, True], [True, False, False]]
    assert not is_copy(tensors, "t")


def test_half_byte_elements_count_as_torch_counts_them(tmp_path: Path) -> None:
    # In the file's header shapes are in elements; torch's dtype is a pair of them.
    tensor = over(tmp_path, Place("t", "F4", (3, 8), 0, START, 12))["t"]
    assert tensor.dtype == torch.float4_e2m1fn_x2 and tensor.shape == (3, 4)
    assert tensor.view(torch.uint8).view(-1).tolist() == list(range(START, START + 12))


def test_a_scalar_has_no_dimension(tmp_path: Path) -> None:
    tensor = over(tmp_path, Place("t", "I16", (), 0, START, 2))["t"]
    assert tensor.shape == () and tensor.item() == START + 256 * (START + 1)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 7, 2)])
def test_nothing_has_its_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensor = over(tmp_path, Place("t", "BF16", shape, 0, len(CONTENT), 0))["t"]
    assert tensor.shape == shape and tensor.dtype == torch.bfloat16 and tensor.numel() == 0


def test_a_file_of_nothing_is_not_mapped(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as file:
        assert map_blob(file.fileno(), 0, "empty") is None


@pytest.mark.parametrize("offset", [1, 3, 65, 4095 - 8])
def test_what_does_not_fit_its_alignment_is_copied(tmp_path: Path, offset: int) -> None:
    tensors = over(tmp_path, Place("t", "F64", (1,), 0, offset, 8), Place("b", "U8", (8,), 0, offset, 8))
    assert bytes(tensors["t"].view(torch.uint8).tolist()) == CONTENT[offset : offset + 8]
    assert tensors["t"].data_ptr() % 8 == 0
    assert is_copy(tensors, "t")
    assert not is_copy(tensors, "b"), "bytes fit everywhere"


def test_the_last_bytes_of_a_file_are_reached_and_none_beyond(tmp_path: Path) -> None:
    end = len(CONTENT)
    tensors = over(
        tmp_path, Place("last", "I32", (1,), 0, end - 4, 4), Place("past", "I32", (2,), 0, end - 4, 8)
    )
    assert bytes(tensors["last"].view(torch.uint8).tolist()) == CONTENT[-4:]
    with pytest.raises(ValueError):
        tensors["past"]


@pytest.mark.parametrize("dtype", ["F6_E2M3", "X"])
def test_what_torch_cannot_hold_is_named_and_the_rest_is_there(tmp_path: Path, dtype: str) -> None:
    tensors = over(tmp_path, Place("odd", dtype, (4,), 0, 0, 3), Place("even", "U8", (4,), 0, 0, 4))
    with pytest.raises(CachedError, match=rf"'odd'.*{dtype}") as caught:
        tensors["odd"]
    assert caught.value.reason == "UNKNOWN_DTYPE"
    assert tensors["even"].tolist() == [0, 1, 2, 3]


def test_the_mapping_keeps_the_indexs_order(tmp_path: Path) -> None:
    names = ["z", "a", "m"]
    tensors = over(tmp_path, *(Place(name, "U8", (1,), 0, 0, 1) for name in names))
    assert list(tensors) == names and len(tensors) == 3 and "a" in tensors and "b" not in tensors
    assert "3 tensors" in repr(tensors)


def test_a_part_is_what_narrow_gives_and_no_more_is_kept(tmp_path: Path) -> None:
    tensors = over(
        tmp_path, Place("t", "I16", (4, 6, 5), 0, START, 240), Place("h", "F4", (3, 8), 0, START, 12)
    )
    for dim, start, stop in [(0, 1, 3), (-3, 3, 4), (1, 2, 6), (2, 1, 2), (-1, 0, 5), (0, 2, 2), (1, 0, 0)]:
        part = tensors.slice("t", dim, start, stop)
        assert torch.equal(part, tensors["t"].narrow(dim, start, stop - start)) and part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.nbytes or not part.numel()
    rows = tensors.slice("t", 0, 1, 2)
    rows.zero_()
    assert not tensors["t"][1].any(), "the first dimension's is a view"
    half = tensors.slice("h", 1, 1, 3).view(torch.uint8)
    assert half.tolist() == tensors["h"].view(torch.uint8)[:, 1:3].tolist()
    for dim, start, stop in [(3, 0, 1), (0, 0, 5), (0, 3, 2), (0, -1, 2)]:
        with pytest.raises(IndexError, match="shape"):
            tensors.slice("t", dim, start, stop)


def test_what_is_private_is_copied_by_its_name(tmp_path: Path) -> None:
    places = [Place(name, "U8", (8,), 0, START, 8) for name in ("a.scale", "b.scale", "a.weight")]
    tensors = over(tmp_path, *places, private=("*.scale", "x"))
    assert is_copy(tensors, "a.scale") and is_copy(tensors, "b.scale")
    tensors.state_dict()["a.scale"].zero_()
    assert tensors["a.weight"].tolist() == list(CONTENT[START : START + 8])
    assert not is_copy(tensors, "a.weight")


def test_every_combination_of_small_offsets_is_right(tmp_path: Path) -> None:
    spots = list(itertools.product(["U8", "I16", "F32", "I64", "C64"], range(9)))
    places = [Place(f"{d}@{o}", d, (2,), 0, o, 2 * getattr(torch, DTYPES[d]).itemsize) for d, o in spots]
    tensors = over(tmp_path, *places)
    for place in places:
        got = bytes(tensors[place.name].view(torch.uint8).tolist())
        assert got == CONTENT[place.offset_bytes : place.offset_bytes + place.size_bytes], place.name
