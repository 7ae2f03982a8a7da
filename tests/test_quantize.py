"""quantize_fp8: the kernel (or its plain torch) against the definition in fp64."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fa3
from fa3.inspect import analyse
from fa3.kernels.quantize_signature import QuantizeConfig, QuantizeSignature
from fa3.launch import dispatch, jit
from fa3.quantize_plan import KERNEL

from . import quantize_reference as reference

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Case:
    """One call; dims and lengths are those of attention, options those of quantize_fp8."""

    d: int = 64
    dv: int = 64
    s_q: int = 130
    s_k: int = 200
    h_q: int = 2
    h_k: int = 2
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        default = Case()
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k)]
        return " ".join(changed).replace("torch.", "") or "default"


SMOOTH = {"smooth_k": True, "hadamard": True}
MEANS = {"smooth_k": True, "smooth_v": True}
ALL = {**SMOOTH, **MEANS}
CASES = [
    *(Case(s_q=n, s_k=n, options={"rows_per_block": 64}) for n in (1, 63, 64, 65, 129, 300)),
    *(Case(d=d, dv=d) for d in (16, 80, 128, 192, 256)),
    *(Case(d=d, dv=64, options={"hadamard": True}) for d in (16, 64, 256)),
    Case(d=96, dv=64, h_q=6, batch=2, options={"smooth_k": True}),
    Case(d=128, h_q=4, batch=2, s_k=300, options=SMOOTH),
    Case(h_q=4, h_k=1, batch=2, options={**SMOOTH, "block_scales": False}),
    Case(h_q=4, batch=2, options={**SMOOTH, "qk_dtype": torch.int8}),
    Case(dv=96, batch=2, options={"v_per_channel": True, "v_dtype": E5M2}),
    Case(dtype=torch.float16, d=128, options={"hadamard": True}),
    Case(dv=128, s_k=300, batch=2, options={"smooth_v": True, "rows_per_block": 64}),
    Case(dv=80, h_q=4, h_k=2, s_k=130, options={"smooth_v": True, "block_scales": False}),
    Case(dv=96, batch=2, options={"smooth_v": True, "v_per_channel": True, "v_dtype": E5M2}),
    Case(dtype=torch.float16, s_k=1, options={"smooth_v": True}),
]


def _quantize(*qkv, smooth_v=False, **options):
    """The tests ask for smooth_v where it is their matter."""
    return fa3.quantize_fp8(*qkv, smooth_v=smooth_v, **options)


def _inputs(case: Case, device):
    """Normal numbers, a few outliers in q and k, and common offsets of keys and of values."""
    shapes = (
        (case.batch, case.s_q, case.h_q, case.d),
        (case.batch, case.s_k, case.h_k, case.d),
        (case.batch, case.s_k, case.h_k, case.dv),
    )
    q, k, v = (torch.randn(shape) for shape in shapes)
    for x in (q, k):
        x += 30 * torch.randn_like(x) * (torch.rand_like(x) < 0.001)
    k += 2 * torch.randn(case.batch, 1, case.h_k, case.d)
    v += 2 * torch.randn(case.batch, 1, case.h_k, case.dv)
    return tuple(x.to(case.dtype).to(device) for x in (q, k, v))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bytes_and_descales(case, device):
    q, k, v = _inputs(case, device)
    reference.check(case.options, q, k, v, _quantize(q, k, v, **case.options))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plain_torch(case, monkeypatch):
    """What serves CPU tensors without the emulator."""
    target = dispatch.Target("reference", "CPU", (0, 0), 1)
    monkeypatch.setattr(dispatch, "target_of", lambda device: target)
    q, k, v = _inputs(case, "cpu")
    reference.check(case.options, q, k, v, _quantize(q, k, v, **case.options))


@pytest.mark.parametrize("smooth", [False, True], ids=["rotated", "rotated and smooth"])
def test_scores_and_their_lse_shift(smooth, device):
    """What attention is to compute: q k^T, but for lse_shift in each row and rounding."""
    case = Case(d=128, h_q=4, batch=2, s_k=300)
    q, k, v = _inputs(case, device)
    given = _quantize(q, k, v, hadamard=True, smooth_k=smooth)
    q_values = reference.dequantise(given.q, given.q_descale, 128)
    k_values = reference.dequantise(given.k, given.k_descale, 128).repeat_interleave(2, dim=2)
    scores = torch.einsum("bshd,bthd->bhst", q_values, k_values)
    if smooth:
        scores += given.lse_shift[..., None]
    exact = torch.einsum("bshd,bthd->bhst", q.double(), k.double().repeat_interleave(2, dim=2))
    assert (scores - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("d", [16, 64, 256])
def test_rotation_spreads_outliers_and_constants(d, device):
    """One channel, all channels alike, or alternating signs: every column gets the same share."""
    rows = torch.zeros(3, d)
    rows[0, 5] = math.sqrt(d)
    rows[1] = 1
    rows[2] = (-1.0) ** torch.arange(d)
    x = rows[None, :, None].bfloat16().to(device)
    given = _quantize(x, x, x, hadamard=True)
    assert (given.q.float().abs() == 448).all()
    torch.testing.assert_close(given.q_descale.flatten().cpu(), torch.tensor([1 / 448]))


def _with(x, value, place=(0, 70, 0, 3)):
    x = x.clone()
    x[place] = value
    return x


@pytest.mark.parametrize("options", [{}, {"hadamard": True}, {"v_per_channel": True}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_changes_nothing_else(value, options, device):
    """As if there were zeros, but for NaN in the element, or with a rotation in its row."""
    inputs = _inputs(Case(), device)
    element, row = (0, 70, 0, 3), (0, 70, 0)
    places = (row, row, element) if options.get("hadamard") else (element,) * 3
    zeroed = (_with(x, 0.0, place) for x, place in zip(inputs, places, strict=True))
    wanted = _quantize(*zeroed, **options)
    given = _quantize(*(_with(x, value) for x in inputs), **options)
    for a, b, place in zip(given[:3], wanted[:3], places, strict=True):
        assert torch.equal(a.float().isnan(), _with(torch.zeros_like(a.float()), 1, place).bool())
        codes = (_with(x.view(torch.uint8), 0, place) for x in (a, b))
        assert torch.equal(*codes)
    for a, b in zip(given[3:6], wanted[3:6], strict=True):
        assert torch.equal(a, b)


def test_mean_of_keys_that_are_not_finite(device):
    """The channel is not smoothed, the others are; scores and lse_shift stay finite elsewhere."""
    q, k, v = _inputs(Case(h_q=4, batch=2), device)
    k = _with(k, math.inf)
    options = {**SMOOTH, "qk_dtype": E4M3}
    given = _quantize(q, k, v, **options)
    reference.check(options, q, k, v, given)
    assert given.k.float().isnan().sum() == 64
    assert given.lse_shift.isfinite().all()


@pytest.mark.parametrize("form", [{}, {"block_scales": False}, {"v_per_channel": True}], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_mean_of_values_that_are_not_finite(value, form, device):
    """The channel is not smoothed, but for its other errors; other channels know nothing of it."""
    q, k, v = _inputs(Case(batch=2), device)
    options = {"smooth_v": True, **form}
    wanted = _quantize(q, k, _with(v, 0.0), **options)
    v = _with(v, value)
    given = _quantize(q, k, v, **options)
    reference.check(options, q, k, v, given)
    assert torch.equal(given.v.float().isnan(), v.isnan() | v.isinf())
    assert given.v_shift.isfinite().all()
    assert torch.equal(given.v_shift[1], wanted.v_shift[1])


def test_values_that_overflow_do_not_spoil_the_shift(device):
    q, k, v = _inputs(Case(), device)
    v[:, 0::2] = torch.finfo(torch.bfloat16).max
    v[:, 1::2] = -torch.finfo(torch.bfloat16).max
    v[0, 1::2, 0, 3] = torch.finfo(torch.bfloat16).max
    assert _quantize(q, k, v, smooth_v=True).v_shift.isfinite().all()


def test_int8_has_no_nan(device):
    q, k, v = _inputs(Case(), device)
    options = {"qk_dtype": torch.int8}
    wanted = _quantize(*(_with(x, 0.0) for x in (q, k, v)), **options)
    for value in (math.nan, math.inf):
        given = _quantize(*(_with(x, value) for x in (q, k)), v, **options)
        for a, b in zip(given[:2], wanted[:2], strict=True):
            assert torch.equal(a, b)


def test_zeros(device):
    """Scale 1 for a block of zeros, whatever the others hold; also for a head and a channel."""
    q, k, v = (torch.zeros_like(x) for x in _inputs(Case(), device))
    q[:, :128], k[:, 128:], v[..., 7] = 1, 1, 1
    blocks = _quantize(q, k, v, v_per_channel=True)
    one = torch.tensor(1 / 448)
    assert blocks.q_descale[0].cpu().tolist() == [[one, 1]] * 2
    assert blocks.k_descale[0].cpu().tolist() == [[1, one]] * 2
    assert blocks.v_descale[0, :, 0].cpu().tolist() == [[1] * 7 + [one] + [1] * 56] * 2
    heads = _quantize(q * 0, k, v * 0, block_scales=False)
    assert heads.q_descale.cpu().tolist() == [[1, 1]]
    for x in (blocks.q[:, 128:], blocks.k[:, :128], heads.q, heads.v):
        assert not x.view(torch.uint8).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_subnormals(dtype, device):
    """fp16's have a descale like any others; bf16's get the least there is."""
    case = Case(dtype=dtype)
    tiny = torch.finfo(dtype).tiny
    q, k, v = ((x.sign() * tiny / 8).to(dtype) for x in _inputs(case, device))
    given = _quantize(q, k, v)
    reference.check(case.options, q, k, v, given)
    assert (given.q_descale > 0).all() and (1 / given.q_descale).isfinite().all()


def test_outliers_stay_in_their_block(device):
    q, k, v = _inputs(Case(), device)
    wanted = _quantize(q, k, v, rows_per_block=64)
    k = _with(k, 1e4)  # in rows 64 to 128
    given = _quantize(q, k, v, rows_per_block=64)
    reference.check({"rows_per_block": 64}, q, k, v, given)
    same = [i for i in range(200) if not 64 <= i < 128]
    assert torch.equal(given.k.float()[:, same], wanted.k.float()[:, same])
    assert given.k_descale[0, 0, 1] == k[0, 70, 0, 3].float() / 448


def test_the_largest_numbers(device):
    """Nothing overflows without a rotation; with one, descales stay finite."""
    case = Case()
    q, k, v = (x.sign() * torch.finfo(torch.bfloat16).max for x in _inputs(case, device))
    reference.check(case.options, q, k, v, _quantize(q, k, v))
    given = _quantize(q, k, v, hadamard=True)
    for descale in (given.q_descale, given.k_descale, given.v_descale):
        assert descale.isfinite().all()


def _odd_layouts(x):
    """The same values under other strides and addresses."""
    b, s, h, d = x.shape
    yield "heads first", x.transpose(1, 2).contiguous().transpose(1, 2)
    yield "batch inside", x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    yield "slice", torch.cat((x, x + 1), dim=-1)[..., :d]
    yield "expanded heads", x[:, :, :1].expand(b, s, h, d)
    memory = x.new_full((x.numel() + 1,), math.nan)
    yield "odd address", memory[1:].view(x.shape).copy_(x)
    memory = x.new_full((b, s, h, d + 4), math.nan)
    yield "odd strides", memory[..., :d].copy_(x)
    yield "strides of single dimensions", x[:1, :, :1].as_strided((1, s, 1, d), (3, h * d, 5, 1))


def test_layouts(device):
    _, k, _ = _inputs(Case(batch=2, s_k=70), device)
    for name, x in _odd_layouts(k):
        values = x.clone(memory_format=torch.contiguous_format)
        assert x.is_contiguous() == (name == "odd address")
        wanted = _quantize(values, values, values)
        given = _quantize(x, x, x)
        for a, b in zip(given[:6], wanted[:6], strict=True):
            assert torch.equal(a.float(), b.float()), name
        assert torch.equal(x, values)


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"s_q": 0}, {"s_k": 0}, {"h_q": 0, "h_k": 0}], ids=str
)
@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "heads"])
def test_empty(sizes, blocks, device):
    case = Case(**sizes, options={"block_scales": blocks, "v_per_channel": True, **ALL})
    q, k, v = _inputs(case, device)
    given = _quantize(q, k, v, **case.options)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        wanted = _quantize(*fakes, **case.options)
    for a, b in zip(given, wanted, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def _bad(**changes):
    """q, k, v and options; a function in `changes` makes the argument from the good one."""
    good = dict(zip("qkv", _inputs(Case(), "cpu"), strict=True))
    return {**good, **{k: f(good[k]) if callable(f) else f for k, f in changes.items()}}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": None}, TypeError, "q is a NoneType, expected a torch.Tensor"),
        ({"q": torch.Tensor.float}, TypeError, "q has dtype torch.float32, expected torch.float16"),
        ({"q": lambda q: q.to(E4M3)}, TypeError, "q has dtype torch.float8_e4m3fn, expected"),
        ({"k": torch.Tensor.half}, TypeError, "k has dtype torch.float16"),
        ({"v": lambda v: v.to("meta")}, ValueError, "v is on device meta but q is on cpu"),
        ({"v": lambda v: v[0]}, ValueError, "v has 3 dimensions"),
        ({"v": lambda v: v[:, :50]}, ValueError, "v has length 50 but k has 200"),
        ({"v": lambda v: v[..., :24]}, ValueError, "v has head dim 24, expected a multiple of 16"),
        ({"q": lambda q: q.repeat(1, 1, 2, 1)[:, :, :3]}, ValueError, "q has 3 heads"),
        ({"k": lambda k: k.mT.contiguous().mT}, ValueError, "k has stride 2 in its last"),
        ({"v": lambda v: v.float().requires_grad_()}, NotImplementedError, "v has requires_grad"),
        ({"hadamard": 1}, TypeError, "hadamard is 1, expected True or False"),
        ({"smooth_k": None}, TypeError, "smooth_k is None, expected True or False"),
        ({"smooth_v": 0}, TypeError, "smooth_v is 0, expected True or False"),
        ({"rows_per_block": 32}, ValueError, "rows_per_block is 32, expected 64 or 128"),
        ({"rows_per_block": 128.0}, TypeError, "rows_per_block is 128.0, expected an int"),
        ({"rows_per_block": [64]}, TypeError, r"rows_per_block is \[64\], expected an int"),
        ({"smooth": True}, TypeError, r"quantize_fp8\(\) has no argument 'smooth'"),
        ({"k": torch.Tensor.to_sparse}, ValueError, "k is of layout torch.sparse_coo, expected"),
        ({"qk_dtype": E5M2}, TypeError, "qk_dtype is torch.float8_e5m2, expected"),
        ({"v_dtype": torch.int8}, TypeError, "v_dtype is torch.int8, expected"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        _quantize(**_bad(**changes))


@pytest.mark.parametrize("d", [24, 96])
def test_head_dims_that_an_option_or_the_kernel_lacks(d, device):
    q, k, v = _inputs(Case(d=d), device)
    message = "a multiple of 16" if d % 16 else "a power of two with hadamard=True"
    with pytest.raises(ValueError, match=f"q has head dim {d}, expected {message}"):
        _quantize(q, k, v, hadamard=True)


def _model(q, k, v):
    given = _quantize(q * 2, k, v * 3, **ALL, rows_per_block=64)
    return tuple(x.float() + 1 for x in given)


def test_compile_without_graph_breaks(device):
    """One graph for all lengths."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(_model, fullgraph=True, backend=backend, dynamic=True)
    for length in (70, 200):
        inputs = _inputs(Case(d=128, dv=128, h_q=4, s_k=length), device)
        for a, b in zip(compiled(*inputs), _model(*inputs), strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1


@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "heads"])
def test_opcheck(blocks, device):
    inputs = _inputs(Case(h_q=4, h_k=1), device)
    arguments = (*inputs, True, True, blocks, blocks, not blocks, 128, E4M3, E4M3)
    torch.library.opcheck(torch.ops.fa3.quantize_fp8.default, arguments)


def test_meta_tensors():
    q, k, v = (x.to("meta") for x in _inputs(Case(), "cpu"))
    given = _quantize(q, k, v, **MEANS, block_scales=False)
    assert (given.q.device.type, given.q.dtype, given.q.shape) == ("meta", E4M3, q.shape)
    assert (given.q_descale.shape, given.lse_shift.shape) == ((1, 2), (1, 2, 130))
    assert given.v_shift.shape == (1, 2, 64)


ERRORS = {"subtract_mean": True, "sum_errors": True}
SIGNATURES = [
    *(QuantizeSignature("bf16", "e4m3", d, 128) for d in (64, 128, 256)),
    *(QuantizeSignature("bf16", "e4m3", d, 128, hadamard=True) for d in (64, 128, 256)),
    QuantizeSignature("bf16", "e4m3", 128, 128, hadamard=True, dot_with_mean=True),
    QuantizeSignature("bf16", "e4m3", 128, 128, hadamard=True, subtract_mean=True),
    QuantizeSignature("bf16", "int8", 128, 128, hadamard=True),
    *(QuantizeSignature("bf16", "e4m3", d, 128, **ERRORS) for d in (64, 128, 256)),
    QuantizeSignature("fp16", "e5m2", 128, 64, **ERRORS),
    QuantizeSignature("bf16", "e4m3", 128, 128, hadamard=True, dot_with_mean=True, is_ragged=True),
    QuantizeSignature("bf16", "e4m3", 256, 128, **ERRORS, is_ragged=True),
]


@pytest.mark.parametrize("signature", SIGNATURES, ids=repr)
def test_loads_and_stores_have_16_bytes_and_nothing_spills(signature, device):
    config = QuantizeConfig()
    report = analyse(jit.artifacts(KERNEL, signature, config).cubin)
    resources, local = report.resources, report.local
    assert (resources.frame, local.loads, local.stores) == (0, 0, 0)
    names = [f"{x.base} {'128' in x.text}" for x in report.program.code]
    rows = config.rows_per_thread(signature)
    mean = 4 if signature.has_mean else 0
    assert names.count("LDG True") == 2 * rows + mean
    assert names.count("LDG False") == (4 if signature.is_ragged else 0)  # where it lies
    assert names.count("STG True") == rows
    assert resources.registers * resources.threads * config.ctas_per_sm(signature) <= 65_536
