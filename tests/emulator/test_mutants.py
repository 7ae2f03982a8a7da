"""Mutation runs: what is taken out of a kernel, and that it is noticed."""

import pytest
import torch

from fa3.emulator import __main__ as cli
from fa3.emulator.mutation import Judge, mutants

from .ptx_runner import HEADER

BODY = """
    .loc 1 7 0
    wgmma.fence.sync.aligned;
    bar.sync 1, 128;
    .loc 1 8 0
    $WAIT: mbarrier.try_wait.parity.shared.b64 %p1, [buffer], 0;
    @!%p1 bra $WAIT;
    @%p2 mbarrier.arrive.shared.b64 _, [buffer];
    cp.async.bulk.commit_group;
    add.s32 %r1, %r0, 1;
    ret;
}
.file 1 "kernel.py"
"""


def test_one_instruction_is_taken_out_at_a_time():
    found = mutants(HEADER + BODY)
    assert [m.kind for m in found] == ["fence", "barrier", "wait", "arrive", "commit"]
    assert [m.place for m in found][:3] == [("kernel.py", 7), ("kernel.py", 7), ("kernel.py", 8)]
    for m in found:
        before, after = m.ptx.split("\n"), m.edited().split("\n")
        changed = [i for i, (x, y) in enumerate(zip(before, after, strict=True)) if x != y]
        assert changed == [m.line]
    waits = found[2].edited().split("\n")[found[2].line]
    assert waits == "    $WAIT: setp.eq.u32 %p1, 0, 0;", "the wait succeeds at once"


def test_a_mutant_is_reached_if_the_call_itself_reaches_it(device):
    """Whatever other calls of the kernel did before: one of more key blocks runs its loop."""
    import fa3

    def reached(s_k: int) -> int:
        q, k = torch.randn(1, 64, 1, 64).bfloat16(), torch.randn(1, s_k, 1, 64).bfloat16()
        judge = Judge(lambda: [fa3.flash_attn_func(q, k, k)], seeds=())
        return sum(map(judge.reaches, judge.mutants))

    few = reached(100)
    assert few < reached(400)
    assert few == reached(100)


def test_a_sample_of_the_kernels_mutants_is_caught(device, capsys):
    """The same draws every time; all of them: python -m fa3.emulator mutants."""
    samples = {"forward-causal": 4, "fp8-causal": 3, "ragged-fp8": 3, "backward-full": 3}
    for kernel, sample in samples.items():
        assert cli.main(["mutants", "--kernel", kernel, "--sample", str(sample)]) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        survivors = [line for line in lines if "SURVIVES" in line]
        assert last == f"caught {sample - len(survivors)} of {sample}"
        assert len(survivors) <= 2


@pytest.mark.parametrize(
    "option, value, message",
    [("--kernel", "nonsense", "forward-causal"), ("--sample", "0", "--sample is 0, expected at")],
)
def test_wrong_options_are_refused(option, value, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(["mutants", option, value])
    assert message in capsys.readouterr().err
