"""cp.async: 16 bytes of global memory to shared memory, without a detour by registers."""

import cutlass.cute as cute
from cutlass import Int32, Int64


def copy_chunk(target: Int32, source: Int64, size: Int32):
    """16 bytes, of which `size` are read and the others zero."""
    cute.arch.inline_ptx(
        "cp.async.cg.shared.global.L2::128B [{$r0}], [{$r1}], 16, {$r2};",
        read_only_args=[target, source, size],
    )
