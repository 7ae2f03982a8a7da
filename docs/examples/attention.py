"""Attention in NumPy, one query at a time, as a textbook would write it.

    python docs/examples/attention.py       compares each form with fa3, on the CPU

Nothing here is quick or clever; it is what the torch references are checked against.
docs/attention.md explains it.
"""

import numpy as np


def softmax(x):
    """exp(x) / sum(exp(x)), shifted by the maximum so that nothing overflows."""
    e = np.exp(x - x.max())
    return e / e.sum()


def log_sum_exp(x):
    """log(sum(exp(x))); -inf for no numbers at all."""
    if len(x) == 0:
        return -np.inf
    return x.max() + np.log(np.exp(x - x.max()).sum())


def attend(query, keys, values, scale, softcap=0.0, sink=-np.inf):
    """One query (d,) over keys (n, d) and values (n, dv): a weighted mean of the values, (dv,).

    Also gives the logarithm of the sum that the weights were divided by. No key, no output: 0.
    softcap: scores stay between it and its negative. sink: a score whose value is 0.
    """
    scores = scale * (keys @ query)
    if softcap > 0:
        scores = softcap * np.tanh(scores / softcap)
    if sink > -np.inf:
        scores, values = np.append(scores, sink), np.vstack([values, np.zeros(values.shape[1])])
    if len(scores) == 0:
        return np.zeros(values.shape[1]), -np.inf
    return softmax(scores) @ values, log_sum_exp(scores)


def cross_attention(q, k, v, scale):
    """Queries (s_q, d) of one sequence, keys (s_k, d) and values (s_k, dv) of another."""
    rows = [attend(query, k, v, scale) for query in q]
    return np.stack([out for out, _ in rows]), np.array([lse for _, lse in rows])


def self_attention(q, k, v, scale):
    """Queries, keys and values come from the same sequence: as many queries as keys."""
    assert len(q) == len(k)
    return cross_attention(q, k, v, scale)


def window_attention(q, k, v, scale, left=-1, right=-1, **score):
    """Query i stands at key i + s_k - s_q and sees `left` keys before it and `right` after it.

    The last query stands at the last key. -1: no bound on that side.
    """
    out, lse = np.zeros((len(q), v.shape[1])), np.zeros(len(q))
    for i, query in enumerate(q):
        here = i + len(k) - len(q)
        first = 0 if left < 0 else max(0, here - left)
        last = len(k) - 1 if right < 0 else min(len(k) - 1, here + right)
        seen = slice(first, max(first, last + 1))
        out[i], lse[i] = attend(query, k[seen], v[seen], scale, **score)
    return out, lse


def causal_attention(q, k, v, scale):
    """No query sees a key that comes after it."""
    return window_attention(q, k, v, scale, right=0)


def multi_head_attention(  # noqa: PLR0913
    q, k, v, scale, left=-1, right=-1, softcap=0.0, sinks=None
):
    """Heads (s, h, d) attend independently; with fewer heads in k and v, neighbours share one.

    Grouped queries: with h_q = 6 and h_k = 2, query heads 0, 1, 2 read key head 0, the others 1.
    sinks: (h_q,). Gives out (s_q, h_q, dv) and lse (h_q, s_q).
    """
    group = q.shape[1] // k.shape[1]
    sinks = np.full(q.shape[1], -np.inf) if sinks is None else sinks
    heads = [
        window_attention(
            *(q[:, h], k[:, h // group], v[:, h // group], scale, left, right),
            softcap=softcap,
            sink=sink,
        )
        for h, sink in enumerate(sinks)
    ]
    return np.stack([out for out, _ in heads], axis=1), np.stack([lse for _, lse in heads])


def attention_layer(x, w_qkv, w_out, heads, scale):
    """What a transformer's layer does: x (s, e) -> (s, e), causal, with a fused projection.

    One product makes q, k and v: w_qkv (e, 3 * heads * d). w_out (heads * d, e) mixes the heads.
    """
    q, k, v = (x @ w_qkv).reshape(len(x), 3, heads, -1).swapaxes(0, 1)
    out, _ = multi_head_attention(q, k, v, scale, right=0)
    return out.reshape(len(x), -1) @ w_out


def main():
    import torch

    import fa3

    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, h, 64)) for n, h in ((5, 4), (9, 2), (9, 2)))
    scale = 64**-0.5
    tensors = [torch.tensor(x)[None].half() for x in (q, k, v)]
    rounded = [x[0].double().numpy() for x in tensors]
    forms = {
        "cross-attention": ({}, {}),
        "causal": ({"right": 0}, {"causal": True}),
        "a window": ({"left": 3, "right": 0}, {"window_size": (3, 0)}),
        "softcap": ({"softcap": 2.0}, {"softcap": 2.0}),
    }
    for name, (textbook, ours) in forms.items():
        out, lse = multi_head_attention(*rounded, scale, **textbook)
        found, found_lse = fa3.flash_attn_func(*tensors, return_attn_probs=True, **ours)
        np.testing.assert_allclose(found[0], out, atol=2e-3)
        np.testing.assert_allclose(found_lse[0], lse, atol=2e-3)
        print(f"{name}: fa3 agrees")

    x, w_qkv, w_out = (rng.standard_normal(n) / 8 for n in ((7, 32), (32, 3 * 4 * 16), (64, 32)))
    qkv = torch.tensor((x @ w_qkv).reshape(1, 7, 3, 4, 16)).half()
    heads = fa3.flash_attn_qkvpacked_func(qkv, causal=True)
    layer = attention_layer(x, w_qkv, w_out, heads=4, scale=16**-0.5)
    found = heads.flatten(2)[0].double().numpy() @ w_out
    np.testing.assert_allclose(found, layer, atol=2e-3)
    print("a layer with fused q, k and v: fa3 agrees")


if __name__ == "__main__":
    main()
