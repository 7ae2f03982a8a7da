"""What the public functions share: arguments are looked at, and the call goes its way."""

from numbers import Real

import torch
from torch import Tensor

from . import autograd, jagged, ops
from .call import hints, lengths
from .call.layout import check_tensors
from .call.lengths import EQUAL, Lengths
from .call.options import Options, bool_of, int_of
from .call.scales import NO_DESCALES, Descales, named
from .plain import is_plain

# Arguments of FA3 that wait for their feature, with the value that means "not used".
_NOT_YET = {"qv": None, "attention_chunk": 0}


def options_of(softmax_scale, causal, window_size, sm_margin, softcap) -> tuple:
    """The fields of Options that are arguments of public functions."""
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise TypeError(f"window_size is {window_size!r}, expected a pair (left, right)") from None
    if (
        (softmax_scale is None or type(softmax_scale) is float)
        and type(causal) is bool
        and type(left) is type(right) is type(sm_margin) is int
        and type(softcap) is float
    ):
        return softmax_scale, causal, left, right, sm_margin, softcap
    try:
        return Options.of(softmax_scale, causal, left, right, sm_margin, softcap)[:6]
    except TypeError as error:
        is_mask = isinstance(softmax_scale, Tensor) and softmax_scale.dim() > 0
        misplaced = is_mask or causal is None or isinstance(causal, float)
        raise TypeError(f"{error}: {hints.ORDER}" if misplaced else str(error)) from None


def descales_of(q_descale, k_descale, v_descale, v_shift) -> Descales:
    if q_descale is None and k_descale is None and v_descale is None and v_shift is None:
        return NO_DESCALES
    return Descales(q_descale, k_descale, v_descale, v_shift)


def bounds_of(given: Lengths, max_seqlen_q, max_seqlen_k, check_lengths) -> tuple:
    """max_seqlen_q and max_seqlen_k, and check_lengths."""
    longest = (
        _longest("q", max_seqlen_q, given.cu_seqlens_q),
        _longest("k", max_seqlen_k, given.cu_seqlens_k),
    )
    return longest, check_lengths is not False and bool_of("check_lengths", check_lengths)


def _longest(side: str, most, cu_seqlens) -> int | None:
    """max_seqlen_q or max_seqlen_k as an int, or as the symbol of one."""
    if most is None:
        if cu_seqlens is not None:
            raise ValueError(
                f"max_seqlen_{side} is None but cu_seqlens_{side} is a tensor, expected the length "
                "of its longest sequence, or more"
            )
        return None
    return most if type(most) is int else int_of(f"max_seqlen_{side}", most)


def attend(  # noqa: PLR0913
    q,
    k,
    v,
    out,
    options,
    descales,
    out_dtype=None,
    check_scales=False,
    given=EQUAL,
    longest=(None, None),
    check_lengths=False,
    sink=None,
    deterministic=False,
    num_splits=1,
    metadata=None,
):
    """out and lse; directly, or by the operator where somebody watches."""
    if type(q) is not Tensor and given is EQUAL and all(map(jagged.is_jagged, (q, k, v))):
        (*values,), lengths_, longest = jagged.unpack(q, k, v, out)
        more = lengths_, longest, check_lengths, sink, deterministic, num_splits
        packed, lse = attend(*values, None, options, descales, out_dtype, check_scales, *more)
        return jagged.packed_like(q, packed), lse
    plain = are_plain(q, k, v, out, given)
    if torch.float32 in (q.dtype, k.dtype, v.dtype):
        q, k, v = in_autocasts_dtype(q, k, v)
    if out is not None:
        check_out(out)
    if descales is not NO_DESCALES or sink is not None:
        plain = _check_others(descales, sink) and plain
    if torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (sink is not None and sink.requires_grad)
    ):
        others = {**named(descales), "page_table": given.page_table, "out": out}
        others |= autograd.sinks_without(sink, given.cu_seqlens_q)
        autograd.check(q, k, v, options, given, others, plain)
        plain = False
    if check_scales is not False:
        check_scales = bool_of("check_scales", check_scales)
    try:
        if plain:
            checks = out_dtype, check_scales, given, longest, check_lengths
            return ops.run(q, k, v, out, options, descales, *checks, sink, num_splits, metadata)
        options, (softcap, *rest) = options[:5], options[5:]
        of_rows, (page_table, leftpad) = given[:4], given[4:]
        more = () if given is EQUAL else (*of_rows, *longest, check_lengths)
        score = {"softcap": softcap, "learnable_sink": sink, "num_splits": num_splits}
        score |= {"page_table": page_table, "rows_per_query": rest[0] if rest else 1}
        score["scheduler_metadata"] = metadata
        score["cache_leftpad"] = leftpad
        if out is None:
            score["deterministic"] = deterministic
            more = *descales, out_dtype, check_scales, *more
            return torch.ops.fa3.forward(q, k, v, *options, *more, **score)
        more = *descales, check_scales, *more
        return out, torch.ops.fa3.forward_out(q, k, v, out, *options, *more, **score)
    except (RuntimeError, ValueError):
        check_tensors(q=q, k=k, v=v)  # of nested and sparse ones the error said something odd
        raise


def in_autocasts_dtype(q, k, v) -> tuple:
    """All in the dtype of torch.autocast, as its own attention takes them, if it is on."""
    device = q.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return q, k, v
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))


def are_plain(q, k, v, out, given) -> bool:
    """Whether all are plain tensors, once they are tensors at all."""
    tensors = (q, k, v) if out is None else (q, k, v, out)
    if given is not EQUAL:
        tensors = (*tensors, *[x for x in given if x is not None])
    if is_plain(*tensors):
        return True
    check_tensors(q=q, k=k, v=v, **lengths.named(given))
    return False


def _check_others(descales: Descales, sink) -> bool:
    """Whether they are plain tensors, once they are tensors at all; scales need no gradient."""
    given = named(descales)
    sinks = {} if sink is None else {"learnable_sink": sink}
    check_tensors(**given, **sinks)
    if torch.is_grad_enabled() and any(x.requires_grad for x in given.values()):
        _refuse_grad(**given)
    return is_plain(*given.values(), *sinks.values())


def check_out(out) -> None:
    check_tensors(out=out)
    if out.requires_grad:
        raise ValueError("out has requires_grad=True, expected False")
    # torch's fallback for lazy negation has no custom operators, torch.compile no is_neg
    if not torch.compiler.is_dynamo_compiling() and out.is_neg():
        raise ValueError("out has is_neg()=True, expected False: it is a lazily negated view")


def check_unused(qv, attention_chunk, pack_gqa) -> None:
    if not (qv is pack_gqa is None and type(attention_chunk) is int and attention_chunk == 0):
        if pack_gqa is not None:
            bool_of("pack_gqa", pack_gqa)
        _refuse(qv=qv, attention_chunk=attention_chunk)


def splits_of(num_splits) -> int:
    if type(num_splits) is int and num_splits == 1:
        return 1
    number = int_of("num_splits", num_splits)
    if number < 0:
        raise ValueError(f"num_splits is {num_splits}, expected at least 0")
    return number


def _refuse(**arguments) -> None:
    for name, value in arguments.items():
        if name == "qv" and isinstance(value, bool):
            raise TypeError(f"qv is {value}, expected a tensor or None: {hints.ORDER}")
        is_unused = value is None or (isinstance(value, Real) and value == 0)
        if not is_unused:
            shown = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(
                f"{name} is {shown}: only {_NOT_YET[name]!r} is supported so far"
            )


def check_no_grad(**tensors) -> None:
    """Of a function without a backward pass; None where a tensor was not given."""
    if torch.is_grad_enabled():
        _refuse_grad(**{name: x for name, x in tensors.items() if x is not None})


def _refuse_grad(**tensors) -> None:
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise NotImplementedError(
                f"{name} has requires_grad=True, but there is no gradient of it yet: "
                "call within torch.no_grad(), or detach it"
            )
