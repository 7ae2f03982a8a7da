"""printf and assert in kernels, and the local memory that carries their arguments."""

import ctypes

import numpy as np
import pytest
import torch

from fa3.emulator.errors import KernelError, Misaligned, OutOfBounds, Unsupported

from .ptx_runner import HEADER, lanes, launch, prepared


def string(name: str, text: str) -> str:
    numbers = ", ".join(str(b) for b in text.encode() + b"\0")
    return f".global .align 1 .b8 {name}[{len(text.encode()) + 1}] = {{{numbers}}};\n"


def header(**strings: str) -> str:
    version, entry = HEADER.split(".visible", 1)
    return version + "".join(string(*item) for item in strings.items()) + ".visible" + entry


def call(store_arguments: str, text: str = "text") -> str:
    """As the compiler writes it; %rd1 is the address of the arguments."""
    return f"""
        .local .align 8 .b8 depot[64]; .reg .b64 %SP; .reg .b64 %SPL;
        mov.b64 %SPL, depot; cvta.local.u64 %SP, %SPL; add.u64 %rd1, %SPL, 0; add.u64 %rd2, %SP, 0;
        {store_arguments}
        {{ // callseq 0, 0
        .param .b64 param0; .param .b64 param1; .param .b32 retval0;
        st.param.b64 [param1], %rd2;
        mov.b64 %rd3, {text}; cvta.global.u64 %rd4, %rd3;
        st.param.b64 [param0], %rd4;
        call.uni (retval0), vprintf, (param0, param1);
        ld.param.b32 %r9, [retval0];
        }}
    """


I, L, D = (("b32", 4, "<i4"), ("b64", 8, "<i8"), ("b64", 8, "<f8"))
FORMATS = [
    ("plain 100%%\n", []),
    ("%d|%5d|%-5d|%05d|%+d", [(I, -7), (I, 42), (I, 42), (I, 42), (I, 42)]),
    ("%u|%x|%X|%#x|%08x|%o", [(I, -1), (I, 48879), (I, 48879), (I, 255), (I, 255), (I, 8)]),
    ("%hd|%hhu|%c", [(I, 70000), (I, 511), (I, 65)]),
    ("%lld|%llu|%ld|%016llx", [(L, -(2**40)), (L, -1), (L, 2**40), (L, 2**40)]),
    ("%d %lld %d %f", [(I, 1), (L, 2), (I, 3), (D, 4.0)]),
    ("%f|%.2f|%8.3f|%e|%g|%G", [(D, 1.5), (D, 2.345), (D, -1.0), (D, 1e10), (D, 1e-7), (D, 3.0)]),
    ("%f %f %g", [(D, float("nan")), (D, float("inf")), (D, float("-inf"))]),
    ("%*d|%.*f", [(I, 6), (I, 42), (I, 1), (D, 2.25)]),
]


@pytest.mark.parametrize("text, arguments", FORMATS, ids=[text for text, _ in FORMATS])
def test_printf_prints_what_c_prints(text, arguments, capsys):
    at, stores = 0, ""
    for (kind, size, dtype), value in arguments:
        at = -(-at // size) * size
        bits = int.from_bytes(np.array(value, dtype).tobytes(), "little")
        register = "%r1" if size == 4 else "%rd5"
        stores += f"mov.{kind} {register}, {bits}; st.local.{kind} [%rd1+{at}], {register};\n"
        at += size
    array = np.zeros(1, np.uint32)
    body = call(stores) + "st.global.b32 [%rd0], %r9;"
    launch(body, array, threads=1, header=header(text=text), checks=("uninit", "race"))
    buffer = ctypes.create_string_buffer(256)
    to_c = {I: ctypes.c_int, L: ctypes.c_longlong, D: ctypes.c_double}
    given = [to_c[kind](value) for kind, value in arguments]
    ctypes.CDLL(None).snprintf(buffer, 256, text.encode(), *given)
    assert capsys.readouterr().out == buffer.value.decode()
    assert array[0] == len(arguments)


def test_printf_of_strings_and_pointers(capsys):
    stores = """mov.b64 %rd3, word; cvta.global.u64 %rd4, %rd3; st.local.b64 [%rd1], %rd4;
        mov.b64 %rd5, 4660; st.local.b64 [%rd1+8], %rd5;"""
    strings = header(text="%s at %p", word="hällo")
    launch(call(stores), np.zeros(1, np.uint32), threads=1, header=strings)
    assert capsys.readouterr().out == "hällo at 0x1234"


def test_every_lane_that_comes_by_prints_its_own(capsys):
    body = "setp.gt.u32 %p1, %r0, 129; @!%p1 bra END;"
    body += call("st.local.b32 [%rd1], %r0;") + "END:"
    told = launch(
        body, np.zeros(1, np.uint32), threads=132, header=header(text="%d\n"), grid=3, processes=2
    )
    assert capsys.readouterr().out == "130\n131\n" * 3
    assert (told["processes"], told["serial"]) == (1, "printf")


def test_an_argument_that_nobody_passed():
    with pytest.raises(OutOfBounds, match="printf reads its argument 13 outside of local memory"):
        launch(call(""), np.zeros(1), threads=1, header=header(text="%lld" * 13))


def test_a_failed_assertion_is_quoted():
    body = """{ .param .b64 p0; .param .b64 p1; .param .b32 p2; .param .b64 p3; .param .b64 p4;
        mov.b64 %rd1, message; st.param.b64 [p0], %rd1;
        mov.b64 %rd1, file; st.param.b64 [p1], %rd1; st.param.b32 [p2], 42;
        mov.b64 %rd1, function; st.param.b64 [p3], %rd1; st.param.b64 [p4], 1;
        call.uni __assertfail, (p0, p1, p2, p3, p4); }"""
    strings = header(message="x < y", file="kernel.py", function="attend")
    with pytest.raises(KernelError, match=r"assertion failed: x < y \(kernel.py:42 in attend\)"):
        launch(body, np.zeros(1), header=strings)


def test_other_functions_are_refused():
    with pytest.raises(Unsupported, match="call of the function malloc"):
        launch("call.uni malloc;", np.zeros(1))


DEPOT = ".local .align 8 .b8 depot[32]; mov.b64 %rd1, depot;"


def test_local_memory_is_each_threads_own():
    """Lane i stores at an element of its own and reads it back, and another that is zero."""
    x = np.arange(128, dtype=np.uint32) + 1000
    body = f"""{DEPOT} and.b32 %r3, %r0, 7; mul.wide.u32 %rd2, %r3, 4; add.u64 %rd3, %rd1, %rd2;
        st.local.b32 [%rd3], %r1; xor.b32 %r3, %r3, 1; mul.wide.u32 %rd2, %r3, 4;
        add.u64 %rd4, %rd1, %rd2; ld.local.b32 %r4, [%rd4]; cvta.local.u64 %rd5, %rd3;
        ld.b32 %r5, [%rd5]; ld.local.u8 %r6, [%rd3+1];
        add.u32 %r9, %r4, %r5; shl.b32 %r6, %r6, 16; add.u32 %r9, %r9, %r6;"""
    assert lanes(body, inputs=(x,)).tolist() == [v + ((v >> 8) << 16) for v in x.tolist()]
    pairs = f"""{DEPOT} st.local.v2.b32 [%rd1+8], {{%r1, %r0}}; setp.lt.u32 %p1, %r0, 5;
        @%p1 st.local.b32 [%rd1+12], %r1; ld.local.v2.b32 {{%r3, %r4}}, [%rd1+8];
        sub.u32 %r9, %r3, %r4;"""
    expected = [0 if i < 5 else 1000 for i in range(128)]
    assert lanes(pairs, inputs=(x,)).tolist() == expected


@pytest.mark.parametrize(
    "code, error, message",
    [
        ("st.local.b32 [%rd1+32], %r0;", OutOfBounds, "local write at 0x20..0x24 outside .* 0x20"),
        ("ld.local.b32 %r1, [%rd1+-4];", OutOfBounds, "local read at -0x4"),
        ("ld.local.b64 %rd2, [%rd1+4];", Misaligned, "8-byte local read at 0x4"),
    ],
)
def test_errors_in_local_memory(code, error, message):
    with pytest.raises(error, match=message):
        launch(DEPOT + code, np.zeros(1))


def test_constants_are_registered_for_the_launch_alone():
    given = prepared(call(""), np.zeros(1), threads=1, header=header(text="x"))
    before = len(given.memory)
    given.run()
    assert len(given.memory) == before


def test_cute_printf(emulator, compiled, capsys):
    import cutlass.cute as cute

    @cute.kernel
    def say(x: cute.Tensor):
        t = cute.arch.thread_idx()[0]
        if t < 2:
            cute.printf("t={} x={}", t, x[t])
            cute.printf("%u:%.1f", t, x[t])

    @cute.jit
    def run(x: cute.Tensor, stream):
        say(x).launch(grid=[1, 1, 1], block=[32, 1, 1], stream=stream)

    x = torch.tensor([0.5, 1.5] * 16)
    compiled(run, x)(x)
    lines = capsys.readouterr().out.split()
    assert lines == "t=0 x=0.500000 t=1 x=1.500000 0:0.5 1:1.5".split()
