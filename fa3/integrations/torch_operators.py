"""aten's attention operators, computed by fa3: torch's arguments, results, strides and dtypes.

Each function is called below autograd, with the arguments of the operator that it stands in for,
and raises `Unserved` before anything is launched where torch has to compute the call itself.
OPERATORS lists them. Tensors of operators called sdpa are (b, h, s, d), of the others (b, s, h, d),
or (total, h, d) with cum_seq_q.

What is_causal means for s_q != s_k differs. Of cuDNN's, the memory-efficient and the CPU operator
it is aligned to the top left, as in F.scaled_dot_product_attention; of the flash operators to the
bottom right. F.scaled_dot_product_attention calls those for s_q == s_k only, while
torch.nn.attention.bias and varlen_attn use the difference.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import lengths as lengths_
from ..call.scales import NO_DESCALES, Descales
from .torch_calls import FP8, Call, Unserved, backward, call_of, forward, refuse


class _Sdpa(NamedTuple):
    """query, key and value of an sdpa operator in fa3's order, and what is asked of them."""

    q: Tensor  # (b, s_q, h_q, d)
    k: Tensor  # (b, s_k, h_k, d), without keys that no query sees
    v: Tensor
    call: Call

    @classmethod
    def bottom_right(cls, query, key, value, is_causal, scale, descales=NO_DESCALES):  # noqa: PLR0913
        call = call_of(scale, is_causal, descales=descales)
        return cls(_swapped(query), _swapped(key), _swapped(value), call)

    @classmethod
    def top_left(cls, query, key, value, is_causal, scale):  # noqa: PLR0913
        """Query i sees the keys j <= i. Windows are aligned to the bottom right, so that one to
        the right moves the diagonal up; keys beyond the last query are seen by none."""
        q, k, v = _swapped(query), _swapped(key), _swapped(value)
        beyond = k.shape[1] - q.shape[1]
        if is_causal and beyond > 0:
            k, v = k[:, :-beyond], v[:, :-beyond]
        if is_causal and beyond < 0:
            return cls(q, k, v, call_of(scale, False, right=-beyond))
        return cls(q, k, v, call_of(scale, is_causal))

    def forward(self, out: Tensor) -> Tensor:
        """Write out (b, h_q, s_q, dv) and return the lse (b, h_q, s_q)."""
        return forward(self.q, self.k, self.v, self.call, out.transpose(1, 2))

    def backward(self, grad_out, out, lse, num_keys: int, with_dq=True) -> tuple:  # noqa: PLR0913
        """Gradients (b, h, s, d) of query, key and value; without dq an empty one of query."""
        tensors = _swapped(grad_out), self.q, self.k, self.v, _swapped(out), lse
        dq, *others = backward(*tensors, self.call, with_dq)
        beyond = num_keys - self.k.shape[1]
        if beyond:
            others = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, beyond)) for x in others)
        return dq.transpose(1, 2) if with_dq else dq, *(x.transpose(1, 2) for x in others)


def _swapped(x: Tensor) -> Tensor:
    if x.dim() != 4:
        raise Unserved(f"tensors of {x.dim()} dimensions")
    return x.transpose(1, 2)


def _out_dtype(query: Tensor) -> torch.dtype:
    return torch.bfloat16 if query.dtype == FP8 else query.dtype


def _room(query: Tensor, value: Tensor) -> Tensor:
    """A new output (b, h_q, s_q, dv) whose strides are in the order of query's."""
    shape, dtype = (*query.shape[:-1], value.shape[-1]), _out_dtype(query)
    if shape == tuple(query.shape):
        return torch.empty_like(query, dtype=dtype)
    order = sorted(range(len(shape)), key=query.stride, reverse=True)
    return torch.empty_permuted(shape, order, dtype=dtype, device=query.device)


def _like(gradients, *tensors) -> tuple[Tensor, ...]:
    """The gradients with the strides that torch.compile expects, those of empty_like."""
    found = []
    for gradient, x in zip(gradients, tensors, strict=True):
        room = torch.empty_like(x)
        same = gradient.stride() == room.stride()
        found.append(gradient if same else room.copy_(gradient))
    return tuple(found)


def _without_dropout(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The flash operators' rng_state, the tensor beside it, debug_attn_mask: nobody reads them."""
    state, offset = (query.new_empty(n, dtype=torch.uint64) for n in ((2,), ()))
    return state, offset, query.new_empty(0, dtype=_out_dtype(query))


def _signed(query: Tensor) -> Tensor:
    """A philox_seed, which nobody reads without dropout, that `_is_signed` knows again.

    So the backward pass is fa3's where the forward pass was, although the choice of backends may
    have changed in between.
    """
    return query.new_empty(2, dtype=torch.int64)[1]


def _is_signed(philox_seed: Tensor) -> bool:
    return philox_seed is not None and philox_seed.storage_offset() == 1


def _refuse_unless_flash() -> None:
    """cuDNN and the memory-efficient kernels are fa3's only where flash attention may be chosen.

    torch prefers cuDNN on Hopper; who excludes flash attention, by `sdpa_kernel`, wants theirs.
    """
    if not torch.backends.cuda.flash_sdp_enabled():
        raise Unserved("flash attention is switched off")


def _refuse_unless_signed(philox_seed) -> None:
    if not _is_signed(philox_seed):
        raise Unserved("the forward pass was torch's")


def sdpa_flash_quantized(  # noqa: PLR0913
    query, key, value, q_descale=None, k_descale=None, v_descale=None,
    dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None,
):  # fmt: skip
    refuse(dropout_p=dropout_p, return_debug_mask=return_debug_mask)
    descales = _descales(q_descale, k_descale, v_descale)
    sdpa = _Sdpa.bottom_right(query, key, value, is_causal, scale, descales)
    out = _room(query, value)
    lse = sdpa.forward(out)
    return out, lse, None, None, query.shape[2], key.shape[2], *_without_dropout(query)


def sdpa_flash(  # noqa: PLR0913
    query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
):
    others = dropout_p, is_causal, return_debug_mask
    return sdpa_flash_quantized(query, key, value, None, None, None, *others, scale=scale)


def sdpa_flash_backward(  # noqa: PLR0913
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k,
    dropout_p, is_causal, philox_seed, philox_offset, *, scale=None,
):  # fmt: skip
    refuse(dropout_p=dropout_p)
    sdpa = _Sdpa.bottom_right(query, key, value, is_causal, scale)
    return _like(sdpa.backward(grad_out, out, logsumexp, key.shape[2]), query, key, value)


def sdpa_cpu(  # noqa: PLR0913
    query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None
):
    refuse(dropout_p=dropout_p, attn_mask=attn_mask)
    out = _room(query, value)
    lse = _Sdpa.top_left(query, key, value, is_causal, scale).forward(out)
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)


def sdpa_cpu_backward(  # noqa: PLR0913
    grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None,
    scale=None,
):  # fmt: skip
    refuse(dropout_p=dropout_p, attn_mask=attn_mask)
    sdpa = _Sdpa.top_left(query, key, value, is_causal, scale)
    return sdpa.backward(grad_out, out, logsumexp, key.shape[2])


def sdpa_cudnn(  # noqa: PLR0913
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
    return_debug_mask=False, *, scale=None,
):  # fmt: skip
    _refuse_unless_flash()
    refuse(attn_bias=attn_bias, dropout_p=dropout_p, return_debug_mask=return_debug_mask)
    out = _room(query, value)
    lse = _Sdpa.top_left(query, key, value, is_causal, scale).forward(out)
    state = _signed(query), query.new_empty((), dtype=torch.int64), None
    return out, lse.unsqueeze(-1), None, None, query.shape[2], key.shape[2], *state


def sdpa_cudnn_backward(  # noqa: PLR0913
    grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias,
    cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale=None,
):  # fmt: skip
    _refuse_unless_signed(philox_seed)
    sdpa = _Sdpa.top_left(query, key, value, is_causal, scale)
    lse = logsumexp.squeeze(-1)
    return _like(sdpa.backward(grad_out, out, lse, key.shape[2]), query, key, value)


EFFICIENT_ROWS = 32  # the memory-efficient operator rounds the length of its lse up to them


def sdpa_efficient(  # noqa: PLR0913
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *,
    scale=None,
):  # fmt: skip
    _refuse_unless_flash()
    refuse(attn_bias=attn_bias, dropout_p=dropout_p)
    batch, h_q, s_q, _ = query.shape
    out = query.new_empty(batch, s_q, h_q, value.shape[3]).transpose(1, 2)
    lse = _Sdpa.top_left(query, key, value, is_causal, scale).forward(out)
    missing = -s_q % EFFICIENT_ROWS
    lse = torch.nn.functional.pad(lse, (0, missing)) if compute_log_sumexp else lse[..., :0].clone()
    return out, lse, _signed(query), query.new_empty((), dtype=torch.int64)


def sdpa_efficient_backward(  # noqa: PLR0913
    grad_out_, query, key, value, attn_bias, out, logsumexp, philox_seed, philox_offset,
    dropout_p, grad_input_mask, is_causal=False, *, scale=None,
):  # fmt: skip
    _refuse_unless_signed(philox_seed)
    sdpa = _Sdpa.top_left(query, key, value, is_causal, scale)
    lse = logsumexp[..., : query.shape[2]]
    with_dq = grad_input_mask[0]
    dq, dk, dv = sdpa.backward(grad_out_, out, lse, key.shape[2], with_dq)
    return dq if with_dq else None, dk, dv, None


def flash_forward_quantized(  # noqa: PLR0913
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    return_debug_mask, q_descale=None, k_descale=None, v_descale=None, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
    block_table=None, num_splits=None,
):  # fmt: skip
    out = _room(query, value)
    lse = flash_forward_inplace(
        *(out, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k),
        *(dropout_p, is_causal, return_debug_mask),
        scale=scale,
        window_size_left=window_size_left,
        window_size_right=window_size_right,
        seqused_k=seqused_k,
        alibi_slopes=alibi_slopes,
        block_table=block_table,
        num_splits=num_splits,
        descales=_descales(q_descale, k_descale, v_descale),
    )
    return out, lse, *_without_dropout(query)


def flash_forward(  # noqa: PLR0913
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    return_debug_mask, *, scale=None, window_size_left=None, window_size_right=None,
    seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    return flash_forward_quantized(
        *(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k),
        *(dropout_p, is_causal, return_debug_mask),
        scale=scale,
        window_size_left=window_size_left,
        window_size_right=window_size_right,
        seqused_k=seqused_k,
        alibi_slopes=alibi_slopes,
        block_table=block_table,
        num_splits=num_splits,
    )


def flash_forward_inplace(  # noqa: PLR0913
    out, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    return_debug_mask, *, scale=None, window_size_left=None, window_size_right=None,
    seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None, descales=NO_DESCALES,
):  # fmt: skip
    refuse(dropout_p=dropout_p, return_debug_mask=return_debug_mask, alibi_slopes=alibi_slopes)
    call = _ragged(
        *(cum_seq_q, cum_seq_k, max_q, max_k, is_causal, scale),
        *(window_size_left, window_size_right, seqused_k, block_table, descales),
    )
    return forward(query, key, value, call, out, num_splits)


def flash_backward(  # noqa: PLR0913
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k,
    dropout_p, is_causal, rng_state, unused, *, scale=None, window_size_left=None,
    window_size_right=None,
):  # fmt: skip
    refuse(dropout_p=dropout_p)
    windows = window_size_left, window_size_right
    call = _ragged(cum_seq_q, cum_seq_k, max_q, max_k, is_causal, scale, *windows)
    gradients = backward(grad_out, query, key, value, out, logsumexp, call)
    return _like(gradients, query, key, value)


def _ragged(  # noqa: PLR0913
    cum_seq_q, cum_seq_k, max_q, max_k, is_causal, scale, left, right,
    seqused_k=None, block_table=None, descales=NO_DESCALES,
) -> Call:  # fmt: skip
    """What a flash operator is asked. Whole numbers may be tensors on the CPU."""
    left, right = (-1 if x is None else int(x) for x in (left, right))
    if cum_seq_q is None and seqused_k is None and block_table is None:
        return call_of(scale, is_causal, left, right, descales=descales)
    lengths = lengths_.given(cum_seq_q, cum_seq_k, None, seqused_k, block_table)
    longest = int(max_q), int(max_k)
    return call_of(
        scale, is_causal, left, right, lengths=lengths, longest=longest, descales=descales
    )


def _descales(q, k, v) -> Descales:
    return NO_DESCALES if q is k is v is None else Descales(q, k, v, None)


_SDPA, _FLASH = "_scaled_dot_product", "_flash_attention"
OPERATORS: dict[str, Callable] = {
    f"{_SDPA}_flash_attention": sdpa_flash,
    f"{_SDPA}_flash_attention.quantized": sdpa_flash_quantized,
    f"{_SDPA}_flash_attention_backward": sdpa_flash_backward,
    f"{_SDPA}_cudnn_attention": sdpa_cudnn,
    f"{_SDPA}_cudnn_attention_backward": sdpa_cudnn_backward,
    f"{_SDPA}_efficient_attention": sdpa_efficient,
    f"{_SDPA}_efficient_attention_backward": sdpa_efficient_backward,
    f"{_FLASH}_forward": flash_forward,
    f"{_FLASH}_forward.quantized": flash_forward_quantized,
    f"{_FLASH}_forward_no_dropout_inplace": flash_forward_inplace,
    f"{_FLASH}_backward": flash_backward,
}
CPU_OPERATORS: dict[str, Callable] = {
    f"{_SDPA}_flash_attention_for_cpu": sdpa_cpu,
    f"{_SDPA}_flash_attention_for_cpu_backward": sdpa_cpu_backward,
}
