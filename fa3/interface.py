"""The public functions for tensors as they are: FA3's names, order, defaults and meaning."""

from torch import Tensor

from .attend import attend, bounds_of, check_unused, descales_of, options_of, splits_of
from .call import hints, lengths
from .call.layout import check_tensors
from .call.listed import splits_with
from .call.options import bool_of, int_of


@hints.closed
def flash_attn_func(  # noqa: PLR0913 - the signature is FA3's
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
    *,
    out=None,
    v_shift=None,
    check_scales=False,
    learnable_sink=None,
    **unknown,
):
    """softmax(softmax_scale * q k^T) v in fp16, bf16 or FP8.

    q (batch, s_q, h_q, d), k (batch, s_k, h_k, d), v (batch, s_k, h_k, dv); h_q is a multiple of
    h_k, query head h reads key head h // (h_q // h_k). Head dims are multiples of 16 bytes up to
    256 elements: of 8 in fp16 and bf16, of 16 in FP8.
    Last dimensions are contiguous and tensors start at multiples of 16 bytes. Other strides are
    free; q, k or v is copied first if one of them is no multiple of 16 bytes, TMA's unit.

    causal: query i sees the keys j <= i + s_k - s_q (aligned to the bottom right).
    window_size: query i sees i + s_k - s_q - left <= j <= i + s_k - s_q + right; one below 0 is no
    bound; causal sets right to 0. A query that sees no key gives zeros and an lse of -inf.
    softmax_scale: 1 / sqrt(d) by default.
    softcap: scores become softcap * tanh(softmax_scale * q k^T / softcap) before they are masked;
        0.0, the default, leaves them as they are. What it makes of them has an error of 5e-7
        softcap.
    learnable_sink: (h_q,), fp32 or 16-bit with any stride: a logit for each query head that joins
        the sum of exponentials of every query and has no value, out = sum p v / (sum p + e^sink).
        softmax_scale and softcap do not reach it; lse counts it; where a query sees no key, out is
        0 and lse the sink. One of -inf changes nothing. Or (batch, h_q).
    sm_margin: number of SMs that the kernel leaves to others.
    num_splits: parts of a head's keys that different SMs work on, for few queries and many keys.
        1: none. n: each tile of queries has its key blocks cut into n parts of about equal length;
        what a query gets, to the bit, depends on its own lengths and n, not on others in the batch.
        0: the smallest number that fills the machine about as well as any, which depends on the
        shapes. Partial results, in fp32, take n times the memory of out and lse, and are combined.
        Without effect on GPUs before Hopper, and where no kernel runs.
    pack_gqa: a hint about speed, of no effect so far.
    deterministic: gradients are the same to the bit on every run, at some cost of speed; out and
        lse always are. torch.use_deterministic_algorithms(True) has the same effect.
    Numbers may be tensors without dimensions; these are read, which waits for their device.
    out: (batch, s_q, h_q, dv), receives the result instead of a new tensor.

    fp16, bf16: q, k, v and out have one dtype; or k and v are torch.float8_e4m3fn beside such q,
        with k_descale and v_descale (batch, h_k), or None for 1, without a backward pass.
    FP8: q, k, v are torch.float8_e4m3fn; k and v may be torch.float8_e5m2, and q and k may both be
    torch.int8. The result is bf16, or what `out` is: bf16, fp16 or fp32.
    q_descale, k_descale, v_descale: scales of one-byte inputs, value = byte * descale. Each is fp32
    with any strides, in any of these shapes; None is 1. `fa3.quantize_fp8` makes them. They must be
    finite and not negative, which is not looked at; those that are 0 give scores or values of 0.

        q_descale   (batch, h_k)                    one for all queries that read a key head
                    (batch, h_q, ceil(s_q / 128))   [b, h, i // 128] for query i of query head h
        k_descale   (batch, h_k)                    one for all keys of a head
                    (batch, h_k, ceil(s_k / B))     [b, h, j // B] for key j; B is 64 or 128
        v_descale   as k_descale, each with a B of its own, or
                    (batch, h_k, 1, dv)             [b, h, 0, c] for channel c

    v_shift: (batch, h_k, dv) in fp32, with one-byte inputs: what all values of a channel lack,
        value = byte * v_descale + v_shift. None is 0. Softmax weights add up to 1, so it is added
        to the result, beside a sink in part; where a query sees no key, that stays 0. Any strides;
        it is copied first if the last is not 1, or others or its address are no multiples of 16
        bytes.
    check_scales: wait for the device and refuse scales that are not finite and above 0, and a
        v_shift that is not finite.

    Under torch.autocast q, k and v are cast to its dtype if one of them is in fp32. q, k and v may
    be nested tensors of layout torch.jagged, (batch, lengths, heads, head dim): then out is one,
    too, and lse (h_q, total_q), as of flash_attn_varlen_func.

    Returns out, or with return_attn_probs=True the pair out and lse (batch, h_q, s_q), fp32, the
    natural logarithm of each row's sum of exponentials. In FP8 it is that of the exponentials as
    e4m3 rounds them, which is what v was weighted with: its error is at most 2^-4 and falls with
    the number of keys that matter; with head dims of v above 128 they are summed before rounding.

    Raises:
        TypeError, ValueError: the message names the argument; nothing was launched or written
            (but for the comparisons of check_scales).
        NotImplementedError: an argument that is not supported yet, a tensor that requires grad
            where there is no backward pass, or has a tangent of forward-mode AD, or a GPU without a
            kernel for the case.
    """
    if unknown:
        raise hints.unknown_argument(flash_attn_func, next(iter(unknown)))
    check_unused(qv, attention_chunk, pack_gqa)
    num_splits = splits_of(num_splits)
    if return_attn_probs is not False:
        return_attn_probs = bool_of("return_attn_probs", return_attn_probs)
    options = options_of(softmax_scale, causal, window_size, sm_margin, softcap)
    descales = descales_of(q_descale, k_descale, v_descale, v_shift)
    if deterministic is not False:
        deterministic = bool_of("deterministic", deterministic)
    more = {"sink": learnable_sink, "deterministic": deterministic, "num_splits": num_splits}
    out, lse = attend(q, k, v, out, options, descales, check_scales=check_scales, **more)
    return (out, lse) if return_attn_probs else out


@hints.closed
def flash_attn_varlen_func(  # noqa: PLR0913 - the signature is FA3's
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
    *,
    out=None,
    v_shift=None,
    check_scales=False,
    check_lengths=False,
    learnable_sink=None,
    page_table=None,
    scheduler_metadata=None,
    **unknown,
):
    """flash_attn_func of sequences with lengths of their own, packed without padding.

    q (total_q, h_q, d), k (total_k, h_k, d), v (total_k, h_k, dv): the rows of one sequence after
    those of another.
    cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 on q's device; the queries of sequence i are the
        rows cu_seqlens_q[i] to cu_seqlens_q[i + 1], and so are its keys. Either may be None: then
        q, or k and v, are dense, (batch, s, h, d).
    max_seqlen_q, max_seqlen_k: at least the largest lengths, needed beside cu_seqlens. They are
        bounds that programs keep on the host; the result does not depend on them.
    seqused_q, seqused_k: (batch,) int32; only so many first rows of each sequence count. The rows
        of out and lse beyond are left as they are, which in new tensors is uninitialised, and so
        are rows of out that belong to no sequence. Gradients of all such rows are 0, whatever
        comes back for them.
    page_table: (batch, pages) int32 instead of cu_seqlens_k; then k and v are pages, (num_pages,
        page_size, h_k, d), and key j of sequence i is row j % page_size of the page
        page_table[i, j // page_size]. Entries beyond the last key, which seqused_k tells, may be
        anything. Pages of a multiple of 8 keys are loaded faster than others.
    check_lengths: wait for the device and refuse lengths that do not fit the tensors: cu_seqlens
        has to begin with 0, never to fall and to end with the number of rows, and pages have to
        exist. On CPU tensors all is checked anyway, but packed tensors may have more rows.
        Elsewhere lengths that reach beyond the tensors are cut and pages that do not exist hold
        zeros, so that nothing else is read or written.

    scheduler_metadata: of fa3.get_scheduler_metadata with pack_gqa=False, for the same call.

    Lengths stay on the device: no call waits for them, none recompiles for others, and a CUDA graph
    may be replayed with other lengths in the same tensors. A sequence may be without queries or
    keys. Queries and keys of a sequence are aligned as in flash_attn_func, by its own lengths, so
    that causal and window_size mean the same.

    One-byte inputs: descales by head and channel and v_shift are as in flash_attn_func, with the
    number of sequences for the batch; those by blocks, of packed tensors,

        q_descale   (1, h_q, total_q // 128 + batch)   [0, h, cu_seqlens_q[i] // 128 + i + j // 128]
        k_descale   (1, h_k, total_k // B + batch)     [0, h, cu_seqlens_k[i] // B + i + j // B]
        v_descale   as k_descale, with a B of its own

    for query or key j of sequence i.

    The other arguments are those of flash_attn_func.

    Returns out, like q but with v's head dim, or with return_attn_probs=True the pair out and lse,
    in fp32: (h_q, total_q), of dense q (batch, h_q, s_q).

    Raises: as flash_attn_func.
    """
    if unknown:
        raise hints.unknown_argument(flash_attn_varlen_func, next(iter(unknown)))
    check_unused(qv, attention_chunk, pack_gqa)
    num_splits = splits_with(scheduler_metadata, splits_of(num_splits))
    if return_attn_probs is not False:
        return_attn_probs = bool_of("return_attn_probs", return_attn_probs)
    options = options_of(softmax_scale, causal, window_size, sm_margin, softcap)
    descales = descales_of(q_descale, k_descale, v_descale, v_shift)
    given = lengths.given(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table)
    if deterministic is not False:
        deterministic = bool_of("deterministic", deterministic)
    bounds = bounds_of(given, max_seqlen_q, max_seqlen_k, check_lengths)
    more = given, *bounds, learnable_sink, deterministic
    checks = None, check_scales, *more
    last = {"num_splits": num_splits, "metadata": scheduler_metadata}
    out, lse = attend(q, k, v, out, options, descales, *checks, **last)
    return (out, lse) if return_attn_probs else out


@hints.closed
def flash_attn_qkvpacked_func(  # noqa: PLR0913 - the signature is FA3's
    qkv,
    softmax_scale=None,
    causal=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    deterministic=False,
    num_heads_q=None,
    sm_margin=0,
    return_attn_probs=False,
    *,
    learnable_sink=None,
    **unknown,
):
    """flash_attn_func of q, k and v that are slices of one tensor; none of them is copied.

    qkv: (batch, s, 3, h, d), or with num_heads_q = h_q also (batch, s, h_q + 2 h_k, d), the heads
        of q before those of k and v.

    The other arguments and what is returned are as in flash_attn_func.

    Raises: as flash_attn_func.
    """
    if unknown:
        raise hints.unknown_argument(flash_attn_qkvpacked_func, next(iter(unknown)))
    q, k, v = _unpacked(qkv, num_heads_q)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        None,
        q_descale,
        k_descale,
        v_descale,
        window_size,
        attention_chunk,
        softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        return_attn_probs=return_attn_probs,
        learnable_sink=learnable_sink,
    )


def _unpacked(qkv, num_heads_q) -> tuple[Tensor, Tensor, Tensor]:
    check_tensors(qkv=qkv)
    shape = tuple(qkv.shape)
    if qkv.dim() == 5:
        if shape[2] != 3:
            raise ValueError(f"qkv has shape {shape}, expected 3 in dimension 2: (b, s, 3, h, d)")
        return qkv.unbind(dim=2)
    if qkv.dim() != 4:
        raise ValueError(
            f"qkv has shape {shape}, expected (b, s, 3, h, d), or (b, s, h_q + 2 h_k, d) with "
            "num_heads_q"
        )
    if num_heads_q is None:
        raise ValueError(f"num_heads_q is None but qkv has shape {shape}, expected the heads of q")
    h_q = int_of("num_heads_q", num_heads_q)
    others = shape[2] - h_q
    if h_q < 0 or others < 0 or others % 2:
        raise ValueError(
            f"num_heads_q is {h_q} but qkv has {shape[2]} heads, expected those of q and an even "
            "number of others"
        )
    return qkv.split([h_q, others // 2, others // 2], dim=2)
