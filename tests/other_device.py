"""Another device than the CPU, where no GPU is at hand: the same numbers, and no operation on tensors of both.

It is torch's meta device, whose tensors carry values on the CPU here. What torch lets pass there and a GPU would
refuse, `OtherDevice` refuses. It says nothing of kernels, streams or speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

CPU, META = torch.device("cpu"), torch.device("meta")
COPIES = ("aten._to_copy", "aten.copy_")
BY_INDEX = ("aten.index.", "aten.index_put", "aten._unsafe_index")  # a GPU takes indices from the CPU


class Elsewhere(torch.Tensor):
    """A tensor that says it is on the meta device, with `values` on the CPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Elsewhere:
        new = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), dtype=values.dtype, device=META
        )
        new.values = values
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved, it is what torch.load makes of a GPU's tensor with map_location="cpu"."""
        return self.values.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with OtherDevice():  # autograd's own threads have no mode
            return func(*args, **(kwargs or {}))


class OtherDevice(TorchDispatchMode):
    """Raises where an operation but a copy takes tensors of two devices; a CPU's single number may stand beside any."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        if Elsewhere not in types and wanted != META:  # all is here and stays here, as in most operations
            return func(*args, **kwargs)
        name = str(func)
        judged = (args[0], *args[2:]) if name.startswith(BY_INDEX) and isinstance(args[0], Elsewhere) else args
        tensors = [leaf for leaf in tree_leaves((judged, kwargs)) if isinstance(leaf, torch.Tensor)]
        places = {isinstance(tensor, Elsewhere) for tensor in tensors if tensor.ndim or isinstance(tensor, Elsewhere)}
        if len(places) > 1 and not name.startswith(COPIES):
            raise RuntimeError(f"{name} takes tensors of two devices")
        there = wanted == META if wanted is not None else isinstance(args[0], Elsewhere) or True in places
        inner, options = tree_map_only(Elsewhere, lambda tensor: tensor.values, (args, kwargs))
        if wanted is not None:
            options = {**options, "device": CPU}
        with _disable_current_modes():
            out = func(*inner, **options)
        if not there:
            return out
        if func._schema.is_mutable:  # what is returned, if anything, is what was changed
            return None if out is None else kwargs.get("out", args[0])
        return tree_map_only(torch.Tensor, Elsewhere, out)


@contextlib.contextmanager
def other_device() -> Iterator[torch.device]:
    """The device, usable within the block; also where torch asks no mode: autocast, and `tensor`."""
    autocast, tensor = torch.autocast, torch.tensor

    def autocast_if_known(device_type: str, *arguments: Any, **options: Any) -> Any:
        return contextlib.nullcontext() if device_type == "meta" else autocast(device_type, *arguments, **options)

    def tensor_with_values(data: Any, *, device: Any = CPU, **options: Any) -> torch.Tensor:
        return tensor(data, **options).to(device)

    with pytest.MonkeyPatch.context() as patches, OtherDevice():
        patches.setattr(torch, "autocast", autocast_if_known)
        patches.setattr(torch, "tensor", tensor_with_values)
        yield META
