"""fa3 inside Hugging Face models: tiny random ones, nothing is downloaded."""

import copy
import dataclasses
import pickle
import re
import warnings

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="the integration needs transformers: pip install fa3[transformers]"
)

from fa3.integrations import transformers as integration  # noqa: E402
from perf import architectures  # noqa: E402

BERT = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
LLAMA = {**BERT, "num_attention_heads": 4, "num_key_value_heads": 2}
MISTRAL = {**LLAMA, "sliding_window": 4}
GEMMA = {
    **MISTRAL,
    "head_dim": 16,
    "attn_logit_softcapping": 0.5,
    "query_pre_attn_scalar": 1,
}
GPT_OSS = {**MISTRAL, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 2}
PLAIN = [("Bert", BERT), ("Llama", LLAMA)]


@pytest.fixture(autouse=True)
def registered(request):
    """Without a kernel, but in a test that asks for a device; and without gradients."""
    if "device" not in request.fixturenames:
        request.getfixturevalue("plain_torch")
    integration.register()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch):
    """What fa3 was asked for, in order."""
    seen = []
    plain = integration.flash_attn_func

    def attention(q, k, v, **options):
        window = options["window_size"]
        seen.append((q.dtype, tuple(q.shape), tuple(k.shape), options["causal"], window))
        return plain(q, k, v, **options)

    monkeypatch.setattr(integration, "flash_attn_func", attention)
    return seen


def pair(kind, options, dtype=torch.float32, head="Model"):
    """The same weights twice: with eager attention, and with fa3."""
    config = getattr(transformers, f"{kind}Config")(**options)
    cls = getattr(transformers, f"{kind}{head}")
    models = [
        cls._from_config(copy.deepcopy(config), attn_implementation=name, dtype=dtype).eval()
        for name in ("eager", "fa3")
    ]
    eager, ours = models
    architectures.make_attention_matter(eager)
    for name, parameter in eager.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    ours.load_state_dict(eager.state_dict())
    assert [model.config._attn_implementation for model in models] == ["eager", "fa3"]
    return eager, ours


def tokens_of(*shape):
    return torch.randint(1, 50, shape)


def hidden(model, tokens, **options):
    return model(input_ids=tokens, **options).last_hidden_state.double()


def least_cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=-1).min().item()


@pytest.mark.parametrize(
    "kind, options, heads, causal, window",
    [
        ("Bert", BERT, (2, 2, 32), False, (-1, -1)),
        ("Llama", LLAMA, (4, 2, 16), True, (-1, -1)),
        ("Mistral", MISTRAL, (4, 2, 16), True, (3, -1)),
        ("Mistral", {**MISTRAL, "sliding_window": 17}, (4, 2, 16), True, (-1, -1)),
    ],
)
def test_a_model_agrees_with_its_eager_attention(kind, options, heads, causal, window, calls):
    eager, ours = pair(kind, options)
    tokens = tokens_of(3, 17)
    out = hidden(ours, tokens)
    h_q, h_k, d = heads
    shapes = (3, 17, h_q, d), (3, 17, h_k, d)
    assert calls == [(torch.bfloat16, *shapes, causal, window)] * 2
    expected = hidden(eager, tokens)
    assert len(calls) == 2
    assert least_cosine(out, expected) > 0.999


def test_a_model_through_the_kernel(device):
    """A sliding window, grouped heads, fp32."""
    eager, ours = (model.to(device) for model in pair("Mistral", MISTRAL))
    tokens = tokens_of(1, 7).to(device)
    mask = torch.ones_like(tokens)
    assert least_cosine(hidden(ours, tokens, attention_mask=mask), hidden(eager, tokens)) > 0.999


@pytest.mark.parametrize(
    "kind, options, name", [("Gemma2", GEMMA, "softcap"), ("GptOss", GPT_OSS, "learnable_sink")]
)
def test_softcap_and_sinks(kind, options, name, monkeypatch):
    """Both reach the attention, in fp32 and with a 16-bit parameter; what lost one is noticed."""
    tokens = tokens_of(3, 17)
    for dtype in (torch.float32, torch.bfloat16):
        eager, ours = pair(kind, options, dtype)
        assert least_cosine(hidden(ours, tokens), hidden(eager, tokens)) > 0.99
    eager, ours = pair(kind, options)
    expected = hidden(eager, tokens)
    assert least_cosine(hidden(ours, tokens), expected) > 0.999
    plain = integration.flash_attn_func
    monkeypatch.setattr(
        integration, "flash_attn_func", lambda *qkv, **given: plain(*qkv, **given | {name: None})
    )
    assert least_cosine(hidden(ours, tokens), expected) < 0.99


@pytest.mark.parametrize("kind, options", [("Gemma2", GEMMA), ("GptOss", GPT_OSS)])
def test_softcap_and_sinks_through_the_kernel(kind, options, device):
    eager, ours = (model.to(device) for model in pair(kind, {**options, "num_hidden_layers": 1}))
    tokens = tokens_of(1, 7).to(device)
    assert least_cosine(hidden(ours, tokens), hidden(eager, tokens)) > 0.999


def test_a_wrong_window_would_be_noticed():
    """The weights are such that the tests above can fail."""
    eager, _ = pair("Mistral", MISTRAL)
    wider = type(eager)(transformers.MistralConfig(**{**MISTRAL, "sliding_window": 5})).eval()
    wider.load_state_dict(eager.state_dict())
    tokens = tokens_of(3, 17)
    assert least_cosine(hidden(wider, tokens), hidden(eager, tokens)) < 0.99


@pytest.mark.parametrize(
    "architecture, result, why",
    [
        ("vit", "runs", ""),
        ("modernbert", "runs", ""),
        ("nllb-moe", "runs", ""),
        ("pegasus_x", "runs", ""),
        ("qwen3_moe", "runs", ""),
        ("deepseek_v3", "runs", ""),
        (
            "bridgetower",
            "refused",
            "bridgetower_text_model (.*): fa3 got no mask for a causal layer",
        ),
        ("mamba", "does not call fa3", ""),
        ("t5", "refused", 't5 (T5Attention): fa3 takes no position_bias; use attn_impl.*"sdpa"'),
        ("gpt_oss", "runs", ""),
        ("gemma2", "runs", ""),
        ("granite_swa", "runs", ""),
        ("vaultgemma", "runs", ""),
        ("bloom", "refused", "BloomModel: fa3 cannot take the place of its attention"),
        ("falcon", "refused", "FalconModel: fa3 cannot take the place of its attention"),
        ("trocr", "refused", "TrOCRDecoder: fa3 cannot take the place of its attention"),
        ("led", "refused", "LEDModel: fa3 cannot take the place of its attention"),
        ("git", "refused", "GitModel: fa3 cannot take the place of its attention"),
        ("bigbird_pegasus", "refused", "bigbird_pegasus: fa3 cannot give a mask to a layer"),
        ("deepseek_v32", "refused", "deepseek_v32: fa3 cannot give a mask to a layer"),
    ],
)
def test_architectures(architecture, result, why):
    """Eager against fa3 with products in fp32, and the causality probe."""
    verdict = architectures.judge(architecture)
    assert verdict.result == result, verdict
    pattern = re.escape(why).replace(r"\.\*", ".*")
    assert re.match(pattern, verdict.note), verdict.note
    assert ("use attn_implementation=" in verdict.note) == (result == "refused")


def test_an_architecture_whose_mask_is_lost_is_wrong(monkeypatch):
    plain = integration._pattern

    def lost(*arguments):
        return dataclasses.replace(plain(*arguments), causal=False)

    monkeypatch.setattr(integration, "_pattern", lost)
    assert architectures.judge("llama").result == "wrong"
    assert architectures.judge("bert").result == "runs"


def test_a_mask_without_padding_is_no_mask():
    eager, ours = pair("Bert", BERT)
    tokens = tokens_of(2, 9)
    out = hidden(ours, tokens, attention_mask=torch.ones_like(tokens))
    assert least_cosine(out, hidden(eager, tokens)) > 0.999


@pytest.mark.parametrize("kind, options", PLAIN)
def test_torch_compile_without_a_graph_break(kind, options):
    """One graph for batches with and without padding."""
    _, ours = pair(kind, options)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    tokens = tokens_of(2, 9)
    mask = torch.ones_like(tokens)
    out = hidden(compiled, tokens, attention_mask=mask)
    assert (out - hidden(ours, tokens)).abs().max() == 0
    mask[0, 0] = mask[1, 5:] = 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        out = hidden(compiled, tokens, attention_mask=mask)
    expected = hidden(ours, tokens, attention_mask=mask)
    assert (out - expected)[mask.bool()].abs().max() == 0
    assert (out - hidden(ours, tokens))[mask.bool()].abs().max() > 0.01


def test_torch_compile_checks_for_packed_sequences():
    """Traced, transformers lays their mask over every call without a mask and a cache."""
    _, ours = pair("Mistral", {**MISTRAL, "num_hidden_layers": 1})
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    tokens = tokens_of(2, 9)
    positions = torch.arange(9).expand(2, 9)
    out, expected = (
        hidden(model, tokens, position_ids=positions, use_cache=False) for model in (compiled, ours)
    )
    assert (out - expected).abs().max() == 0
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    with pytest.raises(RuntimeError, match="fa3 finds no packed sequences.*='sdpa'$"):
        hidden(compiled, tokens, position_ids=packed, use_cache=False)


@pytest.mark.parametrize("strict", [True, False])
def test_torch_export(strict):
    _, ours = pair("Llama", {**LLAMA, "num_hidden_layers": 1})
    tokens = tokens_of(2, 9)
    mask = torch.ones_like(tokens)
    options = {"attention_mask": mask, "use_cache": False}
    program = torch.export.export(ours, (tokens,), options, strict=strict).module()
    out = program(tokens, **options).last_hidden_state
    assert (out.double() - hidden(ours, tokens)).abs().max() == 0
    mask[1, 7:] = mask[0, 0] = 0
    out = program(tokens, **options).last_hidden_state
    expected = hidden(ours, tokens, attention_mask=mask)
    assert (out.double() - expected)[mask.bool()].abs().max() == 0


def test_what_is_laid_over_packed_sequences_is_refused_by_name():
    """Packed sequences by themselves are not."""
    config = transformers.LlamaConfig(_attn_implementation="fa3")
    options = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), "cache": None}
    blocks = torch.tensor([[-1, 0, 0, -1, -1, -1, -1, -1, -1]])
    make = transformers.masking_utils.create_causal_mask
    embeddings = torch.zeros(1, 9, 64)
    pattern = make(config, embeddings, None, **options)
    assert pattern.packed.cu_seqlens_q.tolist() == [0, 4, 9]
    with pytest.raises(NotImplementedError, match="llama: fa3 .* mask of .*blockwise_overlay"):
        make(config, embeddings, None, block_sequence_ids=blocks, **options)


def test_chunked_attention_is_refused_only_where_it_is_chunked():
    options = {"q_length": 9, "kv_length": 9, "allow_is_causal_skip": True, "local_size": 8}
    config = transformers.Llama4TextConfig(attention_chunk_size=8)
    function = transformers.masking_utils.chunked_causal_mask_function(8, torch.zeros(1))
    with pytest.raises(NotImplementedError, match="llama4_text: fa3 has no chunked attention"):
        integration.mask(mask_function=function, config=config, **options)
    options |= {"q_length": 8, "kv_length": 8}
    pattern = integration.mask(mask_function=function, config=config, **options)
    assert pattern.causal and pattern.window == (-1, -1)


def test_a_ready_made_mask_is_refused(calls):
    _, ours = pair("Llama", LLAMA)
    bias = torch.zeros(1, 1, 9, 9)
    with pytest.raises(ValueError, match=r"llama .*takes no .* mask .*shape \(1, 1, 9, 9\)"):
        hidden(ours, tokens_of(1, 9), attention_mask=bias)
    assert calls == []


def test_a_mask_is_of_no_use_to_other_attention():
    pattern = integration.mask(4, 4, config=transformers.LlamaConfig())
    scores = torch.zeros(1, 1, 4, 4)
    for use in (
        lambda: scores + pattern,
        lambda: torch.cat([scores, pattern]),
        lambda: torch.nn.functional.scaled_dot_product_attention(*[scores] * 3, pattern),
        lambda: pattern[:, :, :, :4],
        lambda: pattern.dtype,
        lambda: pattern or scores,
        lambda: (1.0 - pattern) * -1e9,
        lambda: 0 < pattern,
        lambda: ~pattern,
        lambda: torch.tensor(pattern),
    ):
        with pytest.raises(NotImplementedError, match='llama: fa3 cannot give a mask.*"sdpa"'):
            use()
    assert not hasattr(pattern, "dim")
    assert pickle.loads(pickle.dumps(pattern)).facts == copy.deepcopy(pattern).facts


def test_no_mask_for_a_causal_layer_is_ambiguous():
    """Eager attention is full then, sdpa's is causal."""
    module = torch.nn.Module()
    module.is_causal = True
    q = torch.zeros(1, 2, 4, 16)
    with pytest.raises(NotImplementedError, match="Module: fa3 got no mask for a causal layer"):
        integration.attention(module, q, q, q, None)
    out, _ = integration.attention(module, q[:, :, :1], q, q, None)
    assert out.shape == (1, 1, 2, 16)


def test_the_mask_of_other_lengths_is_refused():
    pattern = integration.mask(4, 4, config=transformers.LlamaConfig())
    with pytest.raises(ValueError, match="llama: attention of 4 queries to 5 keys got a mask for"):
        pattern.check_lengths(4, 5, 1)


@pytest.mark.parametrize("value", [torch.zeros(1, dtype=torch.int32), False, 3])
def test_an_unknown_argument_is_refused_by_name(value):
    module = torch.nn.Module()
    q = torch.zeros(1, 2, 4, 16)
    with pytest.raises(NotImplementedError, match='Module: fa3 takes no block_indices; .*"eager"'):
        integration.attention(module, q, q, q, None, block_indices=value)
    out, _ = integration.attention(module, q, q, q, None, block_indices=None, position_ids=value)
    assert out.shape == (1, 4, 2, 16)


@pytest.mark.parametrize("d, dv", [(512, 16), (16, 20)])
def test_a_head_dim_without_a_kernel_names_the_module(d, dv):
    q, v = torch.zeros(1, 2, 4, d), torch.zeros(1, 2, 4, dv)
    with pytest.raises(NotImplementedError, match=r"Module: fa3 takes head dims .* got (512|20);"):
        integration.attention(torch.nn.Module(), q, q, v, None)


def test_dropout_is_refused(calls):
    _, ours = pair("Bert", {**BERT, "attention_probs_dropout_prob": 0.5})
    with pytest.raises(NotImplementedError, match=r"bert \(Bert.*dropout=0.5"):
        hidden(ours.train(), tokens_of(1, 9))
    assert calls == []


@pytest.mark.parametrize(
    "kind, options",
    [("Llama", LLAMA), ("Mistral", MISTRAL), ("Gemma2", GEMMA), ("GptOss", GPT_OSS)],
)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_agrees_with_eager(kind, options, cache):
    with architectures.in_fp32():
        eager, ours = pair(kind, options, head="ForCausalLM")
        tokens = tokens_of(2, 9)
        longer = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        if cache:
            longer["cache_implementation"] = cache
        mask = torch.ones_like(tokens)
        out = [model.generate(tokens, attention_mask=mask, **longer) for model in (eager, ours)]
    assert out[0].shape == (2, 13)
    assert out[0].tolist() == out[1].tolist()


def test_free_space_of_a_static_cache_is_cut_off():
    options = {"q_length": 3, "kv_length": 16}
    for offset in (0, 5):
        pattern = integration.mask(q_offset=offset, **options)
        assert pattern.visible == offset + 3 and pattern.causal and pattern.key_rows is None
    window = transformers.masking_utils.sliding_window_causal_mask_function(4)
    options |= {"mask_function": window, "local_size": 4, "allow_is_causal_skip": True}
    assert integration.mask(q_offset=0, **options).window == (-1, -1)
    assert integration.mask(q_offset=2, **options).window == (3, -1)


@pytest.mark.parametrize("q_length", [1, 3])
def test_the_filled_length_of_a_static_cache_stays_on_the_device(q_length):
    """Compiled once for all of them; the free space holds NaN."""
    q = torch.randn(2, 2, q_length, 16)
    kv = torch.randn(2, 2, 16, 16)
    module = torch.nn.Module()

    def attention(q, kv, filled):
        pattern = integration.mask(q_length, 16, q_offset=filled, batch_size=2)
        return integration.attention(module, q, kv, kv, pattern)[0]

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for filled in (0, 5, 13):
            end = filled + q_length
            used = kv.clone()
            used[:, :, end:] = torch.nan
            plain = integration.mask(q_length, end, q_offset=filled)
            expected, _ = integration.attention(module, q, *[kv[:, :, :end]] * 2, plain)
            for run in (attention, compiled):
                assert (run(q, used, torch.tensor(filled)) - expected).abs().max() == 0


def test_queries_ahead_of_the_keys_are_refused():
    with pytest.raises(NotImplementedError, match="aligns .* at positions 8 and 7;"):
        integration.mask(q_length=1, kv_length=8, q_offset=8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_keep_their_dtype(dtype, calls):
    _, ours = pair("Bert", BERT, dtype)
    out = ours(input_ids=tokens_of(1, 5)).last_hidden_state
    assert out.dtype == dtype
    assert {call[0] for call in calls} == {dtype}


@pytest.mark.parametrize(
    "size, dtype, v_size, v_dtype",
    [
        (1.0, torch.float32, 1e30, torch.float32),
        (1e6, torch.float32, 1.0, torch.float16),
        (1e6, torch.bfloat16, 1.0, torch.float16),
    ],
)
def test_values_beyond_fp16_keep_their_range(size, dtype, v_size, v_dtype):
    """fp16 ends at 65504."""
    q = torch.randn(1, 2, 4, 16)
    v = torch.full((1, 2, 4, 16), v_size, dtype=v_dtype)
    out, _ = integration.attention(torch.nn.Module(), (q * size).to(dtype), q.to(dtype), v, None)
    assert out.dtype == v_dtype
    assert torch.allclose(out, v.transpose(1, 2), rtol=2**-8)


def test_shapes_on_the_meta_device():
    _, ours = pair("Llama", LLAMA)
    out = ours.to("meta")(input_ids=torch.ones(2, 9, dtype=torch.int64, device="meta"))
    assert out.last_hidden_state.shape == (2, 9, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fp32_follows_autocast(dtype, calls):
    q = torch.randn(1, 2, 4, 16)
    with torch.autocast("cpu", torch.float16):
        out, _ = integration.attention(torch.nn.Module(), q, q, q.to(dtype), None)
    assert out.dtype == dtype
    assert [call[0] for call in calls] == [torch.float16]


def test_a_model_that_never_calls_fa3_warns_once():
    config = transformers.MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=50)
    model = transformers.MambaModel._from_config(config, attn_implementation="fa3").eval()
    with pytest.warns(UserWarning, match="MambaModel was given fa3's attention and did not call"):
        hidden(model, tokens_of(1, 4))
    _, ours = pair("Llama", LLAMA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hidden(model, tokens_of(1, 4))
        hidden(pickle.loads(pickle.dumps(copy.deepcopy(ours))), tokens_of(1, 4))


def test_other_models_are_left_alone():
    config = transformers.BloomConfig(hidden_size=64, n_layer=1, n_head=2, vocab_size=50)
    model = transformers.BloomModel._from_config(config, attn_implementation="eager").eval()
    assert hidden(model, tokens_of(1, 4)).isfinite().all()


@pytest.mark.parametrize(
    "kind, options, checkpointing",
    [
        ("Llama", LLAMA, False),
        ("Llama", LLAMA, True),
        ("Gemma2", GEMMA, False),
        ("GptOss", GPT_OSS, False),
    ],
)
def test_training(kind, options, checkpointing):
    """All gradients of a step are as near to those in fp32 as those of eager attention in bf16."""
    tokens = torch.randint(0, 50, (2, 24))
    gradients = []
    eager, ours = pair(kind, options, torch.bfloat16, "ForCausalLM")
    for model in (copy.deepcopy(eager).float(), eager, ours):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.enable_grad():
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append(torch.cat([x.grad.flatten().float() for x in model.parameters()]))
    exact, theirs, given = gradients
    error, limit = (given - exact).norm(), (theirs - exact).norm()
    assert error < 1.2 * limit
