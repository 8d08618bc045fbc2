"""Statistics of a group, the responses to one prompt of a step: its mean, standard deviation, leave-one-out mean.

All are [K], each response having its group's. Masked responses are in no group, so that a group may have any size. A
group of one knows nothing to compare with: its mean and its leave-one-out mean are its own value, its deviation is 0,
and whatever is made of these gives it the advantage 0.

Shapes: K sequences; group_K says by any numbers who belongs together.
"""

from __future__ import annotations

from torch import Tensor


def group_size(group_K: Tensor) -> Tensor:
    """[K] fp64."""
    return _sum(group_K.new_ones(len(group_K)), group_K)


def group_mean(values_K: Tensor, group_K: Tensor) -> Tensor:
    """[K], exactly the value where all of a group are equal."""
    return (_sum(values_K, group_K) / group_size(group_K)).to(values_K.dtype)


def group_std(values_K: Tensor, group_K: Tensor) -> Tensor:
    """[K] with n - 1 in the denominator, exactly 0 where all of a group are equal."""
    deviation_K = values_K - group_mean(values_K, group_K)
    variance_K = _sum(deviation_K.square(), group_K) / (group_size(group_K) - 1).clamp(min=1)
    return variance_K.sqrt().to(values_K.dtype)


def leave_one_out_mean(values_K: Tensor, group_K: Tensor) -> Tensor:
    """[K] mean of the group's others: (n mean - own) / (n - 1)."""
    others_K = _sum(values_K, group_K) - values_K
    size_K = group_size(group_K)
    return others_K.where(size_K > 1, values_K.double()).div((size_K - 1).clamp(min=1)).to(values_K.dtype)


def _sum(values_K: Tensor, group_K: Tensor) -> Tensor:
    """[K] fp64 over each one's group."""
    index_K = group_K.unique(return_inverse=True)[1]
    return values_K.double().new_zeros(len(values_K)).index_add(0, index_K, values_K.double())[index_K]
