"""The generator of test cases keeps its promise."""

import itertools

import torch

from .cases import FACTORS, Bordered, Case, covering, make_inputs, pairwise
from .conftest import SEED


def test_pairwise_meets_every_pair():
    rows = pairwise(FACTORS, SEED)
    for a, b in itertools.combinations(FACTORS, 2):
        met = {(row[a], row[b]) for row in rows}
        assert met == set(itertools.product(FACTORS[a], FACTORS[b])), (a, b)


def test_pairwise_is_small():
    rows = pairwise(FACTORS, SEED)
    lower_bound = sorted(len(values) for values in FACTORS.values())[-2:]
    assert len(rows) < 1.5 * lower_bound[0] * lower_bound[1]


def test_repr_of_a_case_makes_it_again():
    for case in covering():
        assert eval(str(case), {"Case": Case}) == case


def test_borders_are_nan_and_aligned():
    case = Case(batch=2, s_q=3, s_k=5, head_dim_v=72)
    for layout in Bordered.LAYOUTS:
        for x in make_inputs(Case(**{**vars(case), "layout": layout}), torch.device("cpu")):
            assert torch.equal(x.tensor, x.values)
            assert x.tensor.data_ptr() % 16 == 0
            assert x.tensor.stride(-1) == 1
            inside = 1 if layout == "expanded" and x.tensor.stride(0) == 0 else case.batch
            count = x.values[:inside].numel()
            assert (~x.memory.isnan()).sum() == count
            x.assert_border_untouched(layout)


def test_a_stray_write_is_noticed():
    x = Bordered(torch.randn(1, 3, 2, 8).half(), "packed")
    x.memory[x.BORDER - 1] = 1.0
    try:
        x.assert_border_untouched("x")
    except AssertionError as error:
        assert "1 elements outside" in str(error)
    else:
        raise AssertionError("a write before the first element went unnoticed")
