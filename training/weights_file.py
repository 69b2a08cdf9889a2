"""Files of weights: safetensors with a JSON header that describes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import UserError, brief, listed
from configs.run_dir import write_bytes

_HEADER = "header"
_SUM = "sha256"


class Header(dict[str, Any]):
    """The header of a file. Errors: UserError that names the file, for a missing key."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.path}: expected a header with {key}, found {listed(self)}")


def save_weights(path: Path, weights: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write weights with a JSON header, atomically; equal weights and headers give equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    summed = {**header, _SUM: _sum_of(tensors, header)}
    # One entry, because safetensors writes several in an order that changes from run to run.
    write_bytes(path, safetensors.torch.save(tensors, {_HEADER: json.dumps(summed)}))


def check_finite_weights(weights: Mapping[str, Tensor], where: str = "") -> None:
    """Errors: UserError, beginning with `where` and naming the first weight that is NaN or infinite, if there is one."""
    for name, weight in weights.items():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise UserError(f"{where}expected finite weights, found {'NaN' if bool(weight.isnan().any()) else 'infinity'} in {name}")


def read_header(path: Path, kind: str) -> dict[str, Any]:
    """Read the header of a file that `save_weights` wrote. Errors: as `load_weights`."""
    return load_weights(path, kind, names=())[1]


def load_weights(path: Path, kind: str, names: tuple[str, ...] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_weights` wrote. `names`: tensors to read, without verifying their sum; None: all.

    Errors: UserError if the file is missing, truncated, damaged, of another kind, or its weights are not finite.
    """
    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {}).get(_HEADER, "{}"))
            header = Header(path, content if isinstance(content, dict) else {})
            weights = {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except FileNotFoundError:
        raise UserError(f"{path}: expected the weights of a {kind}, found nothing") from None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected the weights of a {kind}, found a truncated or foreign file ({brief(error)})") from None
    if header.get("kind") != kind:
        raise UserError(f"{path}: expected the weights of a {kind}, found {header.get('kind', 'no kind')} in its header")
    written = header.pop(_SUM, None)
    if names is None and written != _sum_of(weights, header):
        raise UserError(f"{path}: expected the weights of a {kind} as they were written, found others than their sha256 is of")
    check_finite_weights(weights, f"{path}: ")
    return weights, header


@contextmanager
def built_from(path: Path, kind: str) -> Iterator[None]:
    """Turn errors of the block, which builds a model from a file, into a UserError that names the file."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise
        found = f"a header that does not describe them ({type(error).__name__}: {brief(error)})"
        raise UserError(f"{path}: expected the weights of a {kind}, found {found}") from None


def _sum_of(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Return the sha256 of a header and of tensors in the order of their names."""
    digest = hashlib.sha256(json.dumps(header).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(path: Path) -> str:
    """Return the sha256 of a file, which links codes to their tokenizer and priors to their codes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
