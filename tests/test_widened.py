"""16-bit queries beside a cache of bytes: accuracy, what is written, what is refused."""

import pytest

from . import test_kvcache
from .cache_cases import CacheCase


@pytest.mark.parametrize(
    "case",
    [
        CacheCase(cache="e4m3"),
        CacheCase(pages=0, num_new=2, cache="e4m3", dtype="fp16", head_dim=128, head_dim_v=128),
    ],
    ids=str,
)
def test_first_light(case, device):
    test_kvcache._check(case, device)
