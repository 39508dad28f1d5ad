"""The header parser: what it takes, and that every broken rule is refused by name and with both values."""

from __future__ import annotations

import json
from typing import Any

import numpy
import pytest
from safetensors.numpy import save

from cached.model import CachedError, ErrorKind, Tensor
from cached.safetensors import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    MAX_VALUES,
    header_bytes,
    parse_header,
)


def pack(entries: Any) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(start: int, stop: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [stop - start] if shape is None else shape,
        "data_offsets": [start, stop],
    }


def refusal(header: bytes, buffer_bytes: int) -> str:
    with pytest.raises(CachedError) as caught:
        parse_header(header, len(header) + buffer_bytes, "model-1.safetensors")
    problem = caught.value.problem
    assert problem.kind is ErrorKind.DATA_LOSS
    assert problem.reason == "BAD_SAFETENSORS"
    assert not problem.temporary
    assert "model-1.safetensors" in problem.message
    return problem.message


def test_tensors_come_in_the_order_of_their_bytes_with_offsets_into_the_file() -> None:
    header = pack({"b": entry(8, 12, "F32", [1]), "__metadata__": {"format": "pt"}, "a": entry(0, 8)})
    start = len(header)
    assert parse_header(header, start + 12, file=3) == (
        Tensor("a", "U8", (8,), 3, start, 8),
        Tensor("b", "F32", (1,), 3, start + 8, 4),
    )


def test_scalars_and_empty_tensors_are_tensors() -> None:
    header = pack({"empty": entry(0, 0, "F32", [0, 5]), "scalar": entry(0, 2, "BF16", [])})
    names = [tensor.name for tensor in parse_header(header, len(header) + 2)]
    assert names == ["empty", "scalar"]


def test_a_header_may_be_padded_and_may_hold_no_tensor() -> None:
    header = pack(b'{"__metadata__":{}}     ')
    assert parse_header(header, len(header)) == ()


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_the_format_is_known(dtype: str) -> None:
    size_bytes = 24 * DTYPE_BITS[dtype] // 8
    header = pack({"t": entry(0, size_bytes, dtype, [4, 6])})
    assert parse_header(header, len(header) + size_bytes)[0].size_bytes == size_bytes


def test_what_the_reference_implementation_writes_is_read_alike() -> None:
    arrays = {"x": numpy.arange(6, dtype="float32").reshape(2, 3), "y": numpy.ones((3,), dtype="int64")}
    data = save(arrays)
    tensors = {tensor.name: tensor for tensor in parse_header(data, len(data))}
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        tensor = tensors[name]
        assert tensor.shape == array.shape
        assert data[tensor.offset_bytes :][: tensor.size_bytes] == array.tobytes()


def test_a_file_shorter_than_its_tensors_is_refused() -> None:
    message = refusal(pack({"w": entry(0, 100)}), 60)
    header = len(pack({"w": entry(0, 100)}))
    assert "'w'" in message and str(header + 100) in message and str(header + 60) in message


def test_bytes_after_the_last_tensor_are_refused() -> None:
    assert "'w'" in refusal(pack({"w": entry(0, 100)}), 101)


def test_a_gap_and_an_overlap_are_refused() -> None:
    assert "'b' leaves a gap" in refusal(pack({"a": entry(0, 4), "b": entry(5, 9)}), 9)
    assert "'b' overlaps" in refusal(pack({"a": entry(0, 4), "b": entry(3, 9)}), 9)
    assert "'a' leaves a gap" in refusal(pack({"a": entry(1, 4)}), 4)


def test_a_size_that_is_not_dtype_times_shape_is_refused_with_both() -> None:
    message = refusal(pack({"w": entry(0, 10, "F32", [2, 2])}), 10)
    assert "'w' takes 10 bytes" in message and "needs 16" in message


def test_shapes_larger_than_any_file_are_refused_without_overflow() -> None:
    assert "'w' takes 0 bytes" in refusal(pack({"w": entry(0, 0, "F64", [2**62, 2**62])}), 0)
    assert "is no size" in refusal(pack({"w": entry(0, 0, "F64", [2**64])}), 0)
    assert "at most 64" in refusal(pack({"w": entry(0, 1, "U8", [1] * 65)}), 1)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}, "unknown dtype 'F33'"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "unknown dtype"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "'-1'"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "'True'"),
        ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, "'1.0'"),
        ({"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}, "shape is not a list"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "[4, 0]"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}, "[0, 4, 8]"),
        ({"dtype": "F32", "shape": [1]}, "exactly dtype, shape and data_offsets"),
        ("F32", "exactly dtype, shape and data_offsets"),
    ],
)
def test_a_malformed_entry_is_refused_by_its_tensors_name(broken: Any, said: str) -> None:
    message = refusal(pack({"layer.0": broken}), 4)
    assert "layer.0" in message and said in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[]", "must start with"),
        (b" {}", "must start with"),
        (b"{", "is not JSON"),
        (b'{"a":NaN}', "NaN"),
        (b'{"\xff":1}', "is not JSON"),
        (b'{"a":' + b"[" * 100_000, "is not JSON"),
        (b'{"same":1,"same":2}', "'same' stands in it twice"),
    ],
)
def test_a_header_that_is_not_one_json_object_is_refused(text: bytes, said: str) -> None:
    assert said in refusal(pack(text), 0)


def test_a_header_that_ends_behind_the_file_or_is_too_long_is_refused() -> None:
    assert "of 30" in _header_refusal((100).to_bytes(8, "little"), 30)
    assert str(MAX_HEADER_BYTES) in _header_refusal((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), 1 << 40)
    assert "has 3 bytes" in _header_refusal(b"abc", 3)


def _header_refusal(prefix: bytes, size_bytes: int) -> str:
    with pytest.raises(CachedError) as caught:
        header_bytes(prefix, size_bytes)
    return caught.value.problem.message


def test_too_many_tensors_are_refused() -> None:
    header = pack({str(number): entry(0, 0) for number in range(MAX_TENSORS + 1)})
    assert f"{MAX_TENSORS} are the most" in refusal(header, 0)


def test_a_header_that_would_fill_the_memory_is_refused_unparsed() -> None:
    header = pack(b'{"a":[' + b"[]," * MAX_VALUES + b"0]}")
    assert f"more than {MAX_VALUES} values" in refusal(header, 0)


def test_what_stands_in_strings_is_not_counted() -> None:
    words = '[{,"\\' * (MAX_VALUES // 2)
    header = pack({"__metadata__": {"[": words, "\\": words}, "a": entry(0, 8)})
    assert [tensor.name for tensor in parse_header(header, len(header) + 8)] == ["a"]


def test_half_a_header_is_refused() -> None:
    header = pack({"w": entry(0, 1)})
    with pytest.raises(CachedError, match="only 20 could be read"):
        parse_header(header[:20], len(header) + 1)
