"""What the list of a call's tiles is made for, and whether a list that the caller brings is that.

The list is scheduler_metadata: int32 on the device, as kernels/simple/schedule.py fills it. What it
was made for goes with the tensor as an attribute, so that a call sees without a look at the device
whether it fits. A copy has no such attribute, and only its size can be seen.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Layout, check_address, check_like, check_tensors
from .problem import Problem

ATTRIBUTE = "fa3_tiles"


class Tiles(NamedTuple):
    """The tiles of a call with lengths on the device, as far as the host knows."""

    batch_size: int
    heads: int  # of q, or of k where those of a group are packed
    heads_kv: int
    queries: int | None  # rows of a sequence of dense q; None: q is packed
    tile_m: int  # 0: no kernel
    num_splits: int
    ctas: int  # that they are dealt to
    scratch: int  # int32 that the list takes, what is needed to make it included

    @classmethod
    def of(cls, problem: Problem, config, num_splits: int, num_ctas: int) -> "Tiles | None":
        """None: lengths are equal, and the tiles' order is computed."""
        sequences = problem.sequences
        if not sequences.is_ragged:
            return None
        scratch = 0
        if config is not None:
            from ..kernels.simple.rounds import capacity  # imports the DSL, as the kernel has

            rows = problem.s_q, problem.h_q * num_splits, sequences.q_is_packed
            scratch = capacity(config.tile_m, sequences.batch, *rows)
        queries = None if sequences.q_is_packed else problem.s_q
        tile_m = 0 if config is None else config.tile_m
        heads = problem.h_q, problem.h_k
        return cls(problem.batch, *heads, queries, tile_m, num_splits, num_ctas, scratch)


def splits_with(metadata: Tensor | None, num_splits: int) -> int:
    """num_splits of a call with scheduler_metadata, which knows it."""
    if metadata is None or num_splits != 0:
        return num_splits
    check_tensors(scheduler_metadata=metadata)
    made_for = getattr(metadata, ATTRIBUTE, None)
    if made_for is None:
        raise ValueError(
            "num_splits is 0 beside a scheduler_metadata that is a copy, expected the number that "
            "it was made with"
        )
    return made_for.num_splits


def listed(metadata: Tensor, wanted: Tiles, device: torch.device, seqused_q) -> Tensor:
    """The list, as a kernel takes it.

    Raises ValueError if it was made for other tiles; names both values.
    """
    check_tensors(scheduler_metadata=metadata)
    check_like("scheduler_metadata", Layout.of(metadata), (metadata.numel(),), torch.int32, device)
    if not metadata.is_contiguous():
        raise ValueError(
            f"scheduler_metadata has stride {metadata.stride(0)}, expected contiguous memory"
        )
    check_address("scheduler_metadata", metadata)
    if seqused_q is not None:
        raise ValueError("seqused_q is a tensor beside scheduler_metadata, expected only one")
    made_for = getattr(metadata, ATTRIBUTE, None)
    if made_for is None:
        if metadata.numel() < wanted.scratch:
            raise ValueError(
                f"scheduler_metadata has {metadata.numel()} elements, expected at least "
                f"{wanted.scratch}"
            )
        return metadata
    for name, given, needed in zip(Tiles._fields[:-1], made_for, wanted, strict=False):
        if given != needed:
            raise ValueError(
                f"scheduler_metadata was made for {name.replace('_', ' ')} {given}, but the call "
                f"has {needed}"
            )
    return metadata
