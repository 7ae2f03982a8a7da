"""Warpgroup matrix products: tiled MMAs, shared-memory layouts and the issue of one GEMM."""

from dataclasses import dataclass

import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
from cutlass import Float32
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.tensor_utils import LayoutEnum

from ..barriers import WARPGROUP
from ..config import FwdConfig
from ..elements import ELEMENT, Elements
from ..signature import Signature

ONES = 8  # rows of ones in transposed V


@dataclass(frozen=True)
class FwdMma:
    """S = Q K^T from shared memory; O += P V with P in registers."""

    qk: cute.TiledMma
    pv: cute.TiledMma

    @staticmethod
    def of(signature: Signature, config: FwdConfig) -> "FwdMma":
        element = Elements.of(signature)
        k_major, mn_major = OperandMajorMode.K, OperandMajorMode.MN
        warpgroups = (config.num_mma_warpgroups, 1, 1)
        qk = hopper.make_trivial_tiled_mma(
            element.q,
            element.k,
            k_major,
            k_major,
            element.scores,
            warpgroups,
            (64, config.tile_n),
        )
        pv = hopper.make_trivial_tiled_mma(
            element.p,
            element.v,
            k_major,
            mn_major if signature.quantised is None else k_major,
            Float32,
            warpgroups,
            (64, v_slice(signature, config)),
            warpgroup.OperandSource.RMEM,
        )
        return FwdMma(qk, pv)

    def operands(self, plan, rings, warpgroup_index) -> dict[str, cute.Tensor]:
        """What a thread of a warpgroup multiplies: descriptors of q, k and v, registers of p.

        q (MMA, 1, k-steps), k and v (MMA, slices, k-steps, num_stages), p (MMA, 1, k-steps).
        """
        first_thread = warpgroup_index * WARPGROUP
        qk, pv = self.qk.get_slice(first_thread), self.pv.get_slice(first_thread)
        p_shape = pv.partition_shape_A((plan.tile_m, plan.tile_n))
        return {
            "q": qk.make_fragment_A(qk.partition_A(rings.q.buffer[None, None, 0])),
            "k": qk.make_fragment_B(qk.partition_B(rings.k.buffer)),
            "v": pv.make_fragment_B(pv.partition_B(rings.v.buffer)),
            "p": pv.make_fragment_A(p_shape),
        }


@dataclass(frozen=True)
class FwdSmem:
    """Layouts of the shared-memory buffers, swizzled as TMA writes and wgmma reads them."""

    q: cute.ComposedLayout  # (tile_m, d, 1)
    k: cute.ComposedLayout  # (tile_n, d, num_stages)
    v: cute.ComposedLayout  # (dv, tile_n, num_stages)

    @staticmethod
    def of(signature: Signature, config: FwdConfig) -> "FwdSmem":
        return FwdSmem._of(signature, config, Elements.of(signature))

    @staticmethod
    def in_memory(signature: Signature, config: FwdConfig) -> "FwdSmem":
        """As TMA writes them, where that is not what wgmma reads."""
        return FwdSmem._of(signature, config, Elements.in_memory(signature))

    @staticmethod
    def _of(signature: Signature, config: FwdConfig, element: Elements) -> "FwdSmem":
        rows, columns = LayoutEnum.ROW_MAJOR, LayoutEnum.COL_MAJOR
        qk = (config.tile_m, config.tile_n, signature.head_dim)
        pv = (config.tile_m, signature.head_dim_v, config.tile_n)
        return FwdSmem(
            q=hopper.make_smem_layout_a(rows, qk, element.q, 1),
            k=hopper.make_smem_layout_b(rows, qk, element.k, config.num_stages),
            v=hopper.make_smem_layout_b(columns, pv, element.v, config.num_stages),
        )


def o_layout(signature: Signature, config: FwdConfig) -> cute.ComposedLayout:
    """(64, dv, num_mma_warpgroups), where config.OSpace says."""
    return hopper.make_smem_layout_a(
        LayoutEnum.ROW_MAJOR,
        (64, 0, signature.head_dim_v),
        ELEMENT[signature.dtype],
        config.num_mma_warpgroups,
    )


def vt_rows(signature: Signature, config: FwdConfig) -> int:
    """Rows of transposed V: the channels, and where O is not sliced 8 rows of ones.

    With those, P V holds the sum of P as it is multiplied (rounded to one byte), for 8 / dv of a
    product instead of an addition for each P.  8 is the unit of wgmma's N.
    """
    return signature.head_dim_v + (0 if config.o_slice else ONES)


def v_slice(signature: Signature, config: FwdConfig) -> int:
    """Columns of O that one product makes."""
    if signature.quantised is None:
        return signature.head_dim_v
    return config.o_slice or vt_rows(signature, config)


def vt_layout(signature: Signature, config: FwdConfig) -> cute.ComposedLayout:
    """(vt_rows, tile_n, num_stages) with the keys contiguous."""
    shape = (0, vt_rows(signature, config), config.tile_n)
    dtype = Elements.of(signature).v
    return hopper.make_smem_layout_b(LayoutEnum.ROW_MAJOR, shape, dtype, config.num_stages)


def issue_gemm(
    tiled_mma: cute.TiledMma,
    acc: cute.Tensor,  # (MMA, MMA_M, MMA_N)
    a: cute.Tensor,  # (MMA, MMA_M, MMA_K)
    b: cute.Tensor,  # (MMA, MMA_N, MMA_K)
    accumulate: bool,
    commits: bool = True,
):
    """acc (+)= a b^T as one committed group, or as part of the next one.

    The caller fences before and waits for it.
    """
    atom = cute.make_mma_atom(tiled_mma.op)  # a copy of its own: set() below must not leak out
    for k in range(cute.size(a, mode=[2])):
        atom.set(warpgroup.Field.ACCUMULATE, accumulate or k > 0)
        cute.gemm(atom, acc, a[None, None, k], b[None, None, k], acc)
    if commits:
        warpgroup.commit_group()


def accumulator(columns: int) -> cute.Tensor:
    """((2, 2, columns / 8), 1, 1) fp32 registers: a warpgroup's 64 rows."""
    return cute.make_rmem_tensor(((2, 2, columns // 8), 1, 1), Float32)
