"""When a CTA copies which tile: cp.async by all threads, ahead of what they compute.

A copy may overwrite a stage when all warps have read it, and be read when all warps' parts have
arrived: one barrier says both.

    one stage     | wait K_n  | S = Q K_n | wait V_n  | softmax, O += P V_n | wait K_(n-1)
      in flight               | V_n       |           | K_(n-1)             |

    two stages    | wait K_n, V_n  | S = Q K_n, softmax, O += P V_n         | wait K_(n-1), V_(n-1)
      in flight                    | K_(n-1), V_(n-1)                       |
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute

from ...blocks import BlockRange
from ..copies import RowCopy, commit, wait_for_all


@dataclass(frozen=True)
class Loads:
    """The copies of one query tile, as one thread issues them."""

    num_stages: int  # compile-time
    q: RowCopy
    k: RowCopy
    v: RowCopy
    blocks: BlockRange

    def stage(self, n_block):
        """Where block n_block of K and of V goes."""
        return n_block % self.num_stages if self.num_stages > 1 else 0

    def start(self, m_block):
        """Issue what the first step needs; no warp reads shared memory any more."""
        first = self.blocks.n_max - 1
        self.q.issue(m_block, 0, is_partial=True)
        self.k.issue(first, self.stage(first), is_partial=True)
        if self.num_stages > 1:
            self.v.issue(first, self.stage(first), is_partial=True)
        commit()

    @cute.jit
    def before_scores(self, n_block, is_first: cutlass.Constexpr[bool]):
        """K_n is there; is_first: n_block may be the first block, which may be a partial one."""
        wait_for_all()
        if cutlass.const_expr(self.num_stages == 1):
            self.v.issue(n_block, 0, is_first)
        elif n_block > self.blocks.n_min:
            self.k.issue(n_block - 1, self.stage(n_block - 1), False)
            self.v.issue(n_block - 1, self.stage(n_block - 1), False)
        commit()

    @cute.jit
    def before_softmax(self, n_block):
        """V_n is there."""
        if cutlass.const_expr(self.num_stages == 1):
            wait_for_all()
            if n_block > self.blocks.n_min:
                self.k.issue(n_block - 1, 0, False)
            commit()
