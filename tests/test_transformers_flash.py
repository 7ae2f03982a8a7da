"""fa3 as transformers' "flash_attention_3": tiny random models, on the CPU."""

import collections
import copy
import functools
import warnings
from unittest import mock

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="the integration needs transformers: pip install fa3[transformers]"
)

from transformers.generation import configuration_utils  # noqa: E402

from perf import architectures, flash_attention_3  # noqa: E402

if not hasattr(configuration_utils, "ContinuousBatchingConfig"):
    pytest.skip("this transformers has no ContinuousBatchingConfig", allow_module_level=True)
LLAMA = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
GEMMA = {**LLAMA, "head_dim": 16, "sliding_window": 4, "attn_logit_softcapping": 0.5}
BATCHING = "transformers.generation.continuous_batching"
PADDING = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10])


@pytest.fixture(autouse=True)
def calls(plain_torch):
    """How often transformers called which of fa3's functions."""
    counts = collections.Counter()

    def counting(name, function):
        @functools.wraps(function)
        def call(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return call

    functions = {n: counting(n, f) for n, f in flash_attention_3.FUNCTIONS.items()}
    with flash_attention_3.found(functions):
        yield counts


def _pair(kind, options, dtype=torch.bfloat16, names=("eager", flash_attention_3.NAME)):
    """The same weights twice."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    cls = getattr(transformers, f"{kind}ForCausalLM")
    eager, ours = (
        cls._from_config(copy.deepcopy(config), attn_implementation=name, dtype=dtype).eval()
        for name in names
    )
    architectures.make_attention_matter(eager)
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def _tokens():
    return torch.randint(3, 50, PADDING.shape, generator=torch.Generator().manual_seed(1))


def _assert_close(x, y):
    assert torch.nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).min() > 0.99


@pytest.mark.parametrize(("kind", "options"), [("Llama", LLAMA), ("Gemma2", GEMMA)])
def test_training(kind, options, calls):
    """Padded and without padding; softcap and windows."""
    for mask in (None, PADDING):
        found = []
        for model in _pair(kind, options):
            is_real = (torch.ones_like(PADDING) if mask is None else mask).bool()
            logits = model(_tokens(), attention_mask=mask).logits
            logits[is_real].float().logsumexp(-1).sum().backward()
            gradients = [x.grad.flatten() for x in model.parameters()]
            found.append((logits[is_real], torch.cat(gradients)[None]))
        for ours, eager in zip(*found, strict=True):
            _assert_close(ours, eager)
    assert calls == {"flash_attn_func": 2, "flash_attn_varlen_func": 2}


def test_packed_sequences(calls):
    """By positions that start anew."""
    eager, ours = _pair("Llama", LLAMA)
    tokens = _tokens().view(1, -1)
    positions = torch.cat([torch.arange(7), torch.arange(13)])[None]
    with torch.no_grad():
        found = ours(tokens, position_ids=positions, use_cache=False).logits
        parts = [eager(x).logits for x in tokens.split([7, 13], 1)]
    _assert_close(found, torch.cat(parts, 1))
    assert calls == {"flash_attn_varlen_func": 2}


def test_generate():
    """The same tokens, with products in fp32."""
    with architectures.flash_in_fp32(collections.Counter()):
        eager, ours = _pair("Llama", LLAMA, torch.float32)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        found = [
            model.generate(_tokens(), attention_mask=PADDING, **options) for model in (eager, ours)
        ]
    assert torch.equal(*found)


def _generated(model, *, decode=False, **more) -> list[list[int]]:
    """By continuous batching, two prompts of different lengths."""
    prompts = [row[mask.bool()].tolist() for row, mask in zip(_tokens(), PADDING, strict=True)]
    options = transformers.GenerationConfig(
        max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    config = configuration_utils.ContinuousBatchingConfig(
        num_blocks=4, max_batch_tokens=32, max_blocks_per_request=2 * decode, **more
    )
    asks = "initialization.ensure_decode_fast_path_is_available"  # for a GPU
    with mock.patch(f"{BATCHING}.{asks}", lambda *given, **more: None):
        results = model.generate_batch(
            prompts,
            generation_config=options,
            continuous_batching_config=config,
            progress_bar=False,
        )
    return [x.generated_tokens for x in results.values()]


@pytest.mark.parametrize("decode", [False, True])
def test_continuous_batching(decode, calls):
    """Packed sequences, and with `decode` single tokens from pages, which are appended to them."""
    eager, ours = _pair("Llama", LLAMA)
    assert _generated(ours, decode=decode) == _generated(eager, auto_switch_to_flash=False)
    assert calls["flash_attn_varlen_func"] > 0
    assert (calls["flash_attn_with_kvcache"] > 0) == decode


def test_continuous_batching_by_our_own_name(calls):
    """transformers takes no other names than its own, and changes to them where it may."""
    import fa3.integrations.transformers as integration

    integration.register()
    eager, ours = _pair("Llama", LLAMA, names=("eager", "fa3"))
    with pytest.raises(ValueError, match="fa3 is not supported for continuous batching"):
        _generated(ours, auto_switch_to_flash=False)
    with (
        mock.patch(f"{BATCHING}.continuous_api.is_flash_attn_3_available", lambda **options: True),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("error", "LlamaForCausalLM was given fa3's attention")
        found = _generated(ours)
    assert found == _generated(eager, auto_switch_to_flash=False)
    assert calls["flash_attn_varlen_func"] > 0
    assert ours.config._attn_implementation == "fa3"


def test_what_it_does_not_say():
    """transformers asks for no dropout that fa3 would have to refuse, and names no model."""
    eager, ours = _pair("Llama", {**LLAMA, "attention_dropout": 0.5})
    ours.train()
    with torch.no_grad():  # transformers warns, and leaves dropout out
        _assert_close(ours(_tokens()).logits, eager(_tokens()).logits)
    big = {**LLAMA, "head_dim": 264}
    _, ours = _pair("Llama", big)
    with pytest.raises(ValueError, match="q has head dim 264, expected a multiple of 8"):
        ours(_tokens())


@pytest.mark.parametrize(
    ("architecture", "result", "note"),
    [
        ("llama", "runs", ""),
        ("falcon", "runs", ""),
        ("bloom", "refused", "does not support Flash Attention 3"),
        ("gpt_oss", "refused", "`kernels`"),
    ],
)
def test_architectures(architecture, result, note):
    verdict = architectures.judge(architecture)
    assert verdict.flash == result, verdict
    assert note in verdict.flash_note, verdict
