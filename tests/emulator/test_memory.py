"""mbarriers, named regions, tensor maps and swizzles."""

import ctypes
import types

import numpy as np
import pytest

from fa3.emulator.errors import BarrierMisuse, Deadlock, KernelError, OutOfBounds, Unsupported
from fa3.emulator.memory.bulk import swizzled_chunks
from fa3.emulator.memory.mbarrier import MBarrier
from fa3.emulator.memory.regions import GlobalMemory
from fa3.emulator.memory.tensormap import TensorMap

from .ptx_runner import launch


def test_a_fresh_mbarrier_is_in_phase_0():
    barrier = MBarrier(2)
    assert barrier.passed(1, parity=True) and not barrier.passed(0, parity=True)


def test_a_phase_completes_when_arrivals_and_bytes_are_in():
    barrier = MBarrier(1)
    barrier.tx -= 64  # data may come before they are expected
    barrier.settle()
    assert barrier.phase == 0
    barrier.tx += 64
    barrier.pending -= 1
    barrier.settle()
    assert barrier.phase == 1 and barrier.pending == 1
    assert barrier.passed(0, parity=True) and not barrier.passed(1, parity=True)
    assert barrier.passed(0, parity=False) and not barrier.passed(1, parity=False)


INIT = """setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared.b64 [buffer], 128;
    bar.sync 0;
"""


def test_waiting_threads_see_what_was_written_before_the_arrivals():
    code = (
        INIT
        + """
        shl.b32 %r1, %r0, 2; mov.u32 %r2, buffer; add.s32 %r3, %r2, %r1;
        st.shared.b32 [%r3+64], %r0;
        mbarrier.arrive.shared.b64 %rd1, [buffer];
        $WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [buffer], 0;
        @!%p2 bra $WAIT;
        sub.s32 %r4, %r2, %r1;
        ld.shared.b32 %r5, [%r4+572];
        mul.wide.u32 %rd2, %r0, 4; add.s64 %rd3, %rd0, %rd2; st.global.b32 [%rd3], %r5;"""
    )
    array = np.zeros(128, np.uint32)
    launch(code, array)
    assert array.tolist() == list(range(127, -1, -1))


def test_test_wait_returns_false_without_waiting():
    code = (
        INIT
        + """
        mbarrier.test_wait.parity.shared.b64 %p2, [buffer], 0;
        selp.b32 %r1, 5, 6, %p2; st.global.b32 [%rd0], %r1;"""
    )
    array = np.zeros(4, np.uint32)
    launch(code, array)
    assert array[0] == 6


WAIT = "$W: mbarrier.try_wait.parity.shared.b64 %p2, [buffer], 0; @!%p2 bra $W;"


@pytest.mark.parametrize(
    "code, error, message",
    [
        (INIT + WAIT, Deadlock, r"mbarrier 0x0 parity 0 \(phase 0, 128 of 128 arrivals"),
        (INIT + "mbarrier.arrive.shared.b64 %rd1, [buffer], 129;", BarrierMisuse, "more arrivals"),
        ("mbarrier.arrive.shared.b64 %rd1, [buffer+8];", BarrierMisuse, "was not initialised"),
        ("mbarrier.init.shared.b64 [buffer], 0;", BarrierMisuse, "count 0"),
        ("mbarrier.init.shared.b64 [buffer+4], 1;", KernelError, "8-byte aligned"),
    ],
)
def test_mbarrier_errors(code, error, message):
    with pytest.raises(error, match=message):
        launch(code, np.zeros(4, np.uint32))


def test_regions_merge_only_where_they_overlap():
    block = (ctypes.c_uint8 * 4096)()
    base = ctypes.addressof(block)
    memory = GlobalMemory()
    first = memory.add(base, 100)
    second = memory.add(base + 50, 100)
    memory.add(base + 150, 50)
    assert memory.find(base, base + 150).end == base + 150
    with pytest.raises(OutOfBounds):
        memory.find(base + 140, base + 160)
    memory.remove(second)
    with pytest.raises(OutOfBounds, match="100 bytes after the start"):
        memory.find(base + 100, base + 104)
    memory.remove(first)
    memory.remove(first)  # twice is harmless
    assert len(memory) == 1


def test_empty_ranges_are_nowhere():
    memory = GlobalMemory()
    memory.add(4096, 0)
    with pytest.raises(OutOfBounds, match="none is registered"):
        memory.find(4096, 4097)


@pytest.mark.parametrize("mask, width", [(0, 16), (1, 32), (3, 64), (7, 128)])
def test_swizzles_permute_the_chunks_of_a_row_by_its_number(mask, width):
    """In rows of `width` bytes, chunk c of row r is found at chunk c ^ (r / (128 / width))."""
    chunks = swizzled_chunks(2048, 2048, mask)
    assert sorted(chunks) == list(range(128, 256))
    for logical, physical in enumerate(chunks.tolist()):
        row, column = divmod(logical * 16, width)
        expected = (column // 16) ^ ((row * width // 128) & mask)
        assert physical - 128 == (row * width) // 16 + expected


def tensor_map(array, box, *, swizzle=0, nan=0, code=6):
    """The 128 bytes that host code writes for a C-contiguous array of up to 5 dimensions."""
    blob = np.zeros(128, np.uint8)
    words = blob.view(np.uint32)
    words[:2] = np.array([array.ctypes.data], np.uint64).view(np.uint32)
    words[2] = 2 | (array.ndim - 1) << 4 | code << 7 | swizzle << 13 | nan << 16
    for i, (n, stride) in enumerate(zip(array.shape[::-1], array.strides[::-1], strict=True)):
        words[8 + i] = n - 1
        if i:
            words[2 + i] = stride >> 4
    blob[55 : 55 + array.ndim] = np.array(box[::-1]) - 1
    return blob


@pytest.fixture
def matrix():
    array = np.arange(40 * 24, dtype=np.float16).reshape(40, 24)
    memory = GlobalMemory()
    memory.add(array.ctypes.data, array.nbytes)
    return types.SimpleNamespace(array=array, memory=memory)


def test_boxes_read_zeros_or_nan_outside_the_tensor(matrix):
    box = TensorMap(tensor_map(matrix.array, (16, 16)), matrix.memory)
    got = box.read([16, 32]).view(np.float16).reshape(16, 16)
    expected = np.zeros((16, 16), np.float16)
    expected[:8, :8] = matrix.array[32:, 16:]
    np.testing.assert_array_equal(got, expected)
    outside = TensorMap(tensor_map(matrix.array, (16, 16), nan=1), matrix.memory).read([-16, 0])
    assert np.isnan(outside.view(np.float16)).all()


def test_a_box_behind_the_rows_of_a_ragged_tensor_is_meant_to_be_empty():
    """Modes (columns, rows, ends): rows and ends have one stride."""
    box = TensorMap.__new__(TensorMap)
    box.dims, box.strides, box.box = [64, 10, 11], [2, 128, 128], [64, 8, 1]
    assert box.is_no_row([0, 10, 7])
    assert not box.is_no_row([0, 18, 7])
    assert not box.is_no_row([0, 9, 7])
    box.strides = [2, 128, 1280]
    assert not box.is_no_row([0, 10, 7])


def test_boxes_are_written_and_reduced_inside_the_tensor_only(matrix):
    box = TensorMap(tensor_map(matrix.array, (16, 16)), matrix.memory)
    expected = matrix.array.copy()
    ones = np.ones(256, np.float16).view(np.uint8)
    box.write([16, 32], ones, None)
    expected[32:, 16:] = 1
    box.write([-8, -8], ones, "add")
    expected[:8, :8] += np.float16(1)
    np.testing.assert_array_equal(matrix.array, expected)


def test_a_tensor_map_over_unregistered_memory_is_an_error(matrix):
    other = np.zeros((8, 8), np.float16)
    box = TensorMap(tensor_map(other, (8, 8)), matrix.memory)
    with pytest.raises(OutOfBounds, match=r"dims \[8, 8\].*box \[8, 8\] at \[0, 0\]"):
        box.read([0, 0])


@pytest.mark.parametrize(
    "word, value, error, message",
    [
        (2, 0, KernelError, "corrupt"),
        (2, 2 | 1 << 4 | 6 << 7 | 5 << 13, Unsupported, "swizzle"),
        (13, 1, Unsupported, "element strides"),
    ],
)
def test_tensor_maps_that_are_refused(matrix, word, value, error, message):
    blob = tensor_map(matrix.array, (16, 16))
    blob.view(np.uint32)[word] = value
    with pytest.raises(error, match=message):
        TensorMap(blob, matrix.memory)


@pytest.mark.parametrize("checks, start", [((), 0), (("poison",), 0xFFFFFFFF)])
def test_a_cta_finds_no_registers_of_the_one_before(checks, start):
    """Only CTA 0 writes %r9; and %rd8, which starts as 0; all store both."""
    out = np.full((3, 2), 7, np.uint64)
    body = """
        mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0; @%p1 bra STORE;
        mov.u32 %r9, 5; mov.u64 %rd8, 6;
        STORE: mad.wide.u32 %rd1, %r1, 16, %rd0;
        cvt.u64.u32 %rd2, %r9; st.global.b64 [%rd1], %rd2; st.global.b64 [%rd1+8], %rd8;
    """
    launch(body, out, 32, grid=3, checks=checks)
    assert out.tolist() == [[5, 6], [start, 0], [start, 0]]
