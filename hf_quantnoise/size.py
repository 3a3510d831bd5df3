"""The size of a model, per tensor and in total: by formula, on disk, in memory and dense."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .argument_checks import require_model
from .compat import ignored_on_save, revert_weight_conversion
from .files.reading import DTYPES
from .hub.conversions import convert_dense_only
from .hub.skeleton import sentinel_names
from .hub.weights_id import ID_LENGTH, WEIGHTS_ID
from .layer_types import known_layer_type
from .modeling import PackedLayer, packed_layers, packed_names, stored_tensors
from .modeling.float16 import as_stored
from .structure import find_layers
from .tables import data_frame, html_table
from .text import printable

if TYPE_CHECKING:
    from pandas import DataFrame

_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = list(DTYPES)
SENTINEL = "sentinel"  # a byte that names a packed layer in the file


@dataclass(frozen=True)
class SizeRow:
    """One weight, or any other tensor, of a model. All sizes are in bytes.

    Attributes:
        name: name of the parameter or buffer.
        group: structure group, or ``"other"`` (biases, norms, buffers).
        stored: how it is stored, e.g. ``"pq 256x4"``, ``"int8"``, ``"float32"``, ``"tied to ..."``,
            or ``"computed"`` if it is not saved.
        shape: shape of the tensor as used by the layer.
        formula_bytes: size by section 3.3: codebook and log2(K) bits per block.
        disk_bytes: size of its tensors in the safetensors file.
        memory_bytes: size of its tensors in memory.
        dense_bytes: size in float32, in the model before layers were pruned or shared; 0 for
            weights that were tied already, None if unknown (codes of another package).
        activation_bytes: size of the input of a packed layer for one position (batch size 1): the
            term 8 n of M in section 3.3, or 32 n for floating-point activations; otherwise 0.
    """

    name: str
    group: str
    stored: str
    shape: tuple[int, ...]
    formula_bytes: int
    disk_bytes: int
    memory_bytes: int
    dense_bytes: int | None
    activation_bytes: int = 0


@dataclass(frozen=True)
class SizeTotal:
    """Sums over rows, in bytes; ``disk_bytes`` includes the header of the file."""

    formula_bytes: int
    disk_bytes: int
    memory_bytes: int
    dense_bytes: int | None
    activation_bytes: int = 0

    @property
    def times_smaller(self) -> float | None:
        """Dense float32 size over size on disk; None if the dense size is unknown."""
        return None if self.dense_bytes is None else self.dense_bytes / self.disk_bytes


@dataclass(frozen=True)
class SizeReport:
    """A row per tensor, and their total.

    ``str()`` gives a table by group and kind of storage, which notebooks show as HTML.
    """

    rows: list[SizeRow]
    header_bytes: int
    left_dense: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> SizeTotal:
        """Sums over all rows, with the header."""
        return total_of(self.rows, self.header_bytes)

    def to_pandas(self) -> DataFrame:
        """Return a ``pandas.DataFrame`` with a row per tensor; sizes are in bytes."""
        return data_frame(asdict(row) for row in self.rows)

    def __str__(self) -> str:
        return aligned(self._table()) + "\n" + self.closing_lines()

    def _repr_html_(self) -> str:
        return html_table(self._table(), below=self.closing_lines())

    def _table(self) -> list[tuple[str, ...]]:
        groups: dict[tuple[str, str], list[SizeRow]] = {}
        for row in self.rows:
            kind = "tied" if row.stored.startswith("tied") else row.stored
            groups.setdefault((row.group, kind), []).append(row)
        lines: list[tuple[str, ...]] = [
            ("group", "stored", "tensors", "formula kB", "disk kB", "memory kB", "dense kB",
             "inputs kB")
        ]  # fmt: skip
        lines += [
            (group, kind, str(len(rows)), *kilobytes(*astuple(total_of(rows))))
            for (group, kind), rows in sorted(groups.items())
        ]
        lines.append(("file header", "", "", "", *kilobytes(self.header_bytes), "", "", ""))
        lines.append(("total", "", str(len(self.rows)), *kilobytes(*astuple(self.total))))
        return lines

    def closing_lines(self) -> str:
        """Return the text below a table: the compression ratio and what no stage packs."""
        ratio = self.total.times_smaller
        text = "size in float32 unknown"
        if ratio is not None:
            text = f"{ratio:.1f} times smaller than float32"
        if self.left_dense:
            text += "\nnot packed by a stage:"
            for name, reason in self.left_dense.items():
                text += f"\n  {printable(name)}: {printable(reason)}"
        return text


def total_of(rows: Iterable[SizeRow], header_bytes: int = 0) -> SizeTotal:
    """Return the sums over rows; the dense size is None if it is for any row."""
    rows = list(rows)
    dense = [row.dense_bytes for row in rows]
    return SizeTotal(
        formula_bytes=sum(row.formula_bytes for row in rows),
        disk_bytes=sum(row.disk_bytes for row in rows) + header_bytes,
        memory_bytes=sum(row.memory_bytes for row in rows),
        dense_bytes=None if None in dense else sum(size or 0 for size in dense),
        activation_bytes=sum(row.activation_bytes for row in rows),
    )


def kilobytes(*sizes: int | None) -> tuple[str, ...]:
    """Format bytes as kB for a table; None as ``?``."""
    return tuple("?" if size is None else f"{size / 1e3:,.1f}" for size in sizes)


def aligned(lines: list[tuple[str, ...]], left: int = 2) -> str:
    """Format a table whose first ``left`` columns are aligned left, the others right."""
    lines = [tuple(map(printable, line)) for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _dense_row(name: str, tensor: Tensor, group: str, stored: Tensor, model: nn.Module) -> SizeRow:
    dense = 4 * tensor.numel() if tensor.is_floating_point() else tensor.nbytes
    kind = str(stored.dtype).removeprefix("torch.")
    size, shape, memory = stored.nbytes, tuple(tensor.shape), tensor.nbytes
    if tensor.is_meta and stored.dtype == torch.float16:  # loading restores the model's dtype
        name_of_dtype = str(getattr(getattr(model, "config", None), "dtype", None))
        dtype = getattr(torch, name_of_dtype.removeprefix("torch."), torch.float32)
        memory = tensor.numel() * dtype.itemsize
    return SizeRow(name, group, kind, shape, size, size, memory, dense)


def _packed_row(name: str, layer: PackedLayer, group: str, disk: dict[str, Tensor]) -> SizeRow:
    quantizer, input_size = layer.quantizer, known_layer_type(layer).input_size
    inputs = layer.columns if input_size is None else input_size(layer)
    state_bits = sum(
        8 * dtype.itemsize * math.prod(shape)
        for shape, dtype in quantizer.state_spec(layer.rows, layer.columns).values()
    )
    return SizeRow(
        name=f"{name}.weight",
        group=group,
        stored=quantizer.short_name,
        shape=(layer.rows, layer.columns),
        formula_bytes=math.ceil((state_bits + quantizer.code_bits * layer.n_codes) / 8),
        disk_bytes=sum(disk[f"{name}.{tensor}"].nbytes for tensor in packed_names(layer)),
        memory_bytes=sum(getattr(layer, tensor).nbytes for tensor in packed_names(layer)),
        dense_bytes=4 * layer.rows * layer.columns,
        activation_bytes=math.ceil((layer.activation_bits or 32) * inputs / 8),
    )


def _as_named_in_file(
    model: nn.Module, tensors: dict[str, Tensor], sentinels: list[str]
) -> dict[str, Tensor]:
    """Return the tensors, on the meta device, under the names that ``save_pretrained`` writes."""
    tensors = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    if not isinstance(model, PreTrainedModel):
        return tensors
    convert_dense_only(model, sentinels)
    return revert_weight_conversion(model, tensors)


def _header_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> int:
    """Return the length of the safetensors header: 8 bytes, then JSON padded to a multiple of 8.

    It is exact if all dtypes are known, since the offsets have as many digits as in the file.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    dtypes = {name: _NAME_OF.get(tensor.dtype, "F32") for name, tensor in tensors.items()}
    for name in sorted(tensors, key=lambda name: (_ORDER.index(dtypes[name]), name)):
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": dtypes[name],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8


def _groups(model: nn.Module, config: Any) -> dict[str, str]:
    """Return the structure group of each weight, dense or packed."""
    groups = {f"{layer.name}.weight": layer.group for layer in find_layers(model)}
    for name, entry in (getattr(config, "plan", None) or {}).items():
        groups[f"{name}.weight"] = entry["group"]
    return groups


def size_report(model: nn.Module) -> SizeReport:
    """Return the size of each tensor of a model, quantized or dense.

    ``report.total.disk_bytes`` is the size of the ``model.safetensors`` that ``save_pretrained``
    writes, header included.

    Args:
        model: any module; a model packed by this package is reported by layer.

    Raises:
        TypeError: if the model is not a module.
    """
    require_model(model, nn.Module)
    packed = dict(packed_layers(model))
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    groups = _groups(model, config)
    shared = tuple(f"{layer}." for layer in getattr(config, "shared_layers", None) or {})
    unsaved = ignored_on_save(model)
    disk: dict[str, Tensor] = {}
    rows: list[SizeRow] = []
    owners: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        layer_name, _, tensor_name = name.rpartition(".")
        layer: Any = packed.get(layer_name)  # None for a tensor outside of packed layers
        names = [] if layer is None else packed_names(layer)
        is_packed = tensor_name in names
        label = f"{layer_name}.weight" if is_packed else name
        group = groups.get(label, "other")
        shape = (layer.rows, layer.columns) if is_packed else tuple(tensor.shape)
        owner = owners.setdefault(id(tensor), label)
        if owner != label:
            if not is_packed or tensor_name == names[-1]:
                dense = 4 * math.prod(shape) if label.startswith(shared) else 0
                rows.append(SizeRow(label, group, f"tied to {owner}", shape, 0, 0, 0, dense))
        elif name in unsaved:
            rows.append(SizeRow(name, group, "computed", shape, 0, 0, tensor.nbytes, 0))
        else:
            if is_packed:
                disk[name] = stored_tensors(layer)[tensor_name]
            else:
                disk[name] = as_stored(tensor, config)
                rows.append(_dense_row(name, tensor, group, disk[name], model))
            if is_packed and tensor_name == names[-1]:  # one row after all tensors of the layer
                rows.append(_packed_row(layer_name, layer, group, disk))
    for name, weights in (getattr(config, "pruned_layers", None) or {}).items():
        rows.append(SizeRow(name, "other", "pruned", (weights,), 0, 0, 0, 4 * weights))
    sentinels = sentinel_names(config, model) if packed else []
    for name in sentinels:
        disk[name] = torch.zeros(1, dtype=torch.uint8)
        rows.append(SizeRow(name, "other", SENTINEL, (1,), 1, 1, 0, 0))
    metadata = {"format": "pt", **({WEIGHTS_ID: "0" * ID_LENGTH} if packed else {})}
    header_bytes = _header_bytes(_as_named_in_file(model, disk, sentinels), metadata)
    return SizeReport(rows, header_bytes, dict(getattr(config, "left_dense", None) or {}))
