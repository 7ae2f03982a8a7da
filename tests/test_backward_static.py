"""What can be said of the speed of the backward kernels without a GPU: from their SASS."""

import pytest

from fa3.inspect.cli import inspect
from fa3.kernels.bwd_signature import BwdSignature
from fa3.kernels.config import SMEM_LIMIT
from fa3.launch import tuning
from perf import static, variants

# head dims -> at most so many issue slots per exponential in the steady loop without a mask
# (flash-attn-4 4.0.0b36: 10.1, 12.2, 11.5, 18.0, 19.1, 31.6; cuDNN 9.2, 11.3, 11.9, 18.1, -, 26.4)
SLOTS = {
    (64, 64): 8.6,
    (96, 96): 11.5,
    (128, 128): 12.0,
    (192, 128): 14.7,
    (192, 192): 15.0,
    (256, 256): 22.6,
}
VARIANTS = variants.backward() + variants.backward_with_options()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_lean(variant, device):
    signature = variant.signature
    found = inspect(signature)
    report, config = found.report, found.config
    assert report.warnings == ()  # of spills and serialised products
    assert (report.resources.frame, report.local.loads, report.local.stores) == (0, 0, 0)
    assert report.resources.registers * config.num_threads <= 65_536
    assert report.resources.static_smem + found.smem_bytes <= SMEM_LIMIT
    slots = report.slots_per_exponential
    limit = SLOTS[signature.head_dim, signature.head_dim_v]
    is_plain = signature.mask == "full" and not signature.deterministic
    assert slots <= (limit if is_plain else 1.07 * limit)
    assert static.worse(static.read()[variant.name], static.Line.of(found)) == []


def test_every_row_is_here():
    assert set(SLOTS) == set(tuning.BACKWARD)
    signatures = [variant.signature for variant in variants.backward()]
    kinds = {(x.head_dim, x.head_dim_v, x.mask) for x in signatures}
    assert len(kinds) == len(SLOTS) * len(variants.MASKS)


def test_the_others_of_a_call_spill_nothing_either(device):
    """The kernels before and after, by their widest rows."""
    found = inspect(BwdSignature("bf16", 256, 256, "full"))
    assert len(found.rest) == 2
    assert all((report.resources.frame, report.warnings) == (0, ()) for report in found.rest)
