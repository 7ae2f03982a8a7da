"""fa3 inside Hugging Face models: tiny random ones, nothing is downloaded."""

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="the integration needs transformers: pip install fa3[transformers]"
)

from fa3.integrations import transformers as integration  # noqa: E402

BERT = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
LLAMA = {**BERT, "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False}


@pytest.fixture(autouse=True)
def registered():
    integration.register()
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """What fa3 was asked for, in order."""
    seen = []
    plain = integration.flash_attn_func

    def attention(q, k, v, **options):
        seen.append((q.dtype, tuple(q.shape), tuple(k.shape), options["causal"]))
        return plain(q, k, v, **options)

    monkeypatch.setattr(integration, "flash_attn_func", attention)
    return seen


def pair(kind, options, dtype=torch.float32):
    """The same weights twice: with eager attention, and with fa3."""
    config = getattr(transformers, f"{kind}Config")(**options)
    cls = getattr(transformers, f"{kind}Model")
    eager = cls._from_config(config, attn_implementation="eager", dtype=dtype).eval()
    ours = cls._from_config(config, attn_implementation="fa3", dtype=dtype).eval()
    ours.load_state_dict(eager.state_dict())
    return eager, ours


@torch.no_grad()
def hidden(model, tokens, **options):
    return model(input_ids=tokens, **options).last_hidden_state.double()


def least_cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=-1).min().item()


@pytest.mark.parametrize(
    "kind, options, heads, causal",
    [("Bert", BERT, (2, 2, 32), False), ("Llama", LLAMA, (4, 2, 16), True)],
)
def test_a_model_agrees_with_its_eager_attention(kind, options, heads, causal, calls):
    eager, ours = pair(kind, options)
    tokens = torch.randint(1, 50, (3, 17))
    out = hidden(ours, tokens)
    h_q, h_k, d = heads
    shapes = (3, 17, h_q, d), (3, 17, h_k, d)
    assert calls == [(torch.float16, *shapes, causal)] * 2
    assert least_cosine(out, hidden(eager, tokens)) > 0.9999


def test_a_mask_without_padding_is_no_mask():
    eager, ours = pair("Bert", BERT)
    tokens = torch.randint(1, 50, (2, 9))
    out = hidden(ours, tokens, attention_mask=torch.ones_like(tokens))
    assert least_cosine(out, hidden(eager, tokens)) > 0.9999


@pytest.mark.parametrize("kind, options", [("Bert", BERT), ("Llama", LLAMA)])
def test_padding_is_refused(kind, options, calls):
    _, ours = pair(kind, options)
    tokens = torch.randint(1, 50, (2, 9))
    padding = torch.ones_like(tokens)
    padding[1, 6:] = 0
    with pytest.raises(ValueError, match=r"\(2, 9\) holds 3 padding tokens"):
        hidden(ours, tokens, attention_mask=padding)
    assert calls == []


def test_a_ready_made_mask_is_refused(calls):
    _, ours = pair("Llama", LLAMA)
    bias = torch.zeros(1, 1, 9, 9)
    with pytest.raises(ValueError, match=r"no attention mask, got one of shape \(1, 1, 9, 9\)"):
        hidden(ours, torch.randint(1, 50, (1, 9)), attention_mask=bias)
    assert calls == []


def test_a_sliding_window_is_refused(calls):
    _, ours = pair("Mistral", {**LLAMA, "sliding_window": 4})
    with pytest.raises(NotImplementedError, match="mask|sliding_window"):
        hidden(ours, torch.randint(1, 50, (1, 9)))
    assert calls == []


def test_dropout_is_refused(calls):
    _, ours = pair("Bert", {**BERT, "attention_probs_dropout_prob": 0.5})
    with pytest.raises(NotImplementedError, match="dropout=0.5"):
        hidden(ours.train(), torch.randint(1, 50, (1, 9)))
    assert calls == []


def test_a_cache_with_free_space_is_refused():
    """Its last key is not the last query's."""
    options = {"q_length": 1, "kv_length": 16, "attention_mask": None}
    assert integration.mask(q_offset=15, **options) is None
    with pytest.raises(NotImplementedError, match="position 7 and the last key at 15"):
        integration.mask(q_offset=7, **options)


def test_16_bit_models_keep_their_dtype(calls):
    _, ours = pair("Bert", BERT, torch.bfloat16)
    with torch.no_grad():
        out = ours(input_ids=torch.randint(1, 50, (1, 5))).last_hidden_state
    assert out.dtype == torch.bfloat16
    assert {call[0] for call in calls} == {torch.bfloat16}
