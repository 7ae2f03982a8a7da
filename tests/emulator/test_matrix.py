"""wgmma descriptors against the address formulas of the PTX manual, and mma fragments."""

import numpy as np
import pytest

from fa3.emulator.errors import Unsupported
from fa3.emulator.matrix.descriptors import chunks

from .ptx_runner import launch

LAYOUTS = {0: 16, 3: 32, 2: 64, 1: 128}  # descriptor layout -> bytes of a swizzled row


def descriptor(start, lbo, sbo, layout):
    return start >> 4 | (lbo >> 4) << 16 | (sbo >> 4) << 32 | layout << 62


def element_address(desc, row, k, es, mn_major):
    """Byte address of element (row, k), one element at a time."""
    start, layout = (desc & 0x3FFF) << 4, desc >> 62 & 3
    lbo, sbo = (desc >> 16 & 0x3FFF) << 4, (desc >> 32 & 0x3FFF) << 4
    width = LAYOUTS[layout]
    if not mn_major:
        at = k * es
        offset = (
            (row // 8) * sbo + (row % 8) * width + (at if layout else (at // 16) * lbo + at % 16)
        )
    else:
        at = row * es
        outer, inner = (lbo, sbo) if layout else (sbo, lbo)
        offset = (at // width) * outer + at % width + (k % 8) * width + (k // 8) * inner
    address = start + offset
    swizzle = {16: 0, 32: 1, 64: 3, 128: 7}[width]
    return address ^ ((address >> 7 & swizzle) << 4)


@pytest.mark.parametrize("mn_major", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("es", [1, 2])
def test_operands_are_gathered_from_the_documented_addresses(layout, es, mn_major):
    desc = descriptor(1024 + 32 * (layout != 0), 2048, 1024, layout)
    rows, k = 64, 32 // es
    found = chunks((desc,), rows, es, mn_major)
    memory = (
        np.arange(64 * 1024 // es, dtype=f"u{es * 2}").astype(f"u{es}")
        if es == 1
        else np.arange(64 * 1024 // es, dtype=np.uint16)
    )
    got = memory.view(np.uint64).reshape(-1, 2)[found].reshape(len(found), -1).view(f"u{es}")
    got = got.T if mn_major else got
    expected = [
        [memory[element_address(desc, r, c, es, mn_major) // es] for c in range(k)]
        for r in range(rows)
    ]
    np.testing.assert_array_equal(got, expected)


def test_descriptors_join_along_k():
    descs = tuple(descriptor(1024 + 32 * i, 16, 1024, 1) for i in range(4))
    joined = chunks(descs, 64, 2, False)
    np.testing.assert_array_equal(joined, np.hstack([chunks((d,), 64, 2, False) for d in descs]))


def test_a_base_offset_is_refused():
    with pytest.raises(Unsupported, match="base offset"):
        chunks((descriptor(0, 16, 1024, 1) | 1 << 49,), 64, 2, False)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma_m16n8k16(kind):
    """Fragments of one warp: lane 4 g + q holds A[g + 8 i, 2 q + p + 8 j], B[2 q + p + 8 j, g]."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(-4, 5, s).astype(np.float32) for s in ((16, 16), (16, 8), (16, 8)))
    g, q, p = np.arange(32) // 4, np.arange(32) % 4, np.arange(2)

    def pack(values):
        """(32, 2) floats -> 32 registers of two halves"""
        if kind == "f16":
            return values.astype(np.float16).view(np.uint32)[:, 0]
        upper = values.astype(np.float32).view(np.uint32) >> 16
        return upper[:, 0] | upper[:, 1] << 16

    column = 2 * q[:, None] + p
    fragments = [pack(a[g[:, None] + 8 * i, column + 8 * j]) for j in (0, 1) for i in (0, 1)]
    fragments += [pack(b[column + 8 * j, g[:, None]]) for j in (0, 1)]
    fragments += [c[g + 8 * i, 2 * q + x].view(np.uint32) for i in (0, 1) for x in (0, 1)]
    array = np.array(fragments + [np.zeros(32, np.uint32)] * 4, np.uint32)
    load = "".join(f"ld.global.b32 %r{10 + i}, [%rd2+{128 * i}];\n" for i in range(10))
    store = "".join(f"st.global.b32 [%rd2+{128 * (10 + i)}], %r{30 + i};\n" for i in range(4))
    launch(
        f"""mul.wide.u32 %rd1, %r0, 4; add.s64 %rd2, %rd0, %rd1;
        {load}
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r30,%r31,%r32,%r33}},
            {{%r10,%r11,%r12,%r13}}, {{%r14,%r15}}, {{%r16,%r17,%r18,%r19}};
        {store}""",
        array,
        threads=32,
    )
    d = np.zeros((16, 8), np.float32)
    for n, (i, x) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        d[g + 8 * i, 2 * q + x] = array[10 + n].view(np.float32)
    np.testing.assert_array_equal(d, a @ b + c)


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(trans):
    code = f"""mov.u32 %r1, buffer; shl.b32 %r2, %r0, 4; add.s32 %r3, %r1, %r2;
        mul.wide.u32 %rd1, %r0, 16; add.s64 %rd2, %rd0, %rd1;
        ld.global.v4.b32 {{%r4,%r5,%r6,%r7}}, [%rd2];
        st.shared.v4.b32 [%r3], {{%r4,%r5,%r6,%r7}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r4,%r5,%r6,%r7}}, [%r3];
        st.global.v4.b32 [%rd2], {{%r4,%r5,%r6,%r7}};"""
    matrices = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)
    array = matrices.copy()
    launch(code, array, threads=32)
    got = array.reshape(8, 4, 4, 2).transpose(2, 0, 1, 3).reshape(4, 8, 8)  # lane 4 g + q
    np.testing.assert_array_equal(got, matrices.swapaxes(1, 2) if trans else matrices)
