"""The sweep's cases and their count of operations."""

import pytest

from perf.cases import BACKWARD, PASSES, TRAINING, Case, flops, paper_cases, visible_pairs


def count(s_q, s_k, left, right):
    """Every pair, one by one."""
    offset = s_k - s_q
    return sum(
        (left < 0 or j >= i + offset - left) and (right < 0 or j <= i + offset + right)
        for i in range(s_q)
        for j in range(s_k)
    )


@pytest.mark.parametrize("left, right", [(-1, -1), (-1, 0), (0, 0), (3, 0), (2, 5), (100, 100)])
@pytest.mark.parametrize("s_q, s_k", [(1, 1), (7, 7), (5, 12), (12, 5), (16, 1)])
def test_visible_pairs_counts_every_pair(s_q, s_k, left, right):
    assert visible_pairs(s_q, s_k, left, right) == count(s_q, s_k, left, right)


def test_paper_setting():
    """16k tokens and hidden size 2048 make the same 4 * 16k * 2048 * length operations at any d."""
    for head_dim in (64, 128, 256):
        for length in (512, 16_384):
            case = Case.paper("bf16", head_dim, False, length)
            assert case.batch * case.length == 16_384
            assert case.heads * case.head_dim == 2_048
            assert flops(case) == 4 * 16_384 * 2_048 * length


def test_causal_counts_half():
    full, causal = (Case.paper("bf16", 128, c, 4096) for c in (False, True))
    assert flops(causal) == flops(full) / 2


@pytest.mark.parametrize("causal", [False, True])
def test_window_counts_its_pairs(causal):
    case = Case("bf16", 64, causal, 100, 2, 3, window=(10, 4))
    pairs = count(100, 100, 10, 0 if causal else 4)
    assert flops(case) == 4 * 2 * 3 * 64 * pairs


def test_paper_cases_are_all_different():
    grid = ("bf16", "e4m3"), (64, 128), (False, True), (512, 1024, 2048)
    cases = paper_cases(*grid)
    assert len(cases) == len(set(cases)) == 12 * 4
    assert len({(case.of_pass, str(case)) for case in cases}) == 12 * 4
    assert {case.of_pass for case in cases} == set(PASSES)
    assert paper_cases(*grid, [BACKWARD]) == [x for x in cases if x.of_pass == BACKWARD]


def test_gradients_take_five_products_more_for_two():
    of = [flops(Case.paper("bf16", 64, True, 512, gradients)) for gradients in ("", BACKWARD)]
    both = flops(Case.paper("bf16", 64, True, 512, TRAINING))
    assert of[1] == 2.5 * of[0] and both == sum(of)
