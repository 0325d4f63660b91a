"""How others lay top-k logprobs out on disk, re-stated in a few lines each so that the bytes and the speed can be
compared on the same tokens in the same run.

Each function stands for what a project's writer does to the data, without its package: its records, its types, its
compression. Where a project is faster or smaller than its re-statement the comparison is wrong; sources are named.
"""

import io
import json
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from logitlake_shared.topk import TeacherRows

__all__ = ["PEERS"]

_ZSTD_LEVEL = 3


def json_lines(rows: TeacherRows, lengths: npt.NDArray[np.int64]) -> bytes:
    """EasyDistill 1.x: one line a sample, for each token an object {id: probability}."""
    lines, start = [], 0
    probabilities_TK = np.exp(rows.topk_logprobs_TK)
    for length in lengths.tolist():
        lines.append(
            json.dumps(
                [
                    dict(zip(ids, values, strict=True))
                    for ids, values in zip(
                        rows.topk_ids_TK[start : start + length].tolist(),
                        probabilities_TK[start : start + length].tolist(),
                        strict=True,
                    )
                ]
            )
        )
        start += length
    return "\n".join(lines).encode()


def nested_lists(rows: TeacherRows, lengths: npt.NDArray[np.int64]) -> bytes:
    """A data set of Python lists, as `datasets` or pandas write it: nested int64 and float64, pyarrow's defaults."""
    stops = np.cumsum(lengths)[:-1]
    table = pa.table(
        {
            "topk_ids": [part.tolist() for part in np.split(rows.topk_ids_TK, stops)],
            "topk_logprobs": [part.tolist() for part in np.split(rows.topk_logprobs_TK, stops)],
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def tensors_zstd(rows: TeacherRows, lengths: npt.NDArray[np.int64]) -> bytes:
    """Megatron-LM's offline distillation and MDS: raw arrays of ids and float16 logprobs a sample, zstd.

    Megatron's ids take 17 bits and cannot name 151,936 tokens; here they take a low half and a high byte.
    """
    low_TK, high_TK = rows.topk_ids_TK.astype(np.uint16), (rows.topk_ids_TK >> 16).astype(np.uint8)
    half_TK = rows.topk_logprobs_TK.astype(np.float16)
    codec = pa.Codec("zstd", _ZSTD_LEVEL)
    parts, start = [], 0
    for length in lengths.tolist():
        of_sample = slice(start, start + length)
        raw = b"".join(array[of_sample].tobytes() for array in (low_TK, high_TK, half_TK))
        parts.append(codec.compress(raw, asbytes=True))
        start += length
    return b"".join(parts)


def packed_bytes(rows: TeacherRows, lengths: npt.NDArray[np.int64]) -> bytes:
    """DistillKit with exact values: ids packed to the vocabulary's 18 bits, bfloat16 values, one list of bytes a token,
    Parquet's defaults (snappy)."""
    bits_TKB = np.unpackbits(rows.topk_ids_TK.astype(">u4").view(np.uint8).reshape(*rows.topk_ids_TK.shape, 4), axis=2)
    packed_TB = np.packbits(bits_TKB[:, :, 32 - 18 :].reshape(len(bits_TKB), -1), axis=1)
    bfloat_TK = (rows.topk_logprobs_TK.view(np.uint32) >> 16).astype(np.uint16)
    values_TB = bfloat_TK.view(np.uint8).reshape(len(bfloat_TK), -1)
    columns = {}
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    for name, bytes_TB in (("bytepacked_indices", packed_TB), ("compressed_logprobs", values_TB)):
        width = bytes_TB.shape[1]
        per_token = pa.ListArray.from_arrays(
            np.arange(0, bytes_TB.size + 1, width, dtype=np.int32), pa.array(bytes_TB.reshape(-1))
        )
        columns[name] = pa.ListArray.from_arrays(starts, per_token)
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


PEERS: dict[str, Callable[[TeacherRows, npt.NDArray[np.int64]], bytes]] = {
    "JSON lines {id: p} (as EasyDistill 1.x)": json_lines,
    "Parquet of nested Python lists": nested_lists,
    "float16 + 24-bit ids, zstd (as Megatron-LM, MDS)": tensors_zstd,
    "bfloat16 + 18-bit ids in byte lists (as DistillKit, exact)": packed_bytes,
}
