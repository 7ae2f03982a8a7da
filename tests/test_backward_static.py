"""What can be said of the speed of the backward kernels without a GPU: from their SASS."""

import pytest

from fa3.inspect.report import Report, analyse
from fa3.kernels.bwd_signature import BwdSignature
from fa3.launch import dispatch, jit, tuning

# head dims -> at most so many issue slots per exponential in the steady loop without a mask
# (flash-attn-4 4.0.0b36: 10.1, 12.2, 11.5, 18.0, 19.1, 31.6; cuDNN 9.2, 11.3, 11.9, 18.1, -, 26.4)
SLOTS = {
    (64, 64): 8.8,
    (96, 96): 11.9,
    (128, 128): 12.5,
    (192, 128): 20.5,
    (192, 192): 21.1,
    (256, 256): 23.0,
}
MASKS = {"causal": ((64, 64), (128, 128), (256, 256)), "local": ((96, 96), (192, 192))}
VARIANTS = [
    *(BwdSignature("bf16", *dims, "full") for dims in tuning.BACKWARD),
    *(BwdSignature("fp16", *dims, mask) for mask, rows in MASKS.items() for dims in rows),
    BwdSignature("bf16", 64, 64, "causal", deterministic=True),
    # those that the tests of accuracy run
    BwdSignature("bf16", 64, 64, "causal", score="softcap"),
    BwdSignature("fp16", 128, 128, "local", score="softcap"),
    BwdSignature("bf16", 192, 128, "full", score="softcap"),
    BwdSignature("bf16", 64, 64, "causal", with_dq=False),
    BwdSignature("bf16", 192, 128, "local", with_dq=False),
]


def _report(signature: BwdSignature) -> Report:
    where = dispatch.BACKWARD[0].where
    return analyse(jit.artifacts(where, signature, tuning.backward(signature)).cubin)


@pytest.mark.parametrize("signature", VARIANTS, ids=str)
def test_lean(signature, device):
    report, config = _report(signature), tuning.backward(signature)
    assert report.warnings == ()  # of spills and serialised products
    assert (report.resources.frame, report.local.loads, report.local.stores) == (0, 0, 0)
    assert report.resources.registers * config.num_threads <= 65_536
    slots = report.steady.straight.per_exponential
    limit = SLOTS[signature.head_dim, signature.head_dim_v]
    assert slots <= (limit if signature.mask == "full" else 1.06 * limit)


def test_every_row_is_here():
    assert set(SLOTS) == set(tuning.BACKWARD)
