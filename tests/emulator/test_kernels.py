"""Small CuTe DSL kernels, compiled as for a GPU, against torch; with every check on."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _checked(emulator):
    with emulator.options(checks=emulator.ALL_CHECKS):
        yield


def test_elementwise(compiled):
    a, b = torch.randn(300), torch.randn(300)
    c = torch.zeros(300)
    compiled("add", a, b, c)(a, b, c)
    assert torch.equal(c, a + b)


def test_shared_memory(compiled):
    a = torch.arange(128, dtype=torch.int32)
    compiled("reverse", a)(a)
    assert a.tolist() == list(range(127, -1, -1))


def test_tma_both_ways_with_ragged_edges(compiled):
    source, target = torch.randn(100, 200).half(), torch.full((100, 200), 7.0).half()
    compiled("double", source, target)(source, target)
    assert torch.equal(target, 2 * source)


@pytest.mark.parametrize("majors", ["kk", "mk", "kn", "mn"])
def test_wgmma(compiled, majors):
    a, b = torch.randint(-4, 5, (2, 64, 64)).half()
    c = torch.zeros(64, 64)
    if majors[0] == "m":
        a = a.t()
    if majors[1] == "n":
        b = b.t()
    compiled("gemm", a, b, c, majors=majors)(a, b, c)
    assert torch.equal(c, a.float() @ b.float().t())


@pytest.mark.parametrize("blocks", [1, 4])
def test_dynamic_scheduling_by_atomics(compiled, blocks):
    """CTAs run one after another, so the first draws every ticket."""
    counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(10, dtype=torch.int32)
    compiled("tickets", counter, out, scalar=4)(counter, out, blocks)
    assert out.tolist() == [1] * 10
    assert counter.item() == 10 + blocks


def test_plain_compiled_and_implicitly_compiled_functions(emulator):
    """Without TVM-FFI: from_dlpack tensors, an explicit stream, and @cute.jit called directly."""
    import cuda.bindings.driver as cuda
    import cutlass.cute as cute
    from cutlass.cute.runtime import from_dlpack

    from . import kernels

    a, b, stream = torch.randn(200), torch.randn(200), cuda.CUstream(0)
    outputs = torch.zeros(2, 200)
    inputs = [from_dlpack(t).mark_layout_dynamic() for t in (a, b)]
    first, second = (from_dlpack(t).mark_layout_dynamic() for t in outputs)
    cute.compile(kernels.add, *inputs, first, stream)(*inputs, first, stream)
    kernels.add(*inputs, second, stream)
    assert torch.equal(outputs, (a + b).expand(2, -1))


def test_hardware_queries_see_the_chosen_number_of_sms(emulator):
    from cutlass.utils import HardwareInfo

    with emulator.options(sms=20):
        assert HardwareInfo().get_max_active_clusters(2) == 10
        assert HardwareInfo().get_device_multiprocessor_count() == 20
