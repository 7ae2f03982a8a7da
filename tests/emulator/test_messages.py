"""What errors say: where in the Python source, which warps and bytes, what was missing."""

import re

import numpy as np
import pytest
import torch

from fa3.emulator import Profile, errors, naming, source
from fa3.emulator.ptx import Kernel, parse
from fa3.emulator.settings import Schedule

from .ptx_runner import HEADER, launch
from .test_checks import line_of
from .test_races import SETUP, WAIT_FOR_LOAD

SOURCE = '''"""A kernel."""


def outer(x):
    def poll(flag):
        while flag == 0:
            pass

    return poll


class Kernel:
    def wait(self):
        return 1
'''


@pytest.fixture
def place(tmp_path):
    """(path of a source, PTX -> message of the error it ends in); `LINE n;` stands for a .loc."""
    path = tmp_path / "kernel.py"
    path.write_text(SOURCE)

    def run(error, body, threads=128, **options):
        text = re.sub(r"LINE (\d+);", r"\n.loc 1 \1 0\n", body)
        header = f'.file 1 "{path}"\n' + HEADER
        with pytest.raises(error) as found:
            launch(text, np.zeros(64, np.uint8), threads, header=header, **options)
        return str(found.value), found.value.source

    return path, run


def test_the_innermost_function_of_a_line(tmp_path):
    path = tmp_path / "kernel.py"
    path.write_text(SOURCE)
    functions = [source.function_at(str(path), n) for n in (1, 4, 5, 7, 9, 12, 14)]
    assert functions == ["", "outer", "poll", "poll", "outer", "", "wait"]
    assert source.line_at(str(path), 7) == "pass" and source.line_at(str(path), 99) == ""
    assert source.function_at(str(tmp_path / "missing.py"), 3) == ""
    (tmp_path / "broken.py").write_text("def f(:\n")
    assert source.function_at(str(tmp_path / "broken.py"), 1) == ""


def test_a_place_names_the_function(place):
    path, run = place
    message, where = run(errors.OutOfBounds, "LINE 9; ld.shared.b32 %r9, [buffer+4096];")
    assert f"at {path}:9 in outer (PTX line" in message and where == f"{path}:9"


def test_an_endless_loop_is_named_with_all_that_the_warps_do(place):
    """Warp 0 polls a word that nobody sets, warp 1 waits, warp 2 computes for ever, 3 has left."""
    path, run = place
    message, where = run(
        errors.Runaway,
        "shr.u32 %r1, %r0, 5; mov.u32 %r4, buffer; setp.eq.u32 %p1, %r0, 32;"
        "@%p1 mbarrier.init.shared.b64 [%r4], 1; bar.sync 0; setp.eq.u32 %p1, %r1, 1;"
        "@%p1 bra WAIT; setp.eq.u32 %p1, %r1, 2; @%p1 bra BUSY; setp.eq.u32 %p1, %r1, 3;"
        "@%p1 bra END;"
        "POLL: LINE 6; ld.volatile.global.b32 %r2, [%rd0]; LINE 7; setp.eq.u32 %p2, %r2, 0;"
        "@%p2 bra POLL; bra END;"
        "WAIT: LINE 14; mbarrier.try_wait.parity.shared.b64 %p2, [%r4], 0; @!%p2 bra WAIT; bra END;"
        "BUSY: LINE 9; add.u32 %r3, %r3, 1; bra BUSY; END:",
    )
    assert "more than 100000 instructions in one cluster: an endless loop?" in message
    loop = r"\n    in the loop of PTX lines \d+..\d+: "
    poll = f"{path}:6 in poll, {path}:7 in poll"
    assert re.search(rf"warps \[0\] \(32 lanes\): running at .*{loop}{poll}\n", message)
    assert re.search(
        rf"warps \[1\] \(32 lanes\): mbarrier 0x0 parity 0 \(phase 0, 1 of 1 arrivals .*{loop}"
        rf"{path}:14 in wait\n",
        message,
    )
    assert re.search(rf"warps \[2\] \(32 lanes\): running at .*{loop}{path}:9 in outer\n", message)
    assert "warps [3]: lanes of them have left" in message
    assert where == f"{path}:6"


def test_a_warp_may_poll_for_another_of_its_warpgroup():
    array = np.zeros(64, np.uint8)
    launch(
        "setp.lt.u32 %p1, %r0, 32; @!%p1 bra SET;"
        "POLL: ld.acquire.gpu.global.b32 %r2, [%rd0]; setp.eq.u32 %p2, %r2, 0; @%p2 bra POLL;"
        "bra END; SET: mov.b32 %r3, 1; st.release.gpu.global.b32 [%rd0], %r3; END:",
        array,
    )
    assert array[0] == 1


def test_a_poll_under_every_schedule_ends(place):
    _, run = place
    from fa3.emulator.settings import Schedule

    body = "POLL: ld.volatile.global.b32 %r2, [%rd0]; setp.eq.u32 %p2, %r2, 0; @%p2 bra POLL;"
    for kind in ("late", "random"):
        message, _ = run(errors.Runaway, body, schedule=Schedule(kind))
        assert "in the loop of PTX lines" in message


def test_a_deadlock_says_who_arrived_and_how_many_are_missing(place):
    _, run = place
    message, _ = run(
        errors.Deadlock,
        "mov.u32 %r4, buffer; setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [%r4], 2;"
        "bar.sync 0; and.b32 %r1, %r0, 31; setp.eq.u32 %p1, %r1, 0; setp.ge.u32 %p2, %r0, 64;"
        "@%p2 bra END; @%p1 mbarrier.arrive.shared.b64 _, [%r4]; @!%p1 bra REST;"
        "REST: setp.eq.u32 %p1, %r0, 32; @%p1 mbarrier.arrive.shared.b64 _, [%r4];"
        "LINE 14; WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [%r4], 1; @!%p3 bra WAIT; END:",
    )
    assert (
        "parity 1 (phase 1, 1 of 2 arrivals outstanding, no bytes expected; arrived in it: "
        "warps [1] of CTA (0, 0, 0); arrived in the phase before: warps [0, 1] of CTA (0, 0, 0))"
    ) in message
    assert "warps [2, 3]: lanes of them have left" in message
    assert "kernel.py:14 in wait (PTX line" in message


def test_a_named_barrier_says_who_arrived_and_how_many_are_missing(place):
    _, run = place
    message, _ = run(
        errors.Deadlock, "setp.lt.u32 %p1, %r0, 64; @%p1 bra END; bar.sync 1, 128; END:"
    )
    assert "64 of 128 threads arrived, those of warps [2, 3]; 64 are missing" in message


def test_messages_of_kernels_name_their_functions(emulator, compiled):
    a = torch.arange(128, dtype=torch.int32)
    with emulator.options(checks=("uninit",)), pytest.raises(emulator.Uninitialized) as found:
        compiled("reverse", a, sync=-1)(a)
    assert "shared memory at 0x1fc..0x1ff" in str(found.value)
    assert f"{line_of('_reverse', 'a[t] = s[')} in _reverse (PTX line" in str(found.value)

    x, y = torch.zeros(2, 64, 64).half()
    with emulator.options(checks=("proxy",)), pytest.raises(emulator.MissingProxyFence) as found:
        compiled("double", x, y, broken="fence")(x, y)
    assert re.search(
        r"written through the generic proxy by thread \d+, without fence.proxy.async since "
        rf"\S*{line_of('_double', 'tile[row, column] =')} in _double \(PTX line \d+: st.shared",
        str(found.value),
    )

    c = torch.zeros(64, 64)
    with emulator.options(checks=("wgmma",)), pytest.raises(emulator.RegisterInFlight) as found:
        compiled("gemm", x, y, c, broken="wait_group")(x, y, c)
    assert re.search(
        r"in flight \(no wait_group since \S*kernels.py:\d+ in _gemm \(PTX line \d+: wgmma.mma_",
        str(found.value),
    )


def test_a_deadlock_reads_the_same_in_every_order():
    body = SETUP + "setp.ge.u32 %p4, %r0, 128; @%p4 ret;" + WAIT_FOR_LOAD
    texts = set()
    for order in ({}, {"schedule": Schedule("random")}, {"profile": Profile()}):
        with pytest.raises(errors.Deadlock) as found:
            launch(body, np.zeros(1024, np.uint8), 256, **order)
        texts.add(str(found.value))
    assert len(texts) == 1 and "warps [4, 5, 6, 7]" in texts.pop()


STORAGE = """
import cutlass
import cutlass.cute as cute
from cutlass import memory


@cute.struct
class Storage:
    flags: cute.struct.MemRange[cutlass.Int64, 2]
    tile: cute.struct.Align[cute.struct.MemRange[cutlass.Float32, 8], 128]


def ring(smem, count):
    barriers = smem.allocate_array(cutlass.Int64, count)
    return barriers, smem.allocate_array(cutlass.Float32, 4, byte_alignment=64)


@cute.kernel
def _kernel(a: cute.Tensor):
    smem = memory.SmemAllocator()
    storage = smem.allocate(Storage)
    k, v = (smem.allocate_array(cutlass.Int32, n) for n in (1, 3))
    keys = ring(smem, 2)
    x = storage.tile.data_ptr()[0] + keys[1][0] + k[0] + v[0]
    a[0] = x + keys[0][0].to(cutlass.Float32)


@cute.jit
def kernel(a: cute.Tensor):
    _kernel(a).launch(grid=[1, 1, 1], block=[32, 1, 1])
"""


def test_shared_memory_has_the_names_of_the_source(emulator, tmp_path):
    """A struct's fields, variables that share a statement, and what a function allocates."""
    import importlib.util

    import cutlass.cute as cute
    from cutlass.cute.runtime import from_dlpack

    (tmp_path / "storage_kernel.py").write_text(STORAGE)
    spec = importlib.util.spec_from_file_location("storage_kernel", tmp_path / "storage_kernel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    a = torch.zeros(1)
    compiled = cute.compile(module.kernel, from_dlpack(a))
    (kernel,) = parse(compiled.__ptx__).kernels.values()
    ranges = [(x.name, x.start, x.end) for x in kernel.allocations]
    assert ranges == [
        ("storage.flags", 0, 16),
        ("storage.tile", 128, 160),
        ("k", 256, 260),
        ("v", 260, 272),
        ("keys.barriers", 272, 288),
        ("keys", 320, 336),
    ]
    with emulator.options(checks=("uninit",)), pytest.raises(emulator.Uninitialized) as found:
        compiled(from_dlpack(a))
    assert re.search(r"shared memory at 0x\w+..0x\w+ \(\w+", str(found.value))
    with emulator.options(checks=()):
        compiled(from_dlpack(a))
    assert emulator.launches[-1]["smem"] == 336  # all of it has a place


def test_which_names():
    ranges = [naming.Range(0, 16, "a"), naming.Range(16, 32, ""), naming.Range(32, 64, "b")]
    kernel = Kernel("k", allocations=ranges, static_smem=256)

    def named(text, nbytes=64):
        return naming.named(text, kernel, nbytes)

    assert (
        named("reads shared memory 0x100..0x10f now") == "reads shared memory 0x100..0x10f (a) now"
    )
    assert named("shared memory at 0x10f..0x120") == "shared memory at 0x10f..0x120 (a, b)"
    assert named("mbarrier 0x120 parity") == "mbarrier 0x120 (b) parity"
    for unnamed in ("shared memory 0x110..0x11f", "shared memory 0x0..0xff", "global 0x100..0x10f"):
        assert named(unnamed) == unnamed
    # the kernel's launch has less than was laid out: the places are not these
    assert named("shared memory 0x100..0x10f", 48) == "shared memory 0x100..0x10f"
