"""Weights that are NaN or infinite, of a damaged file or a run that diverged: found before anything is made of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_apo.model.hf_config import ModelConfigError
from megatron_apo.telemetry.units import some


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. In one pass and without memory for each element, as `isfinite` takes."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.bfloat16() if tensor.dtype.itemsize == 1 else tensor  # FP8 has no minimum
    return bool(torch.stack(torch.aminmax(wide)).isfinite().all())  # a NaN is the least and the greatest


def refuse_not_finite(source: object, names: Sequence[str]) -> None:
    """Raise `ModelConfigError` where there are `names`: tensors of `source`, a folder, that are not finite."""
    if names:
        count = f"{len(names)} tensors hold" if len(names) > 1 else "a tensor holds"
        raise ModelConfigError(
            f"{source}: {count} NaN or infinity ({some(names)}); give a folder of finite weights, such as an earlier "
            "export"
        )
