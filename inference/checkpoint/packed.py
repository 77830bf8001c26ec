"""Quantised weights in the layouts of other programs, read as if they were stored in ours.

Ours are X.weight, X.weight_scale_inv and where there are zero points X.weight_zero_point: INT4 uint8 (N, K / 2), the
even k in the low four bits, INT8 (N, K), scales (N, K / group), zero points uint8 (N, K / group).

compressed-tensors' pack-quantized: X.weight_packed int32, along K, the first value in the lowest bits, each plus 8 (or
128); X.weight_scale; X.weight_zero_point int32, packed alike but along N; X.weight_shape. Its bytes are ours.

AWQ and GPTQ: X.qweight int32, packed along N (K, N / 8) in the order of ORDER, or along K (K / 8, N); X.scales
(K / group, N); X.qzeros int32 (K / group, N / 8), packed as qweight's N, of GPTQ's first format less one; GPTQ's
X.g_idx (K,) is each channel's group. They are turned over as they are read.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from checkpoint.reading import Entry, Reader, dtype_and_shape
from core.errors import CheckpointError
from core.quantization_config import Quantisation

ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # AWQ: where in an int32 the values 0 to 7 lie, in steps of four bits
LAYOUTS = {  # the weight's last word, and those of what lies beside it, by quant_method
    "compressed-tensors": (".weight_packed", (".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx")),
    "awq": (".qweight", (".scales", ".qzeros")),
    "gptq": (".qweight", (".scales", ".qzeros", ".g_idx")),
}


def unpack(entries: dict[str, Entry], quant: Quantisation | None) -> Iterator[tuple[str, Entry]]:
    """The tensors that those on disk stand for, by the names and in the shapes of our layout.

    Raises CheckpointError for tensors whose shapes do not fit one another.
    """
    layout = LAYOUTS.get(quant.method) if quant else None
    if quant is None or layout is None:
        yield from entries.items()
        return
    weight, others = layout
    for name, entry in entries.items():
        module, dot, last = name.rpartition(".")
        if dot + last == weight:
            beside = {word: entries[module + word] for word in others if module + word in entries}
            parts = (_compressed if quant.method == "compressed-tensors" else _turned)(entry, beside, quant)
            yield from ((f"{module}.weight{word}", part) for word, part in parts.items())
        elif dot + last not in others or module + weight not in entries:  # else it comes with its weight
            yield name, entry


def contradiction(name: str, entry: Entry, entries: dict[str, Entry], quant: Quantisation, reader: Reader) -> str:
    """What is wrong with the values of a tensor that only repeats what others say: X.weight_shape, and X.g_idx, the
    group of each channel. Empty if nothing is, and for any other tensor."""
    module, _, last = name.rpartition(".")
    weight = entries.get(module + LAYOUTS[quant.method][0])
    if weight is None or last not in ("weight_shape", "g_idx"):
        return ""
    found = reader.read(entry).flatten().tolist()
    if last == "weight_shape":
        wanted = [weight.shape[0], weight.shape[1] * (32 // int(quant.dtype.removeprefix("int")))]
        return "" if found == wanted else f"expected {wanted}, as {weight.name} has them, found {found}"
    for channel, group in enumerate(found):
        if group != channel // quant.group_size:
            right = channel // quant.group_size
            return f"channel {channel} is of group {group}, expected {right}: act-order is not supported"
    return ""


def _require(entry: Entry, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    if entry.shape != shape or entry.dtype != (dtype or entry.dtype):
        wanted = dtype_and_shape(dtype or entry.dtype, shape)
        found = dtype_and_shape(entry.dtype, entry.shape)
        raise CheckpointError(f"{entry}: expected {wanted}, found {found}", entry.file, entry.name, wanted, found)


def _require_groups(weight: Entry, k: int, quant: Quantisation) -> None:
    if k % quant.group_size:
        wanted, found = f"whole groups of {quant.group_size} channels", f"{k} channels"
        raise CheckpointError(f"{weight}: expected {wanted}, found {found}", weight.file, weight.name, wanted, found)


def _remade(entry: Entry, dtype: torch.dtype, shape: tuple[int, int], remake: functools.partial[torch.Tensor]) -> Entry:
    return replace(
        entry, dtype=dtype, shape=shape, nbytes=shape[0] * shape[1] * dtype.itemsize, crc=None, remake=remake
    )


# --------------------------------------------------------------------------------------------------------------------
# compressed-tensors
# --------------------------------------------------------------------------------------------------------------------


def _compressed(weight: Entry, beside: dict[str, Entry], quant: Quantisation) -> dict[str, Entry]:
    """By the ends of our names, the tensors that a weight and those beside it stand for."""
    if reordered := beside.get(".weight_g_idx"):
        text = f"{reordered}: act-order, which scatters a group's channels over the row, is not supported"
        raise CheckpointError(text, weight.file, reordered.name)
    _require(weight, weight.shape if len(weight.shape) == 2 else (0, 0), torch.int32)
    bits = int(quant.dtype.removeprefix("int"))
    n, k = weight.shape[0], weight.shape[1] * (32 // bits)
    _require_groups(weight, k, quant)
    groups = n, k // quant.group_size
    found = {"": replace(weight, dtype=torch.uint8, shape=(n, weight.shape[1] * 4))}
    if bits == 8:
        found[""] = _remade(weight, torch.int8, (n, k), functools.partial(_signed, weight))
    if scale := beside.get(".weight_scale"):
        _require(scale, groups)
        found["_scale_inv"] = scale
    if zero := beside.get(".weight_zero_point"):
        _require(zero, (-(-n // 8), groups[1]), torch.int32)
        found["_zero_point"] = _remade(zero, torch.uint8, groups, functools.partial(_zeros_along_n, zero, n))
    return found


def _signed(weight: Entry, reader: Reader) -> torch.Tensor:
    """Bytes plus 128 as int8."""
    return (reader.read(weight).view(torch.uint8) ^ 0x80).view(torch.int8)


def _zeros_along_n(zero: Entry, n: int, reader: Reader) -> torch.Tensor:
    """int32 (ceil(N / 8), groups) to uint8 (N, groups)."""
    return _nibbles(reader.read(zero), range(8)).transpose(1, 2).flatten(0, 1)[:n].contiguous()


def _nibbles(words: torch.Tensor, order: tuple[int, ...] | range) -> torch.Tensor:
    """int32 (A, B) to the eight values that each holds, uint8 (A, B, 8), value i at bits 4 * order[i]."""
    return ((words.unsqueeze(-1) >> torch.tensor([4 * place for place in order])) & 15).to(torch.uint8)


# --------------------------------------------------------------------------------------------------------------------
# AWQ and GPTQ
# --------------------------------------------------------------------------------------------------------------------


def _turned(weight: Entry, beside: dict[str, Entry], quant: Quantisation) -> dict[str, Entry]:
    _require(weight, weight.shape if len(weight.shape) == 2 else (0, 0), torch.int32)
    awq = quant.method == "awq"
    k, n = (weight.shape[0], weight.shape[1] * 8) if awq else (weight.shape[0] * 8, weight.shape[1])
    _require_groups(weight, k, quant)
    groups = k // quant.group_size
    turn = functools.partial(_turn_along_n if awq else _turn_along_k, weight)
    found = {"": _remade(weight, torch.uint8, (n, k // 2), turn)}
    if scale := beside.get(".scales"):
        _require(scale, (groups, n))
        found["_scale_inv"] = _remade(scale, scale.dtype, (n, groups), functools.partial(_transposed, scale))
    if zero := beside.get(".qzeros"):
        _require(zero, (groups, n // 8), torch.int32)
        turn = functools.partial(_turn_zeros, zero, ORDER if awq else tuple(range(8)), quant.zero_offset)
        found["_zero_point"] = _remade(zero, torch.uint8, (n, groups), turn)
    if group := beside.get(".g_idx"):
        _require(group, (k,))
    return found


def _paired(values: torch.Tensor) -> torch.Tensor:
    """Values (K, N) to INT4 as ours, (N, K / 2)."""
    return (values[0::2] | values[1::2] << 4).T.contiguous()


def _turn_along_n(weight: Entry, reader: Reader) -> torch.Tensor:
    return _paired(_nibbles(reader.read(weight), ORDER).flatten(1))


def _turn_along_k(weight: Entry, reader: Reader) -> torch.Tensor:
    return _paired(_nibbles(reader.read(weight), range(8)).transpose(1, 2).flatten(0, 1))


def _transposed(scale: Entry, reader: Reader) -> torch.Tensor:
    return reader.read(scale).T.contiguous()


def _turn_zeros(zero: Entry, order: tuple[int, ...], offset: int, reader: Reader) -> torch.Tensor:
    """int32 (groups, N / 8) to uint8 (N, groups)."""
    return ((_nibbles(reader.read(zero), order).flatten(1) + offset) & 15).T.contiguous()
