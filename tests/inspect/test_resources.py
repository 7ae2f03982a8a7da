"""Cubins that are compiled here, for sm_90a and without a GPU."""

import pytest

from fa3 import inspect
from fa3.inspect import resources
from fa3.inspect.elf import Cubin
from fa3.launch import jit
from tests.inspect.tiny_local import ENTRIES, Nothing
from tests.tiny_kernel import TinyConfig, TinySignature


@pytest.fixture(scope="module")
def scale() -> bytes:
    """A kernel of 64 threads that needs next to nothing."""
    return jit.artifacts("tests.tiny_kernel:Scale", TinySignature(), TinyConfig(64)).cubin


@pytest.fixture(scope="module")
def permute() -> bytes:
    """A kernel of 64 x 2 threads with an array in local memory."""
    return jit.artifacts("tests.inspect.tiny_local:Permute", Nothing(), Nothing()).cubin


def test_resources_of_a_small_kernel(scale):
    image = Cubin.parse(scale)
    (name,) = image.kernels()
    r = resources.read(image, name)
    assert (r.sm, r.threads, r.frame, r.static_smem, r.named_barriers) == (90, 64, 0, 0, 0)
    assert 8 <= r.registers <= 64
    assert r.constants >= 0x210  # parameters start there on sm_90
    report = inspect.analyse(scale)
    assert r.code == 16 * report.instructions


def test_the_architecture_of_a_cubin_of_cuda_12(scale):
    """ABI version 7 has it in the lowest byte of the flags, 8 in the next one."""
    assert Cubin.parse(scale).sm == 90
    older = bytearray(scale)
    older[8], older[48:52] = 7, (0x5A0D5A).to_bytes(4, "little")
    assert Cubin.parse(bytes(older)).sm == 90


def test_a_report_on_a_kernel_without_matrix_products(scale):
    report = inspect.analyse(scale)
    assert report.mmas == 0
    assert report.steady is None
    assert report.register_changes == ()
    assert report.warnings == ()
    assert "main loop         none" in str(report)


def test_local_memory_is_seen_in_the_elf_and_in_the_code(permute):
    report = inspect.analyse(permute)
    assert report.resources.threads == 128
    assert report.resources.frame >= 4 * ENTRIES
    assert report.local.stores >= 1
    assert report.local.loads >= 1
    assert report.local.spill_store_bytes == report.local.spill_load_bytes == 0
    (warning,) = report.warnings
    assert warning.startswith("local memory:")


def test_a_kernel_that_is_not_there_is_named(scale):
    with pytest.raises(ValueError, match="no kernel 'nobody' in the cubin, it has"):
        resources.read(Cubin.parse(scale), "nobody")
    with pytest.raises(ValueError, match="kernel='nobody' leaves 0"):
        inspect.analyse(scale, "nobody")


@pytest.mark.parametrize(
    "image", [b"", b"\x7fELF", b"PK\x03\x04" + bytes(100), b"\x7fELF\x02\x01" + bytes(100)]
)
def test_what_is_no_cubin_is_refused(image):
    with pytest.raises(ValueError, match="not a cubin"):
        inspect.analyse(image)


def test_a_cut_off_cubin_is_refused(scale):
    with pytest.raises(ValueError, match="damaged cubin"):
        inspect.analyse(scale[: len(scale) // 2])


def test_a_cubin_for_another_architecture_is_refused(scale):
    flags = 48  # offset of e_flags, whose second byte is the SM version
    other = scale[: flags + 1] + bytes([75]) + scale[flags + 2 :]
    with pytest.raises(ValueError, match="for sm_75, this reads sm_80, .*, sm_90"):
        inspect.analyse(other)
