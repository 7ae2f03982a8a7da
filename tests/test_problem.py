"""Bad input: a clear error that names the argument and both values, and nothing is overwritten."""

import fractions
import inspect
import math
import re

import numpy
import pytest
import torch

import fa3
from fa3 import ops
from fa3.call import problem
from fa3.call.problem import Layout, Options, Problem
from fa3.kernels.arguments import FwdArguments
from fa3.kernels.signature import UNBOUNDED


def tensors(b=2, s_q=6, s_k=8, h_q=4, h_k=2, d=64, dv=64, dtype=torch.bfloat16, device="cpu"):
    return {
        "q": torch.zeros(b, s_q, h_q, d, dtype=dtype, device=device),
        "k": torch.zeros(b, s_k, h_k, d, dtype=dtype, device=device),
        "v": torch.zeros(b, s_k, h_k, dv, dtype=dtype, device=device),
    }


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch):
    """Fails the test if a call gets past the checks."""

    def kernel_of(checked, *_):
        raise AssertionError(f"the checks let {checked} pass")

    monkeypatch.setattr(ops, "_kernel_of", kernel_of)
    ops.plan_of.cache_clear()
    yield
    ops.plan_of.cache_clear()


def refused(error, words, **arguments):
    """The call raises `error` with all of `words` in its message and leaves `out` as it was."""
    arguments = {**tensors(), **arguments}
    out = arguments.get("out")
    before = out.clone() if isinstance(out, torch.Tensor) and not out.is_meta else None
    with pytest.raises(error) as caught:
        fa3.flash_attn_func(**arguments)
    message = str(caught.value)
    for word in words:
        assert re.search(rf"(?<![\w.]){re.escape(str(word))}(?!\w)", message), (word, message)
    if before is not None:
        assert torch.equal(out, before)


def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_not_a_tensor(name):
    refused(TypeError, [name, "list", "torch.Tensor"], **{name: [1.0]})


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_rank(name):
    refused(ValueError, [name, 3, 4, "(2, 8, 64)"], **{name: zeros(2, 8, 64)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.int32])
def test_dtype_of_q(dtype):
    allowed = torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8
    refused(TypeError, ["q", dtype, *allowed], **tensors(dtype=dtype))


@pytest.mark.parametrize("name", ["k", "v"])
def test_dtypes_differ(name):
    other = tensors()[name].half()
    refused(TypeError, [name, "q", torch.float16, torch.bfloat16], **{name: other})


@pytest.mark.parametrize("name", ["k", "v"])
def test_devices_differ(name):
    other = tensors(device="meta")[name]
    refused(ValueError, [name, "q", "meta", "cpu"], **{name: other})


def test_device_without_kernels():
    layout = Layout((1, 1, 1, 8), (8, 8, 8, 1), torch.float16, torch.device("xpu", 0))
    with pytest.raises(ValueError, match="q is on device xpu:0, expected cuda or cpu"):
        Problem.of(layout, layout, layout, Options())


@pytest.mark.parametrize("name", ["k", "v"])
def test_batch(name):
    refused(ValueError, [name, "batch", 3, 2, "q"], **{name: tensors(b=3)[name]})


def test_length():
    refused(ValueError, ["v", "length", 9, 8, "k"], v=tensors(s_k=9)["v"])


def test_heads_of_k_and_v():
    refused(ValueError, ["v", "heads", 4, 2, "k"], v=tensors(h_k=4)["v"])


@pytest.mark.parametrize(("h_q", "h_k"), [(4, 3), (2, 4), (4, 0)])
def test_heads_do_not_divide(h_q, h_k):
    refused(ValueError, ["q", "heads", h_q, h_k, "k"], **tensors(h_q=h_q, h_k=h_k))


def test_head_dims_of_q_and_k():
    refused(ValueError, ["k", "head dim", 128, 64, "q"], k=tensors(d=128)["k"])


@pytest.mark.parametrize("d", [0, 4, 100, 264])
def test_head_dim(d):
    refused(ValueError, ["q", "head dim", d, 8, 256], **tensors(d=d))
    refused(ValueError, ["v", "head dim", d, 8, 256], **tensors(dv=d))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_last_stride(name):
    x = tensors()[name]
    strided = x.new_zeros(*x.shape[:3], 128)[..., ::2]
    refused(ValueError, [name, "stride", 2, 1], **{name: strided})


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_stride_of_out_that_tma_cannot_take(dim):
    stride = list(zeros(2, 6, 4, 72).stride())
    stride[dim] += 4
    odd = zeros(4096).as_strided((2, 6, 4, 64), stride)
    refused(ValueError, ["out", stride[dim], dim, 2 * stride[dim], 16], out=odd)


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_misaligned(name, monkeypatch):
    monkeypatch.setattr(ops, "_kernel_of", lambda *_: (pytest.fail, 0, None, None, None))
    x = {**tensors(), "out": zeros(2, 6, 4, 64)}[name]
    shifted = x.new_zeros(x.numel() + 8)[1 : x.numel() + 1].view(x.shape)
    refused(ValueError, [name, 2, 16, 0], **{name: shifted})


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-46, 1e300])
def test_softmax_scale(scale):
    """fp32 has to hold it, in base 2."""
    words = ["softmax_scale", scale, "8.15e-39", "2.36e+38"]
    refused(ValueError, words, softmax_scale=scale)


@pytest.mark.parametrize("scale", ["1", True, 1j, [0.1], numpy.True_])
def test_softmax_scale_of_wrong_type(scale):
    refused(TypeError, ["softmax_scale", repr(scale), "number"], softmax_scale=scale)


@pytest.mark.parametrize(
    "scale", [10**400, 10**5000, fractions.Fraction(10**400)], ids=["400", "5000", "fraction"]
)
def test_softmax_scale_beyond_floats(scale):
    refused(ValueError, ["softmax_scale", "1.8e+308", "largest float"], softmax_scale=scale)


@pytest.mark.parametrize(
    "scale", [torch.tensor([0.1]), torch.tensor(True), torch.tensor(1j)], ids=["1d", "bool", "1j"]
)
def test_softmax_scale_in_no_real_tensor_without_dimensions(scale):
    words = ["softmax_scale", tuple(scale.shape), scale.dtype, "without dimensions"]
    refused(TypeError, words, softmax_scale=scale)


def test_softmax_scale_has_no_derivative():
    scale = torch.tensor(0.1, requires_grad=True)
    words = ["softmax_scale", "requires_grad", "detach"]
    refused(NotImplementedError, words, softmax_scale=scale)
    with pytest.raises(NotImplementedError, match="softmax_scale has a tangent"):
        torch.func.jvp(
            lambda scale: fa3.flash_attn_func(**tensors(), softmax_scale=scale),
            (scale.detach(),),
            (scale.detach(),),
        )


@pytest.mark.parametrize("softcap", [math.nan, math.inf, -math.inf, -50.0, 1e-46, 2e38])
def test_softcap(softcap):
    """fp32 has to hold twice of it, in base 2."""
    refused(ValueError, ["softcap", softcap, 0, "8.15e-39", "1.18e+38"], softcap=softcap)


@pytest.mark.parametrize("softcap", ["50", True, [50.0], zeros(2), torch.tensor(True)], ids=str)
def test_softcap_of_wrong_type(softcap):
    refused(TypeError, ["softcap", "number"], softcap=softcap)


@pytest.mark.parametrize("function", [fa3.flash_attn_func, fa3.flash_attn_fp8_func])
@pytest.mark.parametrize(
    ("error", "sink", "words"),
    [
        (TypeError, [0.0] * 4, "learnable_sink is a list, expected a torch.Tensor"),
        (TypeError, zeros(4, dtype=torch.float64), "learnable_sink has dtype torch.float64, exp"),
        (ValueError, zeros(2), "learnable_sink has shape (2,), expected (4,), one for each head"),
        (ValueError, zeros(4, 2), "learnable_sink has shape (4, 2), expected (4,), .* or (2, 4)"),
        (ValueError, zeros(4).to("meta"), "learnable_sink is on device meta but q is on cpu"),
        (ValueError, zeros(4).to_sparse(), "learnable_sink is of layout torch.sparse_coo"),
    ],
)
def test_learnable_sink(function, error, sink, words, monkeypatch):
    monkeypatch.setattr(fa3.interface_fp8, "quantize_fp8", lambda q, k, v, **_: _Quantised(q, k, v))
    pattern = re.escape(words).replace(r"\.\*", ".*")
    with pytest.raises(error, match=pattern):
        function(**tensors(), learnable_sink=sink)


def _Quantised(q, k, v):
    q, k, v = (x.to(torch.float8_e4m3fn) for x in (q, k, v))
    return fa3.quantize.Fp8Inputs(q, k, v, *(torch.ones(2, 2) for _ in range(3)))


def test_out_over_the_sink(monkeypatch):
    monkeypatch.setattr(ops, "_kernel_of", lambda *_: (pytest.fail, 0, None, None, None))
    out = zeros(2, 6, 4, 64)
    words = ["out", "learnable_sink", hex(out.data_ptr())]
    refused(ValueError, words, out=out, learnable_sink=out[0, 0, :, 0])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"softcap": 50.0}, "smooth_k is True but softcap is 50.0, expected smooth_k=False"),
        ({"learnable_sink": zeros(4)}, "smooth_k is True but learnable_sink is a tensor"),
    ],
    ids=["softcap", "sink"],
)
def test_what_smooth_k_would_change(given, words, monkeypatch):
    """It moves all scores of a query; it is off where that matters, and refused there."""
    seen = []
    monkeypatch.setattr(
        fa3.interface_fp8,
        "quantize_fp8",
        lambda q, k, v, **options: seen.append(options["smooth_k"]) or _Quantised(q, k, v),
    )
    monkeypatch.setattr(ops, "_kernel_of", lambda *_: (lambda *_: None, 0, None, None, None))
    for options in ({}, given):
        fa3.flash_attn_fp8_func(**tensors(), **options, smooth_v=False)
    assert seen == [True, False]
    with pytest.raises(ValueError, match=words):
        fa3.flash_attn_fp8_func(**tensors(), **given, smooth_k=True)


@pytest.mark.parametrize("causal", [1, 0, None, "yes", [True]])
def test_causal(causal):
    refused(TypeError, ["causal", repr(causal), "True", "False"], causal=causal)


@pytest.mark.parametrize("window", [None, 5, (1,), (1, 2, 3)])
def test_window_is_a_pair(window):
    refused(TypeError, ["window_size", repr(window), "pair"], window_size=window)


@pytest.mark.parametrize("window", [(1.0, 2), (None, 1), (True, -1), ([5], 0)])
def test_window_of_ints(window):
    refused(TypeError, ["window_size", "left", repr(window[0]), "int"], window_size=window)


def test_sm_margin():
    refused(ValueError, ["sm_margin", -1, 0], sm_margin=-1)
    refused(TypeError, ["sm_margin", 1.5, "int"], sm_margin=1.5)
    refused(TypeError, ["sm_margin", "[1]", "int"], sm_margin=[1])


@pytest.mark.parametrize("name", ["num_splits", "pack_gqa"])
@pytest.mark.parametrize("value", [[1], 0.5, "1", numpy.array([1, 1])], ids=repr)
def test_hints_about_speed(name, value):
    refused(TypeError, [name, repr(value), "expected"], **{name: value})


@pytest.mark.parametrize("function", [fa3.flash_attn_func, fa3.flash_attn_fp8_func])
@pytest.mark.parametrize("value", [1, None, "no", torch.ones(2)], ids=repr)
def test_return_attn_probs(function, value):
    with pytest.raises(TypeError, match="return_attn_probs is .*, expected True or False"):
        function(**tensors(), return_attn_probs=value)


def test_number_of_splits():
    refused(ValueError, ["num_splits", -1, 0], num_splits=-1)


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
@pytest.mark.parametrize("how", ["coo", "csr", "mkldnn", "nested", "jagged"])
@pytest.mark.filterwarnings("ignore:.*(prototype|beta)")
def test_sparse_and_nested(name, how):
    x = {**tensors(), "out": zeros(2, 6, 4, 64)}[name]
    layout = {"coo": torch.sparse_coo, "csr": torch.sparse_csr, "mkldnn": torch._mkldnn}
    if how in layout:
        words = [name, layout[how], torch.strided]
        made = {
            "coo": x.to_sparse,
            "csr": lambda: x[0, :, 0].contiguous().to_sparse_csr(),
            "mkldnn": x.to_mkldnn,
        }[how]()
    else:
        words = [name, "nested", torch.strided]
        layout = torch.jagged if how == "jagged" else torch.strided
        made = torch.nested.nested_tensor([y[: 3 + i] for i, y in enumerate(x)], layout=layout)
    with pytest.raises(ValueError) as caught:
        fa3.flash_attn_func(**{**tensors(), name: made})
    assert all(str(word) in str(caught.value) for word in words)


HINTS = [
    ("is_causal", "causal is meant"),
    ("scale", "softmax_scale is meant"),
    ("attn_mask", "causal and window_size say what is masked"),
    ("dropout_p", "no dropout"),
    ("enable_gqa", "q may always have more heads"),
    ("alibi_slopes", "no other masks"),
    ("logits_soft_cap", "softcap is meant"),
    ("s_aux", "learnable_sink is meant"),
    ("sinks", "learnable_sink is meant"),
    ("cu_seqlens_q", "flash_attn_varlen_func and"),
    ("leftpad_k", "cache_leftpad is meant, of flash_attn_with_kvcache"),
    ("softmax_scal", "softmax_scale is meant?"),
    ("colour", "it has q, k, v, softmax_scale, causal, qv"),
]


@pytest.mark.parametrize(("name", "hint"), HINTS)
def test_arguments_of_other_functions(name, hint):
    message = re.escape(f"flash_attn_func() has no argument '{name}': ") + ".*" + re.escape(hint)
    with pytest.raises(TypeError, match=message):
        fa3.flash_attn_func(**tensors(), **{name: None})


@pytest.mark.parametrize(
    ("function", "last"),
    [
        (fa3.flash_attn_func, "learnable_sink"),
        (fa3.flash_attn_fp8_func, "learnable_sink"),
        (fa3.quantize_fp8, "seqused_k"),
    ],
)
def test_signatures_show_no_catch_all(function, last):
    *_, parameter = inspect.signature(function).parameters.values()
    assert (parameter.name, parameter.kind) == (last, parameter.KEYWORD_ONLY)
    name = re.escape(f"{function.__name__}() has no argument 'is_causal'")
    with pytest.raises(TypeError, match=name):
        function(**tensors(), is_causal=True)


@pytest.mark.parametrize(
    ("positional", "words"),
    [
        ((0.0,), ["softmax_scale is 0.0"]),  # FlashAttention-2's dropout_p
        ((0.0, None, True), ["qv is True"]),
        ((0.0, 0.125), ["causal is 0.125"]),
        ((0.0, None), ["causal is None"]),
        ((None, 0.0, True), ["qv is True"]),  # scaled_dot_product_attention's attn_mask, dropout_p
        ((torch.ones(6, 8, dtype=torch.bool),), ["softmax_scale is a tensor", "(6, 8)"]),
    ],
    ids=str,
)
def test_positions_of_other_functions(positional, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        fa3.flash_attn_func(*tensors().values(), *positional)
    order = "the order is FlashAttention-3's: q, k, v, softmax_scale, causal"
    for word in (*words, order, "dropout_p"):
        assert word in str(caught.value)


def test_sm_margin_beyond_the_device(monkeypatch, device):
    monkeypatch.undo()
    sms = fa3.launch.dispatch.target_of(device).num_sms
    given = {name: x.to(device) for name, x in tensors().items()}
    refused(ValueError, ["sm_margin", sms, "SMs"], sm_margin=sms, **given)


@pytest.mark.parametrize("mask", [{}, {"window_size": (5, 5)}])
@pytest.mark.parametrize("name", ["q", "k"])
def test_length_beyond_int32(name, mask):
    limit = problem.MAX_LENGTH_LOCAL if mask else problem.MAX_LENGTH
    given = tensors()
    for x in {"q": ["q"], "k": ["k", "v"]}[name]:
        b, _, h, d = given[x].shape
        given[x] = given[x].as_strided((b, limit + 1, h, d), (0, 0, d, 1))
    refused(ValueError, [name, limit + 1, limit], **mask, **given)


@pytest.mark.parametrize(
    ("name", "value", "supported"),
    [
        ("qv", zeros(1), None),
        ("qv", numpy.zeros(2), None),
        ("attention_chunk", 64, 0),
        ("attention_chunk", torch.zeros(2), 0),
    ],
)
def test_not_supported_yet(name, value, supported):
    refused(NotImplementedError, [name, supported], **{name: value})


@pytest.mark.parametrize("name", ["q", "k", "v", "learnable_sink"])
def test_requires_grad(name):
    """Of calls without a backward pass."""
    out = zeros(2, 6, 4, 64)
    given = {"learnable_sink": zeros(4), **tensors()}
    words = ["out", "requires_grad", "torch.no_grad"]
    refused(NotImplementedError, words, **{name: given[name].requires_grad_()}, out=out)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ([1.0], ["list", "torch.Tensor"]),
        (zeros(2, 6, 4, 72), ["shape", "(2, 6, 4, 72)", "(2, 6, 4, 64)"]),
        (zeros(2, 6, 4), ["shape", "(2, 6, 4)", "(2, 6, 4, 64)"]),
        (zeros(2, 6, 4, 64).half(), ["dtype", torch.float16, torch.bfloat16]),
        (zeros(2, 6, 4, 64).to("meta"), ["device", "meta", "cpu"]),
        (zeros(2, 6, 4, 128)[..., ::2], ["stride", 2, 1]),
        (zeros(2, 6, 1, 64).expand(2, 6, 4, 64), ["strides", (384, 64, 0, 1), (2, 6, 4, 64)]),
        (zeros(2, 6, 4, 64).requires_grad_(), ["requires_grad", "True", "False"]),
        (torch._neg_view(zeros(2, 6, 4, 64)), ["is_neg", "True", "False"]),
    ],
    ids=["list", "width", "rank", "dtype", "device", "stride", "overlap", "grad", "negated"],
)
def test_out(out, words):
    refused((TypeError, ValueError), ["out", *words], out=out)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_out_over_an_input(name, monkeypatch):
    monkeypatch.setattr(ops, "_kernel_of", lambda *_: (pytest.fail, 0, None, None, None))
    given = tensors()
    memory = zeros(2 * 2 * 8 * 4 * 64)
    given[name] = memory[: given[name].numel()].view(given[name].shape)
    out = memory[512 : 512 + 2 * 6 * 4 * 64].view(2, 6, 4, 64)
    start = [hex(x.data_ptr()) for x in (out, given[name])]
    refused(ValueError, ["out", name, *start], out=out, **given)


MASKS = [  # causal, window, kind, bounds that the kernel gets
    (False, (-1, -1), "full", None),
    (True, (-1, -1), "causal", None),
    (True, (-1, 7), "causal", None),
    (False, (-1, 0), "causal", None),
    (True, (5, -1), "local", (5, 0)),
    (True, (5, 9), "local", (5, 0)),
    (False, (5, 9), "local", (5, 9)),
    (False, (5, -1), "local", (5, UNBOUNDED)),
    (False, (-1, 9), "local", (UNBOUNDED, 9)),
    (False, (0, 0), "local", (0, 0)),
    (False, (2**40, 1), "local", (UNBOUNDED, 1)),
    (False, (-2, -100), "full", None),
    (False, (-7, 0), "causal", None),
    (True, (-7, -7), "causal", None),
    (False, (-2, 9), "local", (UNBOUNDED, 9)),
    (False, (5, -3), "local", (5, UNBOUNDED)),
]


@pytest.mark.parametrize(("causal", "window", "kind", "bounds"), MASKS)
def test_mask_kinds(causal, window, kind, bounds):
    layouts = (Layout.of(x) for x in tensors().values())
    checked = Problem.of(*layouts, Options(None, causal, *window))
    assert checked.mask == (kind, *(bounds or (UNBOUNDED, UNBOUNDED)))


def test_numpy_numbers():
    layouts = (Layout.of(x) for x in tensors().values())
    numbers = numpy.float32(0.5), numpy.False_, numpy.int64(5), numpy.int32(7), numpy.int64(1), 0
    options = Options.of(*numbers)
    assert [type(x) for x in options[:6]] == [float, bool, int, int, int, float]
    checked = Problem.of(*layouts, options)
    assert (checked.mask, checked.sm_margin) == (("local", 5, 7), 1)
    assert checked.softmax_scale == 0.5


@pytest.mark.parametrize("causal", [numpy.True_, True])
@pytest.mark.parametrize(
    "scale", [torch.tensor(0.5), torch.tensor(0.5).double(), numpy.float16(0.5), 0.5], ids=repr
)
def test_numbers_of_other_kinds(scale, causal, monkeypatch):
    """A tensor is read anew at each call: it may have changed."""
    seen = []
    monkeypatch.setattr(
        ops, "_kernel_of", lambda *_: (lambda x: seen.append(x[-9:-4]), 7, None, None, None)
    )
    scale = scale.clone() if isinstance(scale, torch.Tensor) else scale
    options = {"causal": causal, "window_size": (numpy.int64(5), -3), "sm_margin": numpy.int8(2)}
    fa3.flash_attn_func(**tensors(), **options, softmax_scale=scale)
    if isinstance(scale, torch.Tensor):
        fa3.flash_attn_func(**tensors(), **options, softmax_scale=scale.mul_(2))
    log2_e = math.log2(math.e)
    assert seen == [(factor * log2_e, 0.0, 5, 0, 7) for factor in (0.5, 1.0)[: len(seen)]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_ints_in_tensors(dtype, monkeypatch):
    """A window, margin or hint may be a tensor without dimensions, as with torch's operators."""
    seen = []
    monkeypatch.setattr(
        ops, "_kernel_of", lambda p, *_: (seen.append(p) or (lambda *_: None), 0, None, None, None)
    )
    two = torch.tensor(2, dtype=dtype)
    window = torch.tensor([3, 4], dtype=dtype)
    given = {"window_size": window, "sm_margin": two, "num_splits": two}
    fa3.flash_attn_func(**tensors(), **given)
    (checked,) = seen
    assert (checked.mask, checked.sm_margin) == (("local", 3, 4), 2)


@pytest.mark.parametrize(
    "number",
    [torch.tensor([3]), torch.tensor(3.0), torch.tensor(True), torch.tensor(3j)],
    ids=["1d", "float", "bool", "complex"],
)
def test_int_in_another_tensor(number):
    words = [tuple(number.shape), number.dtype, "integer tensor"]
    refused(TypeError, ["window_size (left)", *words], window_size=(number, 0))
    refused(TypeError, ["num_splits", *words], num_splits=number)


def test_signature_has_no_lengths():
    """Two problems that differ in what is known only at run time share a kernel."""
    signatures = set()
    for sizes in ({}, {"b": 5, "s_q": 300, "s_k": 17}, {"h_q": 2, "h_k": 1}, {"d": 40, "dv": 8}):
        for options in (Options(None, False, 3, 4, 5), Options(0.25, False, 700, 1)):
            layouts = [Layout.of(x) for x in tensors(**sizes).values()]
            signatures.add(Problem.of(*layouts, options).signature)
    assert len(signatures) == 1


def test_what_a_kernel_gets_of_softcap_and_sinks(monkeypatch):
    """Numbers of any kind; the value makes no kernel, its presence does."""
    seen = []

    def kernel_of(problem, *_):
        def run(x):
            call = FwdArguments(*x)
            seen.append((problem.signature, call.sinks, call.scale_log2, call.softcap_log2))

        return run, 0, None, None, None

    monkeypatch.setattr(ops, "_kernel_of", kernel_of)
    sink = zeros(8)[::2]
    for softcap in (50, numpy.float16(20), torch.tensor(50.0)):
        fa3.flash_attn_func(**tensors(), softcap=softcap, softmax_scale=0.5, learnable_sink=sink)
    for softcap in (0, None, numpy.int64(0)):
        fa3.flash_attn_func(**tensors(), softcap=softcap, softmax_scale=0.5)
    assert len({signature for signature, *_ in seen}) == 2
    log2_e = math.log2(math.e)
    for (signature, sinks, scale, cap), softcap in zip(seen, (50, 20, 50, 0, 0, 0), strict=True):
        assert (signature.score, signature.sinks) == (
            ("softcap", True) if softcap else (None, False)
        )
        assert cap == softcap * log2_e
        assert scale == pytest.approx(0.5 * log2_e * (2 / softcap if softcap else 1))
        if softcap:
            assert (sinks.shape, sinks.dtype) == ((2, 4), torch.float32)
        else:
            assert sinks is None


@pytest.mark.parametrize(
    ("softcap", "factor"), [(1e-38, torch.finfo(torch.float32).max), (1e38, 2.0**-126)]
)
def test_factors_of_scores_that_fp32_does_not_hold(softcap, factor):
    layouts = [Layout.of(x) for x in tensors().values()]
    scale = 2.0 if factor > 1 else 1e-10
    checked = Problem.of(*layouts, Options(scale, softcap=softcap))
    assert checked.scalars[1] == factor


def test_good_layouts_pass(monkeypatch):
    """Not everything is refused: odd strides of size-1 dimensions, expanded batches, defaults."""
    monkeypatch.setattr(ops, "_kernel_of", lambda *_: (lambda *_: None, 0, None, None, None))
    given = tensors()
    given["k"] = given["k"][:1].expand(2, -1, -1, -1)
    given["q"] = given["q"][:, :1].as_strided((2, 1, 4, 64), (256, 3, 64, 1))
    for unused in (
        {"num_splits": 0, "pack_gqa": False, "deterministic": True},
        {"num_splits": numpy.int64(4), "pack_gqa": True},
    ):
        out, lse = fa3.flash_attn_func(**given, **unused, return_attn_probs=True)
    assert out.shape == (2, 1, 4, 64)
    assert lse.shape == (2, 4, 1)
    assert lse.dtype == torch.float32


def test_positions_of_arguments(monkeypatch):
    """The order is FA3's: the tenth argument is window_size, the sixteenth sm_margin."""
    seen = []
    monkeypatch.setattr(
        ops, "_kernel_of", lambda p, *_: (seen.append(p) or (lambda *_: None), 0, None, None, None)
    )
    given = tensors().values()
    rest = (None, None, None, None, (3, 4), 0, 0.0, 1, None, False, 2, True)
    out, _ = fa3.flash_attn_func(*given, 0.5, False, *rest)
    (checked,) = seen
    assert (checked.softmax_scale, checked.sm_margin) == (0.5, 2)
    assert checked.mask == ("local", 3, 4)
