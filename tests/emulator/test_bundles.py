"""Joining equal instructions must not change a bit of any register."""

import numpy as np
import pytest

from fa3.emulator.lowering import bundles
from fa3.emulator.lowering.segments import lower
from fa3.emulator.ptx import parse

from .ptx_runner import HEADER, launch

NUM_REGISTERS = 12
FORMS = (
    "add.f32 {d}, {a}, {b};",
    "mul.f32 {d}, {a}, {b};",
    "fma.rn.f32 {d}, {a}, {b}, {c};",
    "max.f32 {d}, {a}, {b};",
    "ex2.approx.ftz.f32 {d}, {a};",
    "add.ftz.f32 {d}, {a}, {b};",
    "mul.rn.ftz.f32 {d}, {a}, 0f00800000;",
    "fma.rn.ftz.f32 {d}, {a}, {b}, {c};",
    "min.ftz.f32 {d}, {a}, {b};",
    "setp.lt.ftz.f32 {p}, {a}, {b};",
    "mul.f32 {d}, {a}, 0f00800000;",
    "mul.f32 {d}, {a}, 0f3F000000;",
    "mul.f32 {d}, {a}, 0fBE800000;",
    "cvt.rn.bf16x2.f32 {d}, {a}, {b};",
    "cvt.rn.f16x2.f32 {d}, {a}, {b};",
    "and.b32 {d}, {a}, 1073741823;",
    "add.s32 {d}, {a}, {b};",
    "setp.lt.f32 {p}, {a}, {b};",
    "setp.geu.f32 {p}, {a}, {b};",
    "setp.gt.s32 {p}, {a}, 77;",
    "selp.f32 {d}, {a}, {b}, {p};",
    "selp.b32 {d}, {a}, 5, {p};",
    "mov.b32 {d}, {a};",
    "shl.b32 {d}, {a}, 1;",  # not plain: nothing moves across it
)


def program(seed: int, length: int = 150) -> str:
    """Random instructions on few registers, so that they depend on each other in every way."""
    rng = np.random.default_rng(seed)
    forms = rng.choice(len(FORMS), 4 + seed % 5, replace=False)
    lines = []
    for _ in range(length):
        names = {x: f"%r{1 + rng.integers(NUM_REGISTERS)}" for x in "abcd"}
        lines.append(FORMS[rng.choice(forms)].format(**names, p=f"%p{rng.integers(3)}"))
    return "\n".join(lines)


def run(body: str) -> np.ndarray:
    array = np.random.default_rng(9).standard_normal((NUM_REGISTERS, 128)).astype(np.float32)
    address = "mul.wide.u32 %rd1, %r0, 4; add.s64 %rd2, %rd0, %rd1;\n"
    load = "".join(f"ld.global.b32 %r{i + 1}, [%rd2+{512 * i}];\n" for i in range(NUM_REGISTERS))
    store = "".join(f"st.global.b32 [%rd2+{512 * i}], %r{i + 1};\n" for i in range(NUM_REGISTERS))
    launch(address + load + body + store, array)
    return array.view(np.uint32)


@pytest.mark.parametrize("seed", range(40))
def test_random_programs_give_the_same_bits(monkeypatch, seed):
    body = program(seed)
    monkeypatch.setattr(bundles, "SMALLEST", 2)
    joined = run(body)
    monkeypatch.setattr(bundles, "SMALLEST", 10**9)
    np.testing.assert_array_equal(joined, run(body))


def lines_of(body: str) -> list[str]:
    kernel = parse(HEADER + body + "\nret;\n}\n").kernels["k"]
    lowered = lower(kernel)
    return [line for _, line in lowered._body(0, True)[0]]


def test_an_interleaved_softmax_becomes_a_few_operations():
    body = "".join(
        f"fma.rn.f32 %r{10 + 2 * i}, %r{10 + 2 * i}, %r1, %r2;\n"
        f"ex2.approx.ftz.f32 %r{11 + 2 * i}, %r{10 + 2 * i};\n"
        for i in range(16)
    )
    joined = [line for line in lines_of(body) if line.startswith("w.floats")]
    assert joined == [
        "w.floats[10:41:2]=fma(w.floats[10:41:2],w.floats[1],w.floats[2])",
        "w.floats[11:42:2]=flush(exp2(w.floats[10:41:2]))",
    ]


def test_different_constants_are_joined_as_a_column():
    body = "".join(f"setp.lt.s32 %p{i}, %r1, {3 * i};\n" for i in range(8))
    (line,) = [x for x in lines_of(body) if x.startswith("w.predicates")]
    assert line.startswith("w.predicates[0:8:1]=less(w.ints[1],")


def test_guarded_instructions_stay_where_they_are():
    body = "".join(f"@%p1 add.f32 %r{10 + i}, %r1, %r2;\n" for i in range(8))
    assert not [line for line in lines_of(body) if line.startswith("w.floats")]
