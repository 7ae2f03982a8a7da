"""Padded batches and packed sequences inside Hugging Face models, against eager attention."""

import itertools

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="the integration needs transformers: pip install fa3[transformers]"
)

from transformers.models.bart.modeling_bart import BartAttention  # noqa: E402
from transformers.models.bert.modeling_bert import (  # noqa: E402
    BertCrossAttention,
    BertSelfAttention,
)
from transformers.models.llama.modeling_llama import LlamaAttention  # noqa: E402

from fa3.integrations import transformers as integration  # noqa: E402
from fa3.integrations import transformers_models, transformers_rows  # noqa: E402
from perf import architectures  # noqa: E402

from .test_transformers import (  # noqa: E402
    BERT,
    GEMMA,
    GPT_OSS,
    LLAMA,
    MISTRAL,
    hidden,
    least_cosine,
    pair,
    registered,  # noqa: F401 - a fixture
    tokens_of,
)

SPECIAL = {f"{name}_token_id": 1 for name in ("pad", "bos", "eos", "cls", "sep")}
GPT2 = {"vocab_size": 50, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, **SPECIAL}
MODERN_BERT = {**BERT, "local_attention": 8, **SPECIAL}
GEMMA3 = {**MISTRAL, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}
BART = {
    "vocab_size": 50,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    **SPECIAL,
}
# of three sequences in 17 places: where the tokens are
RIGHT = [(0, 17), (0, 9), (0, 1)]
LEFT = [(0, 17), (9, 17), (16, 17)]
BOTH = [(0, 10), (9, 17), (4, 6)]
EMPTY = [(0, 17), (3, 3), (2, 17)]


def mask_of(places):
    mask = torch.zeros(len(places), 17, dtype=torch.int64)
    for row, (start, stop) in zip(mask, places, strict=True):
        row[start:stop] = 1
    return mask


@pytest.fixture
def unread(monkeypatch):
    """As on a device that nobody waits for."""
    monkeypatch.setattr(transformers_rows, "is_readable", lambda x: False)


@pytest.fixture
def calls(monkeypatch):
    """The options of what fa3 was asked for, and whether it was ragged."""
    seen = []

    def watched(name, plain):
        def attention(*given, **options):
            seen.append((name, options))
            return plain(*given, **options)

        return attention

    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        monkeypatch.setattr(integration, name, watched(name, getattr(integration, name)))
    return seen


def agree(kind, options, mask):
    """Whether real tokens get what they get with eager attention, and all is finite."""
    eager, ours = pair(kind, options)
    tokens = tokens_of(*mask.shape)
    actual, expected = (hidden(model, tokens, attention_mask=mask) for model in (ours, eager))
    real = mask.bool()
    return actual.isfinite().all() and least_cosine(actual[real], expected[real]) > 0.999


@pytest.mark.parametrize(
    "kind, options, places",
    [
        ("Bert", BERT, LEFT),
        ("Bert", BERT, EMPTY),
        ("Llama", LLAMA, RIGHT),
        ("Llama", LLAMA, BOTH),
        ("Mistral", MISTRAL, LEFT),
        ("GPT2", GPT2, BOTH),
        ("ModernBert", MODERN_BERT, BOTH),
        ("Gemma3Text", GEMMA3, LEFT),
        ("Gemma2", GEMMA, BOTH),
        ("GptOss", GPT_OSS, RIGHT),
    ],
)
def test_a_padded_batch_agrees_with_eager_attention(kind, options, places):
    assert agree(kind, options, mask_of(places))


@pytest.mark.parametrize(
    "kind, options, places",
    [("Bert", BERT, RIGHT), ("Mistral", MISTRAL, BOTH), ("ModernBert", MODERN_BERT, LEFT)],
)
def test_without_a_look_at_the_data(kind, options, places, unread):
    assert agree(kind, options, mask_of(places))


@pytest.mark.parametrize(
    "kind, options, places", [("Mistral", MISTRAL, BOTH), ("Bert", BERT, RIGHT)]
)
def test_padding_through_the_kernel(kind, options, places, device):
    """Ragged calls, causal with a window and full, of gathered tensors and of the given ones."""
    eager, ours = (m.to(device) for m in pair(kind, {**options, "num_hidden_layers": 1}))
    mask = mask_of(places).to(device)
    tokens = tokens_of(*mask.shape).to(device)
    actual, expected = (hidden(model, tokens, attention_mask=mask) for model in (ours, eager))
    assert least_cosine(actual[mask.bool()], expected[mask.bool()]) > 0.999


def test_packed_sequences_through_the_kernel(device):
    eager, ours = (m.to(device) for m in pair("Llama", {**LLAMA, "num_hidden_layers": 1}))
    tokens, positions, cu_seqlens = (x.to(device) for x in packed_tokens())
    lengths = {"cu_seq_lens_q": cu_seqlens, "max_length_q": 7}
    lengths |= {"cu_seq_lens_k": cu_seqlens, "max_length_k": 7}
    expected = hidden(eager, tokens, position_ids=positions, use_cache=False)
    assert least_cosine(hidden(ours, tokens, position_ids=positions, **lengths), expected) > 0.999


@pytest.mark.parametrize("kind, options", [("Bert", BERT), ("Llama", LLAMA)])
def test_masked_tokens_between_others(kind, options):
    """Without a window the order of the others is all that counts."""
    mask = mask_of(BOTH)
    mask[1, 11:14] = mask[0, 3] = 0
    assert agree(kind, options, mask)


def test_masked_tokens_between_others_are_refused_under_a_window():
    mask = mask_of(BOTH)
    mask[1, 11:14] = 0
    with pytest.raises(NotImplementedError, match='mistral: fa3 .* between others; use .*"sdpa"'):
        agree("Mistral", MISTRAL, mask)
    assert agree("Mistral", {**MISTRAL, "sliding_window": 17}, mask)  # reaches everywhere


def test_masked_tokens_between_others_fail_an_assertion_where_nothing_is_read(unread):
    mask = mask_of(BOTH)
    mask[1, 11:14] = 0
    with pytest.raises(RuntimeError, match="mistral: fa3 .* between others; use .*'sdpa'$"):
        agree("Mistral", MISTRAL, mask)


@pytest.mark.parametrize("places", [LEFT, RIGHT])
@pytest.mark.parametrize("length", [17, 9])
def test_padded_keys_of_an_encoder(places, length, calls):
    """The decoder's queries all count, as many as there are keys or not."""
    eager, ours = pair("Bart", BART)
    tokens, decoded, mask = tokens_of(3, 17), tokens_of(3, length), mask_of(places)
    more = {"attention_mask": mask, "decoder_input_ids": decoded}
    assert least_cosine(hidden(ours, tokens, **more), hidden(eager, tokens, **more)) > 0.999
    assert [name for name, _ in calls].count("flash_attn_varlen_func") == 2


@pytest.mark.parametrize(
    "cls, expected",
    [
        (BertSelfAttention, True),
        (LlamaAttention, True),
        (BertCrossAttention, False),
        (BartAttention, False),
    ],
)
def test_whose_keys_a_layer_may_read(cls, expected):
    assert transformers_models.attends_to_itself(cls) is expected


def test_a_window_over_keys_that_may_be_of_others_is_refused():
    window = transformers.masking_utils.sliding_window_bidirectional_mask_function(4)
    options = {"mask_function": window, "local_size": 4, "allow_is_bidirectional_skip": True}
    pattern = integration.mask(17, 17, attention_mask=mask_of(LEFT), **options)
    q = torch.zeros(3, 2, 17, 16)
    with pytest.raises(NotImplementedError, match="Module: fa3 has no sliding windows over padded"):
        integration.attention(torch.nn.Module(), q, q, q, pattern)


@pytest.mark.parametrize(
    "places, seqused, is_moved",
    [
        ([(0, 17)] * 3, None, False),
        (RIGHT, [17, 9, 1], False),
        (LEFT, [17, 8, 1], True),
    ],
)
@pytest.mark.parametrize("kind, options", [("Bert", BERT), ("Llama", LLAMA)])
def test_what_padding_costs(kind, options, places, seqused, is_moved, calls):
    """Nothing without padding, no copies of a batch that is padded on the right."""
    mask = mask_of(places)
    pattern = integration.mask(17, 17, attention_mask=mask)
    assert agree(kind, options, mask)
    if seqused is None:
        assert pattern.key_rows is pattern.query_rows is None
        assert {name for name, _ in calls} == {"flash_attn_func"}
        return
    assert (pattern.key_rows.order is not None) is is_moved
    assert {name for name, _ in calls} == {"flash_attn_varlen_func"}
    for _, given in calls:
        assert given["seqused_q"].tolist() == given["seqused_k"].tolist() == seqused


def test_rows_of_padding_are_zeros(monkeypatch):
    pattern = integration.mask(17, 17, attention_mask=mask_of(BOTH))
    q, k, v = torch.randn(3, 3, 2, 17, 16).unbind()
    padding = ~mask_of(BOTH).bool()
    for x in (q, k, v):
        x.transpose(1, 2)[padding] = torch.nan
    out, _ = integration.attention(torch.nn.Module(), q, k, v, pattern)
    assert out[padding].abs().max() == 0
    assert out[~padding].isfinite().all()


def test_queries_behind_a_padded_cache():
    """The last queries of causal attention over keys that are padded on the left."""
    places = torch.tensor([[0, 17], [3, 17], [15, 17]])
    mask = mask_of(places.tolist())
    pattern = integration.mask(4, 17, q_offset=13, attention_mask=mask)
    q, k, v = torch.randn(3, 3, 2, 17, 16).unbind()
    out, _ = integration.attention(torch.nn.Module(), q[:, :, 13:], k, v, pattern)
    whole = integration.mask(17, 17, attention_mask=mask)
    expected, _ = integration.attention(torch.nn.Module(), q, k, v, whole)
    assert (out - expected[:, 13:]).abs().max() == 0


@pytest.mark.parametrize(
    "kind, options, cache",
    [
        ("Llama", LLAMA, None),
        ("Llama", LLAMA, "static"),
        ("Mistral", MISTRAL, None),
        ("Mistral", MISTRAL, "static"),
        ("GPT2", GPT2, None),
    ],
)
def test_generation_from_padded_prompts(kind, options, cache):
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    mask = mask_of(LEFT)
    mask[2, 16] = 0
    mask[2, 13:] = 1
    with architectures.in_fp32():
        models = pair(kind, options, head=head)
        longer = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        if cache:
            longer["cache_implementation"] = cache
        tokens = tokens_of(3, 17)
        out = [model.generate(tokens, attention_mask=mask, **longer) for model in models]
    assert out[0].shape == (3, 23)
    assert out[0].tolist() == out[1].tolist()


def test_chunks_start_behind_the_padding():
    """One token more in a static cache, where transformers never says that a mask is plain."""
    left = torch.tensor([start for start, _ in LEFT])
    function = transformers.masking_utils.chunked_causal_mask_function(32, left)
    config = transformers.Llama4TextConfig(attention_chunk_size=32)
    place = {"q_length": 1, "kv_length": 32, "q_offset": torch.tensor(16), "batch_size": 3}
    options = {"mask_function": function, "config": config, "local_size": 32, **place}
    pattern = integration.mask(attention_mask=mask_of(LEFT), **options)
    assert pattern.key_rows.lengths.tolist() == [17, 8, 1]
    with pytest.raises(RuntimeError, match="llama4_text: fa3 finds no packed sequences"):
        integration.mask(attention_mask=torch.ones(3, 17), **options)


def test_compiled_generation_from_padded_prompts():
    """One graph for all lengths of a static cache; `generate` makes the mask ahead of it."""
    options = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    options._compile_all_devices = True
    eager, ours = pair("Llama", {**LLAMA, "num_hidden_layers": 1}, head="ForCausalLM")
    longer = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    longer["cache_implementation"] = "static"
    tokens, mask = tokens_of(3, 17), mask_of(LEFT)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        out = ours.generate(tokens, attention_mask=mask, compile_config=options, **longer)
    assert out.tolist() == ours.generate(tokens, attention_mask=mask, **longer).tolist()
    assert out.shape == (3, 21)


def packed_tokens():
    """tokens (1, 17), position_ids (1, 17) and cu_seqlens of four sequences."""
    lengths = [3, 1, 7, 6]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ends = list(itertools.accumulate(lengths, initial=0))
    return tokens_of(1, 17), positions, torch.tensor(ends)


@pytest.mark.parametrize("kind, options", [("Llama", LLAMA), ("Mistral", MISTRAL)])
def test_packed_sequences_by_position_ids(kind, options, calls):
    eager, ours = pair(kind, options)
    tokens, positions, cu_seqlens = packed_tokens()
    more = {"position_ids": positions, "use_cache": False}
    expected = hidden(eager, tokens, **more)
    assert least_cosine(hidden(ours, tokens, **more), expected) > 0.999
    assert {name for name, _ in calls} == {"flash_attn_varlen_func"}
    others = torch.stack([positions[0].flip(0).flip(0), torch.arange(17)])
    tokens = torch.cat([tokens, tokens_of(1, 17)])
    more["position_ids"] = others
    assert least_cosine(hidden(ours, tokens, **more), hidden(eager, tokens, **more)) > 0.999


@pytest.mark.parametrize("longest", [7, torch.tensor(7)])
def test_packed_sequences_by_their_lengths(longest):
    """As DataCollatorWithFlattening(return_flash_attn_kwargs=True) gives them, traced or not."""
    eager, ours = pair("Mistral", MISTRAL)
    tokens, positions, cu_seqlens = packed_tokens()
    lengths = {"cu_seq_lens_q": cu_seqlens, "max_length_q": longest}
    lengths |= {"cu_seq_lens_k": cu_seqlens, "max_length_k": longest}
    expected = hidden(eager, tokens, position_ids=positions, use_cache=False)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for model in (ours, compiled):
        actual = hidden(model, tokens, position_ids=positions, **lengths)
        assert least_cosine(actual, expected) > 0.999


def test_lengths_of_packed_sequences_come_together_and_without_padding():
    q = torch.randn(1, 2, 17, 16)
    *_, cu_seqlens = packed_tokens()
    module = torch.nn.Module()
    with pytest.raises(ValueError, match="Module: max_length_q, max_length_k missing, expected"):
        integration.attention(
            module, q, q, q, None, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens
        )
    lengths = {"cu_seq_lens_q": cu_seqlens, "max_length_q": 7}
    lengths |= {"cu_seq_lens_k": cu_seqlens, "max_length_k": 7}
    padded = integration.mask(17, 17, attention_mask=mask_of(LEFT)[1:2])
    with pytest.raises(ValueError, match="Module: got cu_seq_lens_q and a padded attention_mask"):
        integration.attention(module, q, q, q, padded, **lengths)


def test_rows_of_no_packed_sequence_are_zeros():
    q = torch.randn(1, 2, 17, 16)
    cu_seqlens = torch.tensor([0, 3, 10])
    lengths = {"cu_seq_lens_q": cu_seqlens, "max_length_q": 7}
    lengths |= {"cu_seq_lens_k": cu_seqlens, "max_length_k": 7}
    out, _ = integration.attention(torch.nn.Module(), q, q, q, None, **lengths)
    assert out[:, 10:].abs().max() == 0
    alone, _ = integration.attention(torch.nn.Module(), *[q[:, :, 3:10]] * 3, None)
    assert (out[:, 3:10] - alone).abs().max() == 0


def test_the_padding_of_another_batch_is_refused():
    pattern = integration.mask(17, 17, attention_mask=mask_of(LEFT))
    q = torch.zeros(2, 2, 17, 16)
    with pytest.raises(ValueError, match="a batch of 2 got the padding or packing of a batch of 3"):
        integration.attention(torch.nn.Module(), q, q, q, pattern)


def test_an_attention_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 17\), expected .* 18"):
        integration.mask(18, 18, attention_mask=mask_of(LEFT))


class HiddenStates(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, mask):
        out = self.model(input_ids=tokens, attention_mask=mask, use_cache=False)
        return out.last_hidden_state


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated")
@pytest.mark.parametrize("kind, options", [("Bert", BERT), ("Llama", LLAMA)])
def test_a_traced_model_takes_other_padding(kind, options):
    """torch.jit.trace records where rows are, not which ones; windows need a check it cannot."""
    eager, ours = pair(kind, {**options, "num_hidden_layers": 1})
    tokens, mask = tokens_of(3, 17), mask_of(BOTH)
    traced = torch.jit.trace(HiddenStates(ours), (tokens, mask_of(RIGHT)), check_trace=False)
    actual, expected = traced(tokens, mask).double(), hidden(eager, tokens, attention_mask=mask)
    assert least_cosine(actual[mask.bool()], expected[mask.bool()]) > 0.999


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated")
def test_a_traced_window_is_refused_with_a_mask():
    _, ours = pair("Mistral", {**MISTRAL, "num_hidden_layers": 1})
    example = tokens_of(3, 17), mask_of(RIGHT)
    with pytest.raises(NotImplementedError, match="sliding windows in what torch.jit.trace recor"):
        torch.jit.trace(HiddenStates(ours), example, check_trace=False)


@pytest.mark.parametrize("architecture", ["bart", "gemma3_text", "jamba", "modernbert"])
def test_architectures_run_padded_batches(architecture):
    verdict = architectures.judge(architecture)
    assert (verdict.result, verdict.note, verdict.padded) == ("runs", "", True)


def test_an_architecture_whose_padding_is_lost_is_wrong(monkeypatch):
    def lost(q, k, v, packed, queries, keys, **options):
        return integration.flash_attn_func(q, k, v, **options)

    monkeypatch.setattr(integration, "_attend", lost)
    verdict = architectures.judge("llama")
    assert verdict.result == "wrong" and verdict.note.startswith("padded, differs from eager by")


def loss_of(model, tokens, mask, **options):
    """Of real tokens behind real ones: what a padded row says of the next token is anybody's."""
    counts = mask.bool()
    counts[:, 1:] &= mask[:, :-1].bool()
    labels = tokens.masked_fill(~counts, -100)
    return model(input_ids=tokens, attention_mask=mask, labels=labels, **options).loss


def training(kind, options, layers=2):
    """With eager attention and with fa3: in bf16, with gradient checkpointing."""
    models = pair(kind, {**options, "num_hidden_layers": layers}, torch.bfloat16, HEADS[kind])
    for model in models:
        model.train()
        model.gradient_checkpointing_enable()
        model.config.use_cache = False
    return models


HEADS = {"Llama": "ForCausalLM", "Mistral": "ForCausalLM", "Bert": "ForMaskedLM"}
BERT_WITHOUT_DROPOUT = {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def gradients_of(model, tokens, mask):
    with torch.enable_grad():
        loss_of(model, tokens, mask).backward()
    return torch.cat([x.grad.flatten().float() for x in model.parameters() if x.grad is not None])


@pytest.mark.parametrize(
    "kind, options, places",
    [
        ("Llama", LLAMA, LEFT),
        ("Mistral", MISTRAL, RIGHT),
        ("Bert", BERT_WITHOUT_DROPOUT, BOTH),
    ],
)
def test_a_padded_batch_trains(kind, options, places):
    """All gradients of a step are those of eager attention, as far as bf16 goes."""
    mask = mask_of(places)
    tokens = tokens_of(*mask.shape)
    wanted, given = (gradients_of(model, tokens, mask) for model in training(kind, options))
    assert given.isfinite().all()
    assert (given - wanted).norm() < 0.02 * wanted.norm()


def test_a_padded_batch_trains_through_the_kernel(device):
    mask = mask_of(BOTH).to(device)
    tokens = tokens_of(*mask.shape).to(device)
    models = (model.to(device) for model in training("Llama", LLAMA, layers=1))
    wanted, given = (gradients_of(model, tokens, mask) for model in models)
    assert (given - wanted).norm() < 0.02 * wanted.norm()


def test_packed_sequences_train():
    tokens, positions, cu_seqlens = packed_tokens()
    lengths = {"cu_seq_lens_q": cu_seqlens, "max_length_q": 7}
    lengths |= {"cu_seq_lens_k": cu_seqlens, "max_length_k": 7}
    gradients = []
    for model, options in zip(training("Llama", LLAMA), ({}, lengths), strict=True):
        with torch.enable_grad():
            given = {"input_ids": tokens, "position_ids": positions, "labels": tokens}
            model(**given, use_cache=False, **options).loss.backward()
        gradients.append(torch.cat([x.grad.flatten().float() for x in model.parameters()]))
    wanted, given = gradients
    assert (given - wanted).norm() < 0.02 * wanted.norm()


def test_ten_steps_of_a_padded_batch():
    """The losses are those of eager attention, and fall."""
    mask = mask_of(LEFT)
    tokens = tokens_of(*mask.shape)
    curves = []
    for model in training("Llama", LLAMA):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
        losses = []
        for _ in range(10):
            with torch.enable_grad():
                loss = loss_of(model, tokens, mask)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    torch.testing.assert_close(*curves, rtol=0.03, atol=0.0)
    assert curves[1][-1] < 0.5 * curves[1][0]
