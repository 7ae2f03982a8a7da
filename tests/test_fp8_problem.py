"""One-byte inputs: an error names bad ones, good ones get a signature and a kernel call."""

import math
import re

import pytest
import torch

import fa3
from fa3 import ops
from fa3.call.problem import Layout, Options, Problem
from fa3.call.scales import Descales
from fa3.kernels.arguments import FwdArguments
from fa3.kernels.signature import Quantised

from .fp8_calls import DV, E4M3, E5M2, FORMS, H_K, H_Q, OUT_SHAPE, S_K, S_Q, SHIFT_SHAPE, B, D

SHAPES = {"q": (B, S_Q, H_Q, D), "k": (B, S_K, H_K, D), "v": (B, S_K, H_K, DV)}
ARGUMENTS = {**FORMS, "v_shift": {"channels": SHIFT_SHAPE}}
ALL_FORMS = [(name, form) for name, forms in FORMS.items() for form in forms if form != "none"]


def tensors(*dtypes, device="cpu", **shapes):
    dtypes = dtypes or (E4M3, E4M3, E4M3)
    shapes = {**SHAPES, **shapes}.items()
    return {
        name: torch.zeros(shape, dtype=dtype, device=device)
        for (name, shape), dtype in zip(shapes, dtypes, strict=True)
    }


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every kernel call."""
    seen = []
    monkeypatch.setattr(ops, "_kernel_of", lambda *_: (seen.append, 7, None, None, None))
    ops.plan_of.cache_clear()
    yield seen
    ops.plan_of.cache_clear()


@pytest.fixture
def refused(calls):
    """refused(error, words, **arguments): the call raises it, with all words, and runs nothing."""

    def check(error, words, **arguments):
        with pytest.raises(error) as caught:
            fa3.flash_attn_func(**{**tensors(), **arguments})
        message = str(caught.value)
        for word in words:
            assert re.search(rf"(?<![\w.]){re.escape(str(word))}(?!\w)", message), (word, message)
        assert calls == []

    return check


@pytest.mark.parametrize(
    ("dtypes", "words"),
    [
        ((E5M2, E5M2, E5M2), ["q", E5M2, E4M3, torch.int8]),
        ((torch.uint8, torch.uint8, E4M3), ["q", torch.uint8, E4M3, torch.int8]),
        ((E4M3, torch.bfloat16, E4M3), ["k", torch.bfloat16, E4M3, E5M2]),
        ((E4M3, torch.int8, E4M3), ["k", torch.int8, E4M3, E5M2]),
        ((torch.int8, E4M3, E4M3), ["k", E4M3, torch.int8]),
        ((torch.bfloat16, E4M3, torch.bfloat16), ["k", E4M3, torch.bfloat16]),
        ((torch.bfloat16, torch.bfloat16, E4M3), ["v", E4M3, torch.bfloat16]),
        ((E4M3, E4M3, torch.int8), ["v", torch.int8, E4M3, E5M2]),
        ((E4M3, E4M3, torch.float32), ["v", torch.float32, E4M3, E5M2]),
        ((torch.int8, torch.int8, torch.int8), ["v", torch.int8, E4M3, E5M2]),
    ],
    ids=str,
)
def test_dtypes_that_do_not_go_together(refused, dtypes, words):
    refused(TypeError, words, **tensors(*dtypes))


@pytest.mark.parametrize("d", [8, 24, 100, 272])
def test_head_dim(refused, d):
    words = ["head dim", d, 16, 256, E4M3]
    refused(ValueError, ["q", *words], **tensors(q=(2, 140, 4, d), k=(2, 200, 2, d)))
    refused(ValueError, ["v", *words], **tensors(v=(2, 200, 2, d)))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_strides_and_addresses(refused, name):
    x = tensors()[name]
    strided = x.new_zeros(*x.shape[:3], 2 * x.shape[3])[..., ::2]
    refused(ValueError, [name, "stride", 2, 1], **{name: strided})
    shifted = x.new_zeros(x.numel() + 16)[1 : x.numel() + 1].view(x.shape)
    refused(ValueError, [name, 1, 16, 0], **{name: shifted})


@pytest.mark.parametrize(("name", "form"), [*ALL_FORMS, ("v_shift", "channels")])
def test_descale_of_wrong_kind(refused, name, form):
    right = torch.ones(ARGUMENTS[name][form])
    for dtype in (torch.float16, torch.float64, torch.int32):
        refused(TypeError, [name, dtype, torch.float32], **{name: right.to(dtype)})
    refused(ValueError, [name, "meta", "cpu"], **{name: right.to("meta")})
    refused(TypeError, [name, "float", "torch.Tensor"], **{name: 1.0})
    grad = right.clone().requires_grad_()
    refused(NotImplementedError, [name, "requires_grad", "torch.no_grad"], **{name: grad})
    memory = torch.zeros(4 * right.numel() + 4, dtype=torch.uint8)
    odd = torch.frombuffer(memory.numpy(), dtype=torch.float32, count=right.numel(), offset=1)
    refused(ValueError, [name, 1, 4, 0], **{name: odd.view(right.shape)})


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize(
    "shape",
    [
        (),
        (2,),
        (2, 3),
        (1, 2),
        (2, 4),
        (2, 2, 3),
        (2, 2, 1),
        (2, 4, 4),
        (2, 2, 1, 64),
        (2, 2, 2, 48),
    ],
    ids=str,
)
def test_descale_of_wrong_shape(refused, name, shape):
    """The message lists the shapes that would do."""
    right = [x for x in ARGUMENTS[name].values() if x is not None]
    refused(ValueError, [name, shape, *right], **{name: torch.ones(shape)})


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_descales_of_16_bit_inputs(refused, name, dtype):
    refused(
        ValueError, [name, "q", dtype, None], **tensors(*3 * [dtype]), **{name: torch.ones(2, 2)}
    )


@pytest.mark.parametrize(("name", "form"), ALL_FORMS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.5, 0.0, -0.0], ids=str)
def test_values_of_descales(refused, calls, name, form, value):
    """The first of the wrong ones is named; without check_scales the kernel gets them."""
    descale = torch.ones(FORMS[name][form])
    flat = descale.view(-1)
    flat[2], flat[3] = value, -7.0
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(2), descale.shape))
    given = {name: descale.transpose(0, 1).contiguous().transpose(0, 1)}
    refused(ValueError, [name, value, index], check_scales=True, **given)
    fa3.flash_attn_func(**tensors(), **given)
    assert len(calls) == 1


def test_values_of_descales_that_are_right(calls):
    given = {name: torch.full(shape["head"], 1e-40) for name, shape in FORMS.items()}
    fa3.flash_attn_func(**tensors(), **given, check_scales=True)
    fa3.flash_attn_func(**tensors(), check_scales=True)
    assert len(calls) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_values_of_the_shift(refused, calls, value):
    """Any finite ones will do."""
    shift = torch.tensor([-1.5, 0.0, -0.0] * (DV // 3)).expand(SHIFT_SHAPE).clone()
    fa3.flash_attn_func(**tensors(), v_shift=shift, check_scales=True)
    shift[1, 0, 5], shift[1, 1, 3] = value, math.nan
    fa3.flash_attn_func(**tensors(), v_shift=shift)
    assert len(calls) == 2
    calls.clear()
    refused(ValueError, ["v_shift", value, (1, 0, 5)], v_shift=shift, check_scales=True)


def test_check_scales_is_a_bool(refused):
    refused(TypeError, ["check_scales", 1, True, False], check_scales=1)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (torch.zeros(OUT_SHAPE, dtype=torch.float64), ["dtype", torch.float64, torch.float32]),
        (torch.zeros(OUT_SHAPE, dtype=E4M3), ["dtype", E4M3, torch.bfloat16, torch.float16]),
        (torch.zeros(2, 140, 4, 64), ["shape", (2, 140, 4, 64), OUT_SHAPE]),
        (torch.zeros(2, 140, 4, 49)[..., :48], ["stride", 49, 196, 16]),
        (torch.zeros(2, 140, 4, 96)[..., ::2], ["stride", 2, 1]),
    ],
    ids=["fp64", "e4m3", "shape", "stride", "last stride"],
)
def test_out(refused, out, words):
    refused(ValueError, ["out", *words], out=out)


@pytest.mark.parametrize("name", FORMS)
def test_out_over_a_descale(refused, name):
    out = torch.zeros(OUT_SHAPE)
    refused(ValueError, ["out", name, hex(out.data_ptr())], out=out, **{name: out[:, 0, :2, 0]})
    refused(ValueError, ["out", "v_shift", hex(out.data_ptr())], out=out, v_shift=out[:, 0, :2])


def test_options_are_checked(refused):
    refused(TypeError, ["causal", 1], causal=1)
    refused(TypeError, ["window_size", "left", "[3]", "int"], window_size=([3], 0))
    refused(ValueError, ["softmax_scale", -1.0], softmax_scale=-1.0)
    refused(ValueError, ["softcap", -15.0], softcap=-15.0)


def _problem(dtypes=(E4M3, E4M3, E4M3), out_dtype=None, shapes=None, **forms):
    layouts = [Layout.of(x) for x in tensors(*dtypes, device="meta", **(shapes or {})).values()]
    given = {
        name: Layout.of(torch.ones(FORMS[name][form], device="meta"))
        for name, form in forms.items()
    }
    return Problem.of(*layouts, Options(), Descales(**given), out_dtype)


@pytest.mark.parametrize(
    ("dtypes", "names"),
    [
        ((E4M3, E4M3, E4M3), ("e4m3", "e4m3", "e4m3")),
        ((E4M3, E5M2, E4M3), ("e4m3", "e5m2", "e4m3")),
        ((E4M3, E4M3, E5M2), ("e4m3", "e4m3", "e5m2")),
        ((torch.int8, torch.int8, E5M2), ("int8", "int8", "e5m2")),
    ],
    ids=str,
)
def test_signature_of_dtypes(dtypes, names):
    signature = _problem(dtypes).signature
    assert signature.dtype == names[0]
    assert signature.quantised == Quantised(*names[1:], "bf16")
    assert (signature.head_dim, signature.head_dim_v, signature.mask) == (64, 64, "full")


def test_signature_of_out():
    for dtype, name in ((torch.float16, "fp16"), (torch.float32, "fp32"), (None, "bf16")):
        assert _problem(out_dtype=dtype).signature.quantised.out == name


def test_signature_of_scales():
    """The kernel is compiled for the blocks of k and v, not for the form of q's."""
    plain = Quantised("e4m3", "e4m3", "bf16")
    for form in FORMS["q_descale"]:
        given = {} if form == "none" else {"q_descale": form}
        assert _problem(**given).signature.quantised == plain
    for form, block in (("head", 0), ("128", 128), ("64", 64)):
        assert _problem(k_descale=form).signature.quantised.k_block == block
    for form, block in (("head", 0), ("channels", 0), ("128", 128), ("64", 64)):
        assert _problem(v_descale=form).signature.quantised.v_block == block


def test_one_block_of_keys_is_one_of_128():
    """Up to 64 keys both sizes have one block; the larger one allows larger tiles."""
    q, k, v = (Layout.of(x) for x in tensors(k=(2, 64, 2, 64), v=(2, 64, 2, 48)).values())
    scale = Layout.of(torch.ones(2, 2, 1))
    quantised = Problem.of(
        q, k, v, Options(), Descales(k_descale=scale, v_descale=scale)
    ).signature.quantised
    assert (quantised.k_block, quantised.v_block) == (128, 128)


def test_16_bit_signature_is_as_ever():
    given = tensors(*3 * [torch.bfloat16])
    problem = Problem.of(*(Layout.of(x) for x in given.values()), Options())
    assert problem.signature.quantised is None
    assert problem.out_dtype == torch.bfloat16


def _strided(shape):
    """Random scales in memory that is transposed and has gaps."""
    return torch.rand(*reversed(shape), 3)[..., 1].permute(*range(len(shape) - 1, -1, -1))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("name", "form"), ALL_FORMS)
def test_what_the_kernel_is_called_with(calls, name, form, strided):
    """Views of the given scales, (b, heads, n), and ones for the others."""
    shape = FORMS[name][form]
    descale = _strided(shape) if strided else torch.rand(shape)
    given = tensors()
    out, lse = fa3.flash_attn_func(
        **given, causal=True, return_attn_probs=True, **{name: descale}, sm_margin=2
    )
    call = FwdArguments(*calls[0])
    same = zip(
        (call.q, call.k, call.v, call.out, call.lse), (*given.values(), out, lse), strict=True
    )
    assert all(x is y for x, y in same)
    assert (out.shape, out.dtype, out.stride()[-1]) == (OUT_SHAPE, torch.bfloat16, 1)
    assert (lse.shape, lse.dtype) == ((2, 4, 140), torch.float32)
    assert call.scale_log2 == pytest.approx(64**-0.5 * math.log2(math.e))
    assert (call.sinks, call.softcap_log2, call.num_ctas) == (None, 0.0, 7)
    assert torch.equal(call.v_shift, torch.zeros(SHIFT_SHAPE))
    views = dict(zip(FORMS, (call.q_scales, call.k_scales, call.v_scales), strict=True))
    for other, width in (("q_descale", 1), ("k_descale", 1), ("v_descale", 48)):
        wanted = torch.ones(2, 2, width)
        if other == name:
            wanted = descale[..., None].expand(2, 2, width) if descale.dim() == 2 else descale
            wanted = wanted[:, :, 0] if wanted.dim() == 4 else wanted
        assert views[other].dtype == torch.float32
        assert torch.equal(views[other], wanted)
    assert views[name].data_ptr() == descale.data_ptr()


def test_ones_are_kept(calls):
    for _ in range(2):
        fa3.flash_attn_func(**tensors())
    first, second = ([x.data_ptr() for x in call[5:9]] for call in calls)
    assert first == second
    assert len(set(first[:3])) == 1


def _spread(shape, strides, offset=0):
    """Random numbers in a tensor with these strides."""
    return torch.rand(1000).as_strided(shape, strides, offset)


@pytest.mark.parametrize(
    ("shift", "is_copied"),
    [
        (torch.rand(SHIFT_SHAPE), False),
        (torch.rand(DV).expand(SHIFT_SHAPE), False),
        (_spread(SHIFT_SHAPE, (2 * 64, 64, 1), 8), False),
        (_spread(SHIFT_SHAPE, (2 * 64, 64, 1), 3), True),
        (_spread(SHIFT_SHAPE, (2 * 50, 50, 1)), True),
        (_spread(SHIFT_SHAPE, (96, 1, 2)), True),
        (torch.rand(2, 2, 1).expand(SHIFT_SHAPE), True),
    ],
    ids=["as it is", "one for all", "gaps", "odd address", "odd gaps", "heads inside", "expanded"],
)
def test_shift_as_the_kernel_wants_it(calls, shift, is_copied):
    """Channels side by side, in units of 16 bytes."""
    fa3.flash_attn_func(**tensors(), v_shift=shift)
    given = calls[0][8]
    assert torch.equal(given, shift)
    assert given.data_ptr() % 16 == 0
    assert given.stride()[2] == 1
    assert not any(step % 4 for step in given.stride()[:2])
    assert (given is not shift) == is_copied


def test_odd_strides_are_copied(calls):
    """TMA's unit is 16 elements here; a dimension of size 1 only gets another stride."""
    given = tensors()
    for name, shape in SHAPES.items():
        memory = torch.randn(*shape[:3], shape[3] + 8).to(E4M3)
        given[name] = memory[..., : shape[3]]
    given["q"] = torch.randn(2, 1, 4, 64).to(E4M3).as_strided((2, 1, 4, 64), (256, 3, 64, 1))
    fa3.flash_attn_func(**given)
    for passed, x in zip(calls[0][:3], given.values(), strict=True):
        assert torch.equal(passed.view(torch.uint8), x.view(torch.uint8))
        assert all(step % 16 == 0 for step in passed.stride()[:3])
        assert (passed.data_ptr() == x.data_ptr()) == (x is given["q"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_out_of_each_dtype(calls, dtype):
    """Also a slice of a wider tensor."""
    out = torch.zeros(2, 140, 4, 64, dtype=dtype)[..., 16:]
    before = out._version
    assert fa3.flash_attn_func(**tensors(), out=out) is out
    assert calls[0][3] is out
    assert out._version > before
