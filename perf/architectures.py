"""Rewrite the table of docs/transformers.md: every architecture of transformers, eager against fa3.

By fa3's own name, and by transformers' "flash_attention_3", where fa3 takes flash-attn's place.

    python -m perf.architectures             all of them, some minutes on one core
    python -m perf.architectures llama bert  only these; prints, and leaves the document alone

Each model is built of a tiny configuration with random weights, and runs with
attn_implementation="eager", "fa3" and "flash_attention_3", on the CPU and with fa3's products in
fp32, so that what is left is a difference of meaning and none of rounding. Then the last token
changes: where eager's earlier positions stay as they were, fa3's must. An architecture whose tiny
model cannot be built, or does not run with eager attention, says nothing about fa3 and is only
counted.

A model of text runs a padded batch, too: fa3 must agree with eager at all tokens that are no
padding. That is compared where eager's own results there do not depend on what the padding holds.
"""

import argparse
import collections
import contextlib
import copy
import datetime
import functools
import inspect
import itertools
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple
from unittest import mock

import torch

import fa3

from . import flash_attention_3
from .document import insert, table
from .progress import track
from .results import ROOT
from .sweep import commit

DOCUMENT = ROOT / "docs" / "transformers.md"
BEGIN, END = "<!-- begin: python -m perf.architectures -->", "<!-- end -->"
RESULTS = ("wrong", "fails", "runs", "refused", "does not call fa3", "not built")
BAD = ("wrong", "fails")
COLUMNS = ("fa3", "flash_attention_3", "how many", "why", "model types")
NO_SUPPORT = "does not support Flash Attention"  # says transformers
BATCH, TOKENS, CHANGED = 2, 12, 7  # tokens below CHANGED are never special
MOST_PARAMETERS = 30_000_000
PLACES = ((0, 8), (5, 12))  # of the tokens of a padded batch
# of the largest value; two fp32 formulas of one value differ by 1e-5
TOLERANCE, STILL = 1e-3, 1e-6
SECONDS = 60  # for one architecture

# What the integers of a configuration become, by name. The window is shorter than the input, so
# that it shows.
TINY = {
    "hidden_size d_model n_embd dim embed_dim hidden_dim embedding_size model_dim emb_dim": 64,
    "text_embed_dim projection_dim encoder_hidden_size decoder_hidden_size": 64,
    "num_attention_heads n_head n_heads num_heads attention_heads": 4,
    "encoder_attention_heads decoder_attention_heads num_encoder_attention_heads": 4,
    "encoder_num_attention_heads decoder_num_attention_heads num_decoder_attention_heads": 4,
    "num_key_value_heads num_kv_heads encoder_num_key_value_heads n_kv_heads": 2,
    "decoder_num_key_value_heads num_global_key_value_heads swa_num_key_value_heads": 2,
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth": 2,
    "num_encoder_layers num_decoder_layers encoder_num_hidden_layers num_blocks": 2,
    "decoder_num_hidden_layers encoder_n_layers": 2,
    "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner mlp_dim": 128,
    "ffn_hidden_size feed_forward_size moe_intermediate_size dense_intermediate_size": 128,
    "shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size": 128,
    "encoder_intermediate_size decoder_intermediate_size encoder_ffn_hidden_size": 128,
    "vocab_size vocab_size_per_layer_input entity_vocab_size": 99,
    "max_position_embeddings n_positions max_source_positions max_target_positions": 64,
    "head_dim attention_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim d_kv d_head": 16,
    "global_head_dim swa_head_dim attention_hidden_size_per_head": 16,
    "q_lora_rank kv_lora_rank": 32,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok moe_topk moe_k top_k_experts num_selected_experts": 2,
    "n_group topk_group n_shared_experts first_k_dense_replace": 1,
    "rotary_dim sliding_window attention_window local_attention": 4,
    "image_size": 32,
    "patch_size": 8,
}
SIZES = {name: size for names, size in TINY.items() for name in names.split()}
NEEDED = ("head_dim", "num_experts_per_tok", "vocab_size")  # where the default is None
KEY_HEADS = [name for name in SIZES if "kv_heads" in name or "key_value_heads" in name]
# tried in this order, until the model runs
VARIANTS = (
    SIZES,
    {**SIZES, **dict.fromkeys(KEY_HEADS, 4)},  # as many key heads as query heads
    {**SIZES, **dict.fromkeys(KEY_HEADS, 4), "num_hidden_layers": 8},  # few are of attention
    {**SIZES, "hidden_size": 256, "num_attention_heads": 2, "num_heads": 2, "head_dim": 128},
)


class Verdict(NamedTuple):
    architecture: str  # model_type
    model: str  # its class
    result: str  # one of RESULTS
    note: str = ""
    padded: bool = False  # a padded batch was compared, too
    flash: str = ""  # the result by transformers' flash_attention_3, and a note on it
    flash_note: str = ""


class Way(NamedTuple):
    """How a model gets to fa3."""

    name: str  # attn_implementation
    in_fp32: Callable  # a context: fa3's products in fp32, with a counter of its calls
    is_refusal: Callable  # of an error


def architectures() -> list[str]:
    """The model types of transformers that have a model class."""
    from transformers.models.auto import modeling_auto

    return sorted(modeling_auto.MODEL_MAPPING_NAMES)


def judge(architecture: str) -> Verdict:
    """Eager against fa3."""
    with flash_attention_3.found():  # models look for it when they are imported
        return _judge(architecture)


def _judge(architecture: str) -> Verdict:
    name, reason = "-", ""
    for sizes in VARIANTS:
        torch.manual_seed(0)
        try:
            with _quiet():
                config = tiny(architecture, sizes)
                cls = _class_of(config)
                name = cls.__name__
                eager = _built(cls, config, "eager")
                probes, expected = _runnable(eager)
        except Exception as error:
            reason = reason or _line(error)
            continue
        found = [_judge_way(way, cls, config, eager, probes, expected) for way in (OWN, FLASH)]
        (result, note, padded), (flash, flash_note, _) = found
        if flash == "wrong":  # what transformers asks for is its own affair
            flash = "differs"
        return Verdict(architecture, name, result, note, padded, flash, flash_note)
    return Verdict(architecture, name, "not built", reason, flash="not built")


def _judge_way(way: Way, cls, config, eager, probes, expected) -> tuple[str, str, bool]:  # noqa: PLR0913
    """The result, a note, and whether a padded batch was compared."""
    result, note = _compared(way, cls, config, eager, probes, expected)
    if result != "runs":
        return result, note, False
    return _padded(way, cls, config, eager, probes[0])


def _runnable(eager) -> tuple[list, list]:
    """Inputs that the model takes, as they are and with the last token changed; the outputs."""
    failure = None
    for inputs in _inputs(eager):
        try:
            probes = [inputs, _changed(inputs)]
            expected = [_run(eager, x) for x in probes]
            if not expected[0].isfinite().all():
                raise ValueError("not finite")
            return probes, expected
        except Exception as error:
            failure = failure or error
    raise failure


def _compared(way: Way, cls, config, eager, probes, expected) -> tuple[str, str]:  # noqa: PLR0913
    calls = collections.Counter()
    try:
        with _quiet(), way.in_fp32(calls):
            ours = _built(cls, config, way.name)
            ours.load_state_dict(eager.state_dict())
            actual = [_run(ours, x) for x in probes]
    except Exception as error:
        return ("refused" if way.is_refusal(error) else "fails"), _line(error)
    scale = expected[0].abs().max().item()
    difference = (actual[0] - expected[0]).abs().max().item() / scale
    moved = [_moved(pair) / scale for pair in (expected, actual)]
    if not difference <= TOLERANCE:
        return "wrong", f"differs from eager by {difference:.1e} of the largest value"
    if moved[0] < STILL and not moved[1] < TOLERANCE:
        return "wrong", f"earlier positions move by {moved[1]:.1e} when the last token changes"
    if not calls:
        return "does not call fa3", ""
    return "runs", ""


def _padded(way: Way, cls, config, eager, inputs) -> tuple[str, str, bool]:
    """The same of a padded batch, for a model that runs without."""
    batches, is_real = _padded_batches(eager, inputs)
    try:
        with _quiet():
            expected = [_run(eager, x)[is_real] for x in batches]
        scale = expected[0].abs().max().item()
        is_defined = (expected[0] - expected[1]).abs().max().item() / scale < STILL
    except Exception:  # it takes no mask, or its output has other positions
        is_defined = False
    if not is_defined:
        return "runs", "", False
    try:
        with _quiet(), way.in_fp32(collections.Counter()):
            ours = _built(cls, config, way.name)
            ours.load_state_dict(eager.state_dict())
            actual = _run(ours, batches[0])[is_real]
    except Exception as error:
        refused = way.is_refusal(error)
        return ("runs" if refused else "fails"), f"padded: {_line(error)}", False
    difference = (actual - expected[0]).abs().max().item() / scale
    if not difference <= TOLERANCE:
        return "wrong", f"padded, differs from eager by {difference:.1e} of the largest", False
    return "runs", "", True


def _padded_batches(model, inputs) -> tuple[list[dict], torch.Tensor]:
    """Two that differ in what the padding holds, and which positions (b, s) of the output count."""
    is_real = torch.zeros((BATCH, TOKENS), dtype=torch.bool)
    for row, (start, stop) in zip(is_real, PLACES, strict=True):
        row[start:stop] = True
    if not isinstance(inputs.get("input_ids"), torch.Tensor):
        return [], is_real
    tokens = inputs["input_ids"]
    others = tokens.where(is_real, tokens.roll(1, 1))
    batches = [
        {**inputs, "input_ids": x, "attention_mask": is_real.long()} for x in (tokens, others)
    ]
    return batches, torch.ones_like(is_real) if "decoder_input_ids" in inputs else is_real


def _moved(pair) -> float:
    """How far the positions ahead of the last one are apart."""
    a, b = (x[:, :-1] if x.dim() > 2 else x for x in pair)
    return (a - b).abs().max().item() if a.numel() else 0.0


@contextlib.contextmanager
def in_fp32(calls=None):
    """fa3's attention by the formula in fp32, after the checks of the real one; counts calls."""
    calls = collections.Counter() if calls is None else calls
    import fa3.integrations.transformers as integration

    integration.register()
    plain = integration.flash_attn_func, integration.flash_attn_varlen_func
    attention, ragged = _functions_in_fp32(*plain, calls)
    with (
        mock.patch.object(integration, "flash_attn_func", attention),
        mock.patch.object(integration, "flash_attn_varlen_func", ragged),
        mock.patch.object(integration, "_computed_in", lambda q, k, v: v.dtype),
    ):
        yield


@contextlib.contextmanager
def flash_in_fp32(calls):
    """The same of what transformers calls by the name of flash_attention_3."""
    plain = fa3.flash_attn_func, fa3.flash_attn_varlen_func
    names = [function.__name__ for function in plain]
    functions = _functions_in_fp32(*plain, calls)
    from transformers.integrations import flash_attention

    with (
        flash_attention_3.found(dict(zip(names, functions, strict=True))),
        # which dtype to round fp32 to: models without a Linear have no answer
        mock.patch.object(flash_attention, "get_target_dtype", lambda query, module: None),
    ):
        yield


def _is_refused_here(error) -> bool:
    return isinstance(error, NotImplementedError | ValueError) and " fa3 " in str(error)


def _is_refused_there(error) -> bool:
    """By transformers, which may want a kernel of the model's own, or by fa3's functions."""
    wants_kernels = isinstance(error, ImportError) and "`kernels`" in str(error)
    return wants_kernels or isinstance(error, NotImplementedError | ValueError | TypeError)


OWN = Way("fa3", in_fp32, _is_refused_here)
FLASH = Way(flash_attention_3.NAME, flash_in_fp32, _is_refused_there)


def _functions_in_fp32(plain, plain_ragged, calls):
    """Stand-ins for flash_attn_func and flash_attn_varlen_func."""
    from .check import visible_keys

    @functools.wraps(plain)
    def attention(  # noqa: PLR0913
        q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        learnable_sink=None, deterministic=False,
    ):  # fmt: skip
        calls["attention"] += 1
        rounded = (x.bfloat16() for x in (q, k, v))
        options = {"softcap": softcap, "learnable_sink": learnable_sink}
        plain(*rounded, softmax_scale, causal, window_size=window_size, **options)
        left, right = window_size
        group = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        seen = visible_keys(q.shape[1], k.shape[1], left, 0 if causal else right)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT * (q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        lse = scores.logsumexp(-1, keepdim=True)
        if learnable_sink is not None:
            lse = torch.logaddexp(lse, learnable_sink[:, None, None])
        return ((scores - lse).exp() @ v).transpose(1, 2).contiguous()

    @functools.wraps(plain_ragged)
    def ragged(  # noqa: PLR0913
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
        seqused_k=None, out=None, **options,
    ):  # fmt: skip
        """The same, of one sequence after another; rows of nobody are NaN."""
        used = {"seqused_q": seqused_q, "seqused_k": seqused_k}
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        plain_ragged(*(x.bfloat16() for x in (q, k, v)), *lengths, **used, **options)
        if out is None:
            out = q.new_full((*q.shape[:-1], v.shape[-1]), torch.nan)
        rows = zip(
            _rows_of_sequences(q, cu_seqlens_q, seqused_q),
            _rows_of_sequences(k, cu_seqlens_k, seqused_k),
            strict=True,
        )
        for queries, keys in rows:
            if out[queries].numel():
                one = (x[rows][None] for x, rows in ((q, queries), (k, keys), (v, keys)))
                out[queries] = attention(*one, **options)[0] if k[keys].numel() else 0.0
        return out

    return attention, ragged


def _rows_of_sequences(x, cu_seqlens, seqused) -> list[tuple]:
    """The index of each sequence's rows in x."""
    if cu_seqlens is not None:
        return [(slice(a, b),) for a, b in itertools.pairwise(cu_seqlens.tolist())]
    used = [x.shape[1]] * len(x) if seqused is None else seqused.tolist()
    return [(i, slice(0, n)) for i, n in enumerate(used)]


def tiny(architecture: str, sizes: dict = SIZES):
    """Its configuration, shrunk to these sizes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[architecture], sizes)


def _shrunk(cls, sizes):
    default = cls()
    values = {}
    for name, value in default.to_dict().items():
        if type(value) is int and name in sizes and sizes[name] < value:
            values[name] = sizes[name]
        elif _is_square(value) and name in sizes and sizes[name] < value[0]:
            values[name] = type(value)(sizes[name] for _ in value)
        elif value is None and name in NEEDED:
            values[name] = sizes[name]
    for name in cls.sub_configs:
        given = getattr(default, name, None)
        if given is not None:
            values[name] = _shrunk(type(given), sizes)
    values |= _widths_by_stage(default, values)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if getattr(default, name, None) is not None:
            values[name] = 1
    return cls(**values)


def _widths_by_stage(default, values: dict) -> dict:
    """Of Hiera: the first stage's is the hidden size; who has it for a backbone lists them, too."""
    widths = getattr(default, "embed_dim_per_stage", None)
    if widths and widths[0] == default.hidden_size and "hidden_size" in values:
        scaled = [x * values["hidden_size"] // widths[0] for x in widths]
        return {"embed_dim_per_stage": scaled}
    of_backbone = getattr(values.get("backbone_config"), "embed_dim_per_stage", None)
    if of_backbone and hasattr(default, "backbone_channel_list"):
        return {"backbone_channel_list": of_backbone[::-1]}
    return {}


def _is_square(value) -> bool:
    """Of an image or a patch: one size, given for each side."""
    is_list = isinstance(value, list | tuple) and len(value) == 2
    return is_list and type(value[0]) is int and value[0] == value[1]


def _class_of(config):
    from transformers.models.auto import modeling_auto

    for mapping in (
        modeling_auto.MODEL_MAPPING,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    ):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError("no model class")


def _built(cls, config, implementation):
    config = copy.deepcopy(config)
    with torch.device("meta"):
        size = sum(
            p.numel()
            for p in cls._from_config(
                copy.deepcopy(config), attn_implementation=implementation
            ).parameters()
        )
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters are left")
    model = cls._from_config(config, attn_implementation=implementation, dtype=torch.float32)
    make_attention_matter(model)
    return model.eval()


def make_attention_matter(model) -> None:
    """Weights of unit gain: a model as initialised for training hardly attends at all."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            fan_in = parameter[0].numel()
            torch.nn.init.normal_(parameter, std=fan_in**-0.5)


def _inputs(model) -> list[dict]:
    """What the model's forward may take, by name; the first that it takes is right."""
    names = inspect.signature(model.forward).parameters
    config, main = model.config, model.main_input_name
    tokens = {
        name: torch.randint(CHANGED + 1, 90, (BATCH, TOKENS))
        for name in ("input_ids", "decoder_input_ids")
        if name in names
    }
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    image = torch.randn(BATCH, getattr(vision, "num_channels", 3) or 3, height, width)
    pixels = {"pixel_values": image}
    clip = image[:, None].expand(-1, getattr(config, "num_frames", 2), -1, -1, -1)
    sound = {"input_values": torch.randn(BATCH, 4000)}
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", 80)
    frames = torch.randn(BATCH, bins, 2 * getattr(config, "max_source_positions", 64))
    features = {"input_features": frames}, {"input_features": frames.mT[:, :100]}
    found = [tokens] if tokens and main == "input_ids" else []
    for extra in (pixels, {"pixel_values": clip}, {"pixel_values_videos": clip}, sound, *features):
        if all(name in names for name in extra):
            found += [{**extra, **tokens}]
    return found or [tokens]


def _changed(inputs) -> dict:
    """The same, but for the last token that the decoder reads."""
    name = next((n for n in ("decoder_input_ids", "input_ids") if n in inputs), None)
    if name is None:
        return inputs
    tokens = inputs[name].clone()
    tokens[:, -1] = CHANGED
    return {**inputs, name: tokens}


@torch.no_grad()
def _run(model, inputs) -> torch.Tensor:
    """The first output that is a tensor of floats, (b, s, ...)"""
    torch.manual_seed(1)
    output = model(**inputs)
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    values = values if isinstance(values, (tuple, list)) else [values]
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.float()
    raise ValueError("no tensor of floats in its output")


@contextlib.contextmanager
def _quiet():
    from transformers.utils import logging

    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(error) -> str:
    text = " ".join(str(error).split())
    return text if " fa3 " in text else f"{type(error).__name__}: {text[:120]}"


def verdicts(names: list[str]):
    """A verdict per architecture, from a process of its own that outlives no crash."""
    context = multiprocessing.get_context("spawn")
    worker = None
    for name in names:
        if worker is None:
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs,), daemon=True)
            worker.start()
            theirs.close()  # else nobody would notice that the process died
        ours.send(name)
        try:
            if not ours.poll(SECONDS):
                raise TimeoutError(f"more than {SECONDS} seconds")
            yield ours.recv()
        except (EOFError, OSError, TimeoutError) as error:
            worker.kill()
            worker = None
            note = _line(error) or "its process died"
            yield Verdict(name, "-", "not built", note, flash="not built")
    if worker is not None:
        worker.kill()


def _work(pipe) -> None:
    os.environ["FA3_CPU"] = "reference"
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    while True:
        pipe.send(judge(pipe.recv()))


def markdown(found: list[Verdict], made: str) -> str:
    """The generated part of the document: a row per pair of results and reasons."""
    groups = collections.defaultdict(list)
    for verdict in found:
        reasons = _reason(verdict), _flash_reason(verdict)
        key = tuple(re.sub(r"[0-9]+", "n", reason) for reason in reasons)
        groups[verdict.result, verdict.flash, key].append((verdict, reasons))
    order = sorted(groups.items(), key=lambda x: (RESULTS.index(x[0][0]), -len(x[1])))
    rows = []
    for (result, flash, _), members in order:
        reason, flash_reason = members[0][1]
        why = "; ".join(filter(None, (reason, flash_reason))) or "-"
        names = ", ".join(verdict.architecture for verdict, _ in members)
        rows.append((result, flash, str(len(members)), why, names))
    return "\n".join([BEGIN, "", made, "", table(COLUMNS, rows), "", END])


def _reason(verdict: Verdict) -> str:
    reason = verdict.note.partition(" fa3 ")[2] if verdict.result not in BAD else ""
    return f"of padded batches: {reason}" if verdict.result == "runs" and reason else reason


def _flash_reason(verdict: Verdict) -> str:
    """What flash_attention_3 says, without the name of the model's class."""
    note = verdict.flash_note
    if NO_SUPPORT in note:
        note = f"transformers: the model {NO_SUPPORT} 3"
    return f"flash_attention_3: {note}" if note else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m perf.architectures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("architectures", nargs="*", help="model types; all by default")
    options = parser.parse_args(argv)
    names = options.architectures or architectures()
    found = list(verdicts(track(names, "architecture")))
    for verdict in found:
        if options.architectures or verdict.result in BAD:
            print(": ".join(str(x) for x in verdict if x not in ("", False)))
    counts = collections.Counter(verdict.result for verdict in found)
    print(", ".join(f"{counts[result]} {result}" for result in RESULTS if counts[result]))
    if not options.architectures:
        made = f"{datetime.date.today()}, commit {commit()}: transformers {version('transformers')}"
        made += f", torch {torch.__version__}, {len(found)} model types"
        there = collections.Counter(verdict.flash for verdict in found)
        made += f"; by flash_attention_3 {there['runs']} run"
        made += f"; padded batches of {sum(verdict.padded for verdict in found)} compared."
        text = markdown(found, made)
        DOCUMENT.write_text(insert(DOCUMENT.read_text(), text))
        print(f"written: {DOCUMENT.relative_to(ROOT)}")
    return 1 if any(counts[result] for result in BAD) else 0


if __name__ == "__main__":
    sys.exit(main())
