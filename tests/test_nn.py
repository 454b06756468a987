"""adasplash2.nn: against torch.nn.MultiheadAttention at alpha = 1, and against dense entmax at the others."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import adasplash2
from adasplash2.nn import AlphaSchedule, EntmaxAttention, convert

EMBED, HEADS, BATCH = 12, 4, 3
CAUSAL = nn.Transformer.generate_square_subsequent_mask


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def inputs(seqlen_q=5, seqlen_k=7, kdim=EMBED, vdim=EMBED, batch=BATCH, dtype=torch.float64):
    """query, key and value, batch first."""
    shapes = (batch, seqlen_q, EMBED), (batch, seqlen_k, kdim), (batch, seqlen_k, vdim)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def pair(**options):
    """torch's module and ours at alpha = 1, with random biases, too."""
    theirs = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours = EntmaxAttention(EMBED, HEADS, dtype=torch.float64, alpha=1.0, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def scattered_padding(seqlen, batch=BATCH):
    """(batch, seqlen): none, some in between and at both ends, all but one."""
    mask = torch.zeros(batch, seqlen, dtype=torch.bool)
    mask[1, [0, 2, -1]] = True
    mask[2, :-1] = True
    return mask


def gradients(module, out, tensors, dout):
    return torch.autograd.grad(out, [*tensors, *module.parameters()], dout)


def dense(module, tensors, visible, rotary=None):
    """What the module should give for batch-first inputs: one dense matrix of weights, entmax by the reference."""
    kv_dim = module.num_kv_heads * module.head_dim
    sizes = [module.embed_dim, kv_dim, kv_dim]
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.split(sizes)
    biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.split(sizes)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for x, w, b in zip(tensors, weights, biases, strict=True)
    )
    if rotary is not None:
        q, k = rotary(q, k)
    group = module.num_heads // module.num_kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    blind = ~visible.any(-1, keepdim=True)
    scores = (q @ k.mT / module.head_dim**0.5).masked_fill(~(visible | blind), -torch.inf)
    alpha = module.alpha
    if isinstance(alpha, torch.Tensor):
        alpha = alpha[:, None, None]
    p = adasplash2.entmax(scores, alpha, backend="reference").masked_fill(blind, 0)
    return module.out_proj((p @ v).transpose(1, 2).flatten(2)), p


class TestAgainstTorch:
    @pytest.mark.parametrize(
        "options",
        [{}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 5, "vdim": 6}, {"kdim": 5}],
        ids=str,
    )
    def test_the_same_seed_gives_the_same_weights_under_the_same_names(self, options):
        torch.manual_seed(1)
        theirs = nn.MultiheadAttention(EMBED, HEADS, **options).state_dict()
        torch.manual_seed(1)
        ours = EntmaxAttention(EMBED, HEADS, **options).state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"batch_first": True},
            {"bias": False, "batch_first": True},
            {"kdim": 5, "vdim": 6},
            {"add_bias_kv": True, "batch_first": True},
            {"add_zero_attn": True},
            {"add_bias_kv": True, "add_zero_attn": True, "kdim": 5},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("padded", [False, True])
    def test_alpha_1_is_softmax_attention(self, options, padded):
        theirs, ours = pair(**options)
        tensors = inputs(kdim=options.get("kdim", EMBED), vdim=options.get("vdim", EMBED))
        arguments = tensors if options.get("batch_first") else [x.transpose(0, 1) for x in tensors]
        mask = scattered_padding(7) if padded else None
        expected, expected_weights = theirs(*arguments, key_padding_mask=mask)
        out, weights = ours(*arguments, key_padding_mask=mask, need_weights=True)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(weights, expected_weights)
        douts = [torch.randn_like(out), torch.randn_like(weights)]
        torch.testing.assert_close(
            gradients(ours, [out, weights], tensors, douts),
            gradients(theirs, [expected, expected_weights], tensors, douts),
        )

    @pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
    @pytest.mark.parametrize("kind", ["bool", "float", "per head", "with the hint", "hint alone"])
    def test_the_causal_mask(self, kind, options):
        theirs, ours = pair(batch_first=True, **options)
        x, *_ = inputs(6, 6)
        attn_mask = CAUSAL(6, dtype=torch.float64)
        if kind == "bool":
            attn_mask = attn_mask == -torch.inf
        elif kind == "per head":
            attn_mask = attn_mask.expand(BATCH * HEADS, -1, -1)
        is_causal = "hint" in kind
        expected, expected_weights = theirs(
            x, x, x, attn_mask=attn_mask, is_causal=is_causal, average_attn_weights=False
        )
        attn_mask = None if kind == "hint alone" else attn_mask
        out, weights = ours(
            x, x, x, attn_mask=attn_mask, is_causal=is_causal, average_attn_weights=False, need_weights=True
        )
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(weights, expected_weights)
        dout = torch.randn_like(out)
        torch.testing.assert_close(gradients(ours, out, [x], dout), gradients(theirs, expected, [x], dout))

    @pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}], ids=str)
    @pytest.mark.parametrize("as_float", [False, True])
    def test_the_causal_mask_with_padding_anywhere(self, as_float, options):
        theirs, ours = pair(batch_first=True, **options)
        x, *_ = inputs(6, 6)
        padding, attn_mask = scattered_padding(6), torch.ones(6, 6, dtype=torch.bool).triu(1)
        if as_float:
            padding, attn_mask = (
                torch.zeros(m.shape, dtype=torch.float64).masked_fill(m, -torch.inf) for m in (padding, attn_mask)
            )
        expected, expected_weights = theirs(x, x, x, key_padding_mask=padding, attn_mask=attn_mask)
        out, weights = ours(x, x, x, key_padding_mask=padding, attn_mask=attn_mask, need_weights=True)
        tokens = ~scattered_padding(6)
        torch.testing.assert_close(out[tokens], expected[tokens])
        torch.testing.assert_close(weights[tokens], expected_weights[tokens])
        # What is padded sees nothing.
        assert torch.equal(out[~tokens], ours.out_proj.bias.expand_as(out[~tokens]))
        assert not weights[~tokens].any()
        if not options:  # torch's backward of rows that see nothing is NaN
            return
        dout = torch.randn_like(out) * tokens[..., None]
        torch.testing.assert_close(gradients(ours, out, [x], dout), gradients(theirs, expected, [x], dout))

    def test_without_a_batch(self):
        for batch_first in (False, True):
            theirs, ours = pair(batch_first=batch_first)
            query, key, value = (x[0] for x in inputs())
            mask = scattered_padding(7)[1]
            expected = theirs(query, key, value, key_padding_mask=mask)
            got = ours(query, key, value, key_padding_mask=mask, need_weights=True)
            torch.testing.assert_close(got, expected)
            assert got[0].shape == (5, EMBED)
            per_head = ours(query, key, value, need_weights=True, average_attn_weights=False)[1]
            assert per_head.shape == (HEADS, 5, 7)

    def test_state_dicts_go_both_ways(self):
        theirs, ours = pair(kdim=5, add_bias_kv=True)
        theirs.load_state_dict(ours.state_dict())
        learned = EntmaxAttention(EMBED, HEADS, kdim=5, add_bias_kv=True, alpha=1.25, learnable_alpha=True)
        learned.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(learned.alpha, torch.full((HEADS,), 1.25))
        with pytest.raises(RuntimeError, match="alpha_logit"):
            theirs.load_state_dict(learned.state_dict())
        with pytest.raises(RuntimeError, match="in_proj_weight"):
            EntmaxAttention(EMBED, HEADS).load_state_dict(theirs.state_dict())


class TestAgainstDenseEntmax:
    @pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("alpha", [1.5, "learned"])
    def test_output_weights_and_gradients(self, num_kv_heads, is_causal, padded, alpha):
        options = {"alpha": 1.4, "learnable_alpha": True} if alpha == "learned" else {"alpha": alpha}
        module = EntmaxAttention(
            EMBED, HEADS, num_kv_heads=num_kv_heads, batch_first=True, dtype=torch.float64, **options
        )
        nn.init.normal_(module.in_proj_bias)
        tensors = inputs()
        padding = scattered_padding(7) if padded else torch.zeros(BATCH, 7, dtype=torch.bool)
        visible = ~padding[:, None, None].expand(-1, -1, 5, -1)
        if is_causal:
            visible = visible.tril(2) & ~padding[:, None, 2:, None]  # the queries are the last five of the keys
        expected, expected_weights = dense(module, tensors, visible)
        out, weights = module(
            *tensors,
            key_padding_mask=padding if padded else None,
            is_causal=is_causal,
            need_weights=True,
            average_attn_weights=False,
        )
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(weights, expected_weights)
        assert (weights == 0).any()
        dout = torch.randn_like(out)
        torch.testing.assert_close(gradients(module, out, tensors, dout), gradients(module, expected, tensors, dout))

    def test_a_query_without_keys_gives_zeros(self):
        module = EntmaxAttention(EMBED, HEADS, batch_first=True, bias=False)
        padding = torch.tensor([[True] * 7, [False] * 7, [True] * 7])
        out, weights = module(*inputs(dtype=torch.float32), key_padding_mask=padding, need_weights=True)
        assert not out[[0, 2]].any()
        assert not weights[[0, 2]].any()
        assert out[1].all()
        out.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in module.parameters())

    def test_more_queries_than_keys(self):
        module = EntmaxAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64)
        tensors = inputs(7, 4)
        padding = scattered_padding(4)
        # The first three queries come before all keys.
        visible = torch.ones(7, 4, dtype=torch.bool).tril(-3) & ~padding[:, None, None]
        visible = visible & ~F.pad(padding, (3, 0))[:, None, :, None]
        out, _ = module(*tensors, key_padding_mask=padding, is_causal=True)
        torch.testing.assert_close(out, dense(module, tensors, visible)[0])

    def test_padded_keys_are_never_used(self):
        module = EntmaxAttention(EMBED, HEADS, batch_first=True)
        query, key, value = (x.detach() for x in inputs(dtype=torch.float32))
        padding = scattered_padding(7)
        expected = module(query, key, value, key_padding_mask=padding)[0]
        for x in (key, value):
            x[padding] = torch.nan
        assert torch.equal(module(query, key, value, key_padding_mask=padding)[0], expected)

    def test_rotary_is_given_q_and_k(self):
        shapes = []

        def rotary(q, k):
            shapes.append((tuple(q.shape), tuple(k.shape)))
            return q * torch.arange(1, 6)[:, None], k.flip(-1)

        module = EntmaxAttention(EMBED, HEADS, num_kv_heads=2, dtype=torch.float64, rotary=rotary, batch_first=True)
        tensors = inputs()
        out, _ = module(*tensors)
        assert shapes == [((BATCH, HEADS, 5, 3), (BATCH, 2, 7, 3))]
        visible = torch.ones(BATCH, 1, 5, 7, dtype=torch.bool)
        torch.testing.assert_close(out, dense(module, tensors, visible, rotary)[0])

    def test_a_rotary_module_is_a_part(self):
        class Rotary(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("angle", torch.ones(1))

            def forward(self, q, k):
                return q * self.angle, k * self.angle

        module = EntmaxAttention(EMBED, HEADS, rotary=Rotary())
        assert "rotary.angle" in module.state_dict()
        x = torch.randn(4, 2, EMBED)
        plain = EntmaxAttention(EMBED, HEADS)
        plain.load_state_dict(module.state_dict(), strict=False)
        assert torch.equal(module(x, x, x)[0], plain(x, x, x)[0])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, dtype):
        module = EntmaxAttention(EMBED, HEADS, batch_first=True).to(dtype)
        x = torch.randn(2, 6, EMBED, dtype=dtype, requires_grad=True)
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
        )
        expected = module.out_proj(adasplash2.attention(q, k, v).transpose(1, 2).flatten(2))
        out, weights = module(x, x, x, need_weights=True)
        assert out.dtype == weights.dtype == dtype
        assert torch.equal(out, expected)
        out.sum().backward()
        assert x.grad.isfinite().all()
        assert x.grad.any()

    def test_autocast(self):
        module = EntmaxAttention(EMBED, HEADS, batch_first=True, learnable_alpha=True)
        x = torch.randn(2, 6, EMBED)
        with torch.autocast("cpu", torch.bfloat16):
            out, weights = module(x, x, x, need_weights=True)
            assert out.dtype == weights.dtype == torch.bfloat16
            out.sum().backward()
        assert {parameter.grad.dtype for parameter in module.parameters()} == {torch.float32}
        assert module.alpha_logit.grad.all()


class TestAlpha:
    def test_a_learned_alpha_starts_where_it_is_told(self):
        for alpha in (1.0625, 1.5, 1.9):
            module = EntmaxAttention(EMBED, HEADS, alpha=alpha, learnable_alpha=True, dtype=torch.float64)
            torch.testing.assert_close(module.alpha, torch.full((HEADS,), alpha, dtype=torch.float64))
        assert torch.equal(EntmaxAttention(EMBED, HEADS, learnable_alpha=True).alpha_logit, torch.zeros(HEADS))

    def test_it_learns(self):
        module = EntmaxAttention(EMBED, HEADS, learnable_alpha=True, batch_first=True)
        query, key, value = (x.detach() for x in inputs(dtype=torch.float32))
        target = EntmaxAttention(EMBED, HEADS, alpha=1.9, batch_first=True)
        target.load_state_dict({name: x for name, x in module.state_dict().items() if name != "alpha_logit"})
        target = target(query, key, value)[0].detach()
        optimizer = torch.optim.Adam([module.alpha_logit], lr=0.1)
        for _ in range(30):
            optimizer.zero_grad()
            loss = (module(query, key, value)[0] - target).square().sum()
            loss.backward()
            optimizer.step()
        assert torch.as_tensor(module.alpha).min() > 1.6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_it_stays_inside(self, dtype):
        module = EntmaxAttention(EMBED, HEADS, learnable_alpha=True, dtype=dtype)
        x = torch.randn(5, 1, EMBED, dtype=dtype)
        for logit in (-1e4, -20.0, 20.0, 1e4):
            nn.init.constant_(module.alpha_logit, logit)
            alpha = torch.as_tensor(module.alpha)
            assert ((alpha > 1) & (alpha < 2)).all()
            assert module(x, x, x)[0].isfinite().all()

    def test_it_can_be_set(self):
        fixed, learned = EntmaxAttention(EMBED, HEADS), EntmaxAttention(EMBED, HEADS, learnable_alpha=True)
        for module in (fixed, learned):
            module.alpha = 1.25
            assert "alpha" not in module.state_dict()
        assert fixed.alpha == 1.25
        torch.testing.assert_close(learned.alpha, torch.full((HEADS,), 1.25))
        nn.init.zeros_(learned.alpha_logit)
        learned.reset_parameters()
        torch.testing.assert_close(learned.alpha, torch.full((HEADS,), 1.25))
        with pytest.raises(ValueError, match=r"alpha=2.5: expected a number in"):
            fixed.alpha = 2.5
        with pytest.raises(ValueError, match=r"alpha=2: expected more than 1.001 and less than 1.999"):
            learned.alpha = 2


class TestCopies:
    @pytest.mark.parametrize("learnable_alpha", [False, True])
    def test_deepcopy_pickle_and_state_dict(self, learnable_alpha):
        options = {"num_kv_heads": 2, "learnable_alpha": learnable_alpha}
        module = EntmaxAttention(EMBED, HEADS, alpha=1.3, **options)
        if learnable_alpha:
            nn.init.normal_(module.alpha_logit)
        saved = io.BytesIO()
        torch.save(module.state_dict(), saved)
        saved.seek(0)
        loaded = EntmaxAttention(EMBED, HEADS, alpha=1.5 if learnable_alpha else 1.3, **options)
        loaded.load_state_dict(torch.load(saved))
        x = torch.randn(5, 2, EMBED)
        expected = module(x, x, x)[0]
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
            assert torch.equal(other(x, x, x)[0], expected)
            assert all(one is not two for one, two in zip(other.parameters(), module.parameters(), strict=True))

    def test_repr(self):
        module = EntmaxAttention(EMBED, HEADS)
        assert module.extra_repr() == "embed_dim=12, num_heads=4, alpha=1.5"
        module = EntmaxAttention(EMBED, HEADS, num_kv_heads=2, learnable_alpha=True, kdim=5, batch_first=True)
        expected = "embed_dim=12, num_heads=4, num_kv_heads=2, alpha=learned per head, kdim=5, batch_first=True"
        assert module.extra_repr() == expected

    def test_a_module_without_memory_is_given_some(self):
        module = EntmaxAttention(EMBED, HEADS, device="meta", learnable_alpha=True, alpha=1.25)
        module.to_empty(device="cpu").reset_parameters()
        torch.testing.assert_close(module.alpha, torch.full((HEADS,), 1.25))
        assert module.in_proj_weight.isfinite().all()


def encoder(**options):
    options = {"dropout": 0.0, "batch_first": True, **options}
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(EMBED, HEADS, 16, **options), 2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.double()


class TestConvert:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("mask", [None, "padding", "causal", "both"])
    def test_an_encoder_at_alpha_1_is_what_it_was(self, mask, training):
        model = encoder().train(training)
        x = torch.randn(BATCH, 6, EMBED, dtype=torch.float64)
        padding = torch.arange(6) >= torch.tensor([6, 4, 5])[:, None]
        options = {
            "src_key_padding_mask": padding if mask in ("padding", "both") else None,
            "mask": CAUSAL(6) == -torch.inf if mask in ("causal", "both") else None,
        }
        expected = model(x, **options)
        model = convert(model, alpha=1)
        tokens = ~padding if mask in ("padding", "both") else torch.ones_like(padding)
        torch.testing.assert_close(model(x, **options)[tokens], expected[tokens])
        with torch.no_grad():
            torch.testing.assert_close(model(x, **options)[tokens], expected[tokens])

    @pytest.mark.parametrize("padded", [False, True])
    def test_the_fused_path_of_inference_is_not_taken(self, padded):
        model = convert(encoder())
        x = torch.randn(BATCH, 6, EMBED, dtype=torch.float64)
        padding = torch.arange(6) >= torch.tensor([6, 4, 5])[:, None] if padded else None
        expected = model(x, src_key_padding_mask=padding)
        with torch.no_grad():
            out = model.eval()(x, src_key_padding_mask=padding)
        torch.testing.assert_close(out, expected.detach())

    def test_a_layer_with_our_module_in_it(self):
        layer: Any = nn.TransformerEncoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True)
        layer.self_attn = EntmaxAttention(EMBED, HEADS, batch_first=True)
        x = torch.randn(BATCH, 6, EMBED)
        expected = layer(x).detach()
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), expected)
        with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
            stack = nn.TransformerEncoder(layer, 2).eval()
        padding = torch.arange(6) >= torch.tensor([6, 4, 5])[:, None]
        with torch.no_grad():
            assert stack(x, src_key_padding_mask=padding).isfinite().all()

    @pytest.mark.filterwarnings("ignore:enable_nested_tensor")
    @pytest.mark.parametrize("norm_first", [False, True])
    def test_an_encoder_and_decoder(self, norm_first):
        options = {"dropout": 0.0, "norm_first": norm_first, "dtype": torch.float64}
        model = nn.Transformer(EMBED, HEADS, 1, 2, 16, **options).eval()
        source, target = (torch.randn(n, BATCH, EMBED, dtype=torch.float64) for n in (7, 5))
        padding = scattered_padding(7)
        masks = {
            "tgt_mask": CAUSAL(5, dtype=torch.float64),
            "src_key_padding_mask": padding,
            "memory_key_padding_mask": padding,
        }
        with torch.no_grad():
            expected = model(source, target, **masks)
            one = convert(copy.deepcopy(model), alpha=1.0)(source, target, **masks)
            torch.testing.assert_close(one, expected)
            sparse = convert(copy.deepcopy(model))(source, target, **masks)
        assert sparse.isfinite().all()
        assert not sparse.isclose(expected).any(-1).all()
        assert sum(isinstance(module, EntmaxAttention) for module in convert(model).modules()) == 5

    def test_everything_that_refers_to_the_module_goes_on(self):
        attention: Any = nn.MultiheadAttention(EMBED, HEADS)
        model: Any = nn.ModuleDict({"one": attention, "two": nn.ModuleList([attention])})
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        calls = []
        attention.register_forward_hook(lambda *_: calls.append(1))
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        assert convert(model) is model
        assert type(attention) is EntmaxAttention
        assert model["one"] is model["two"][0] is attention
        x = torch.randn(5, 2, EMBED)
        model["one"](x, x, x)[0].square().sum().backward()
        optimizer.step()
        assert calls == [1]
        assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    def test_the_model_itself(self):
        theirs, _ = pair(add_bias_kv=True, kdim=5)
        query, key, value = (x.transpose(0, 1) for x in inputs(kdim=5))
        expected = theirs(query, key, value)[0]
        ours = convert(theirs, alpha=1, learnable_alpha=False)
        torch.testing.assert_close(ours(query, key, value)[0], expected)
        assert ours(query, key, value)[1] is None
        assert repr(ours).startswith("EntmaxAttention(\n  embed_dim=12, num_heads=4, alpha=1, kdim=5, add_bias_kv=True")

    def test_with_a_learned_alpha(self):
        model = convert(encoder(), alpha=1.25, learnable_alpha=True)
        model(torch.randn(BATCH, 6, EMBED, dtype=torch.float64)).square().sum().backward()
        for layer in model.layers:
            assert layer.self_attn.alpha_logit.dtype == torch.float64
            assert layer.self_attn.alpha_logit.grad.all()

    def test_dropout_of_weights(self):
        model = encoder(dropout=0.1)
        with pytest.raises(ValueError, match=r"layers.0.self_attn.dropout=0.1: expected 0.*ignore_dropout=True"):
            convert(model)
        assert type(model.layers[0].self_attn) is nn.MultiheadAttention
        convert(model, ignore_dropout=True)
        assert model.layers[1].self_attn.dropout == 0
        assert model.layers[1].dropout1.p == 0.1

    def test_what_cannot_be_converted(self):
        class Own(nn.MultiheadAttention):
            pass

        with pytest.raises(ValueError, match="model is a Linear with 0 entmax attention modules already"):
            convert(nn.Linear(2, 2))
        with pytest.raises(ValueError, match="TransformerEncoder with 2 entmax attention modules already"):
            convert(convert(encoder()))
        model = nn.Sequential(nn.MultiheadAttention(EMBED, HEADS), Own(EMBED, HEADS))
        with pytest.raises(TypeError, match=r"1 is a .*Own: expected torch.nn.MultiheadAttention itself"):
            convert(model)
        with pytest.raises(ValueError, match="alpha=1: expected more than"):
            convert(model, alpha=1, learnable_alpha=True)
        not_a_number: Any = "softmax"
        with pytest.raises(TypeError, match="alpha='softmax': expected a number"):
            convert(model, alpha=not_a_number)
        assert type(model[0]) is nn.MultiheadAttention

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_a_nested_tensor_is_refused(self):
        model = convert(encoder())
        model.use_nested_tensor = True
        padding = torch.arange(6) >= torch.tensor([6, 4, 5])[:, None]
        with torch.no_grad(), pytest.raises(ValueError, match=r"query is a nested tensor.*enable_nested_tensor=False"):
            model.eval()(torch.randn(BATCH, 6, EMBED, dtype=torch.float64), src_key_padding_mask=padding)


class TestTransformers:
    def model(self):
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        return transformers.LlamaForCausalLM(config)

    def test_convert_and_schedule(self):
        model = self.model()
        other = copy.deepcopy(model)
        tokens = torch.randint(20, (2, 8))
        softmax = model(tokens).logits
        assert convert(model, alpha=1) is model
        torch.testing.assert_close(model(tokens).logits, softmax)
        schedule = AlphaSchedule(model, 2, steps=2)
        schedule.step()
        assert model.config.entmax_alpha == 1.5
        moving = model(tokens).logits
        schedule.step()
        sparse = model(tokens).logits
        torch.testing.assert_close(moving, convert(other)(tokens).logits)
        torch.testing.assert_close(sparse, convert(other, alpha=2)(tokens).logits)
        assert not sparse.isclose(softmax).all()
        assert model.config.to_diff_dict()["entmax_alpha"] == 2

    def test_convert_ends_a_schedule(self):
        model = convert(self.model(), alpha=1)
        tokens = torch.randint(20, (2, 8))
        softmax = model(tokens).logits
        AlphaSchedule(model, 2, steps=2).step()
        assert torch.equal(convert(model, alpha=1)(tokens).logits, softmax)

    def test_a_learned_alpha_is_left_alone(self):
        model = convert(self.model(), alpha=1)
        learned = nn.Parameter(torch.tensor(1.25))
        model.model.layers[0].self_attn.entmax_alpha = learned
        AlphaSchedule(model, 2, steps=2).step()
        assert model.model.layers[0].self_attn.entmax_alpha is learned
        assert model.model.layers[1].self_attn.entmax_alpha == 1.5

    def test_a_model_whose_attention_cannot_be_chosen(self, monkeypatch):
        model = self.model()
        base = sys.modules["transformers"].PreTrainedModel
        monkeypatch.setattr(base, "_can_set_attn_implementation", classmethod(lambda cls: False))
        with pytest.raises(ValueError, match="model is a LlamaForCausalLM, which does not let its attention be chosen"):
            convert(model)

    def test_inside_of_another_model_beside_torch_attention(self):
        model: Any = nn.ModuleList([self.model(), nn.MultiheadAttention(EMBED, HEADS)])
        convert(model, alpha=1)
        AlphaSchedule(model, 1.5, steps=1).step()
        assert model[0].config.entmax_alpha == model[1].alpha == 1.5
        with pytest.raises(ValueError, match="learnable_alpha=True: expected False, for a transformers model"):
            convert(model, learnable_alpha=True)


class TestSchedule:
    def test_it_goes_from_softmax_to_the_target(self):
        model = convert(encoder(), alpha=1)
        schedule = AlphaSchedule(model, 1.5, steps=4)
        seen = []
        for _ in range(6):
            seen.append(schedule.alpha)
            assert all(layer.self_attn.alpha == schedule.alpha for layer in model.layers)
            schedule.step()
        assert seen == [1, 1.125, 1.25, 1.375, 1.5, 1.5]
        assert type(model.layers[0].self_attn.alpha) is float

    def test_the_ends_are_exact(self):
        model = convert(encoder(), alpha=1.9)
        schedule = AlphaSchedule(model, 1.3, steps=7, start=1.9)
        assert schedule.alpha == 1.9
        for _ in range(7):
            schedule.step()
        assert schedule.alpha == model.layers[0].self_attn.alpha == 1.3

    def test_it_is_softmax_until_entmax_can_be_told_from_it(self):
        model = convert(encoder(), alpha=1)
        schedule = AlphaSchedule(model, 1.5, steps=10**4)
        schedule.last_step = 18
        schedule.step()
        assert schedule.alpha == 1
        schedule.step()
        assert schedule.alpha == 1.001

    def test_what_is_in_between_is_entmax_of_that_alpha(self):
        model = convert(encoder(), alpha=1)
        x = torch.randn(BATCH, 6, EMBED, dtype=torch.float64)
        schedule = AlphaSchedule(model, steps=4)
        schedule.step()
        moving = model(x)
        for layer in model.layers:
            layer.self_attn.alpha = 1.125
        torch.testing.assert_close(model(x), moving)
        assert model.layers[1].self_attn.extra_repr() == "embed_dim=12, num_heads=4, alpha=1.125, batch_first=True"

    def test_it_goes_on_where_it_was(self):
        model = convert(encoder(), alpha=1)
        schedule = AlphaSchedule(model, steps=4)
        schedule.step()
        schedule.step()
        fresh = copy.deepcopy(model)
        other = AlphaSchedule(fresh, 1.9, steps=3, start=1.2)
        other.load_state_dict(schedule.state_dict())
        assert float(fresh.layers[1].self_attn.alpha) == other.alpha == 1.25
        other.step()
        assert other.alpha == 1.375
        assert model.layers[0].self_attn.alpha == 1.25

    def test_learned_alphas_are_left_alone(self):
        model: Any = nn.ModuleList(
            [EntmaxAttention(EMBED, HEADS, learnable_alpha=True), EntmaxAttention(EMBED, HEADS, alpha=1)]
        )
        AlphaSchedule(model, steps=1).step()
        assert torch.equal(model[0].alpha_logit, torch.zeros(HEADS))
        assert model[1].alpha == 1.5

    def test_errors(self):
        model = convert(encoder(), alpha=1)
        with pytest.raises(ValueError, match=r"model is a Linear without entmax attention.*convert\(model, alpha=1\)"):
            AlphaSchedule(nn.Linear(2, 2), steps=1)
        with pytest.raises(ValueError, match="target=3: expected a number in"):
            AlphaSchedule(model, 3, steps=1)
        with pytest.raises(ValueError, match="start=0: expected a number in"):
            AlphaSchedule(model, start=0, steps=1)
        with pytest.raises(ValueError, match="steps=0: expected at least 1"):
            AlphaSchedule(model, steps=0)
        steps: Any = 1.5
        with pytest.raises(TypeError, match=r"steps=1.5: expected an int"):
            AlphaSchedule(model, steps=steps)


class TestCompile:
    @pytest.fixture(autouse=True)
    def fresh_compiler(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_a_moving_alpha_is_compiled_once(self):
        model = convert(encoder(), alpha=1)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        x = torch.randn(BATCH, 6, EMBED, dtype=torch.float64)
        schedule = AlphaSchedule(model, steps=11)
        counts = []
        for _ in range(12):
            out = compiled(x)
            torch.testing.assert_close(out, model(x))
            out.sum().backward()
            counts.append(counter.frame_count)
            schedule.step()
        assert schedule.alpha == 1.5
        assert counts[:-1] == [1] + 10 * [2]

    def test_masks(self):
        model = EntmaxAttention(EMBED, HEADS, batch_first=True, learnable_alpha=True)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        x = torch.randn(BATCH, 6, EMBED)
        masks = {"key_padding_mask": scattered_padding(6).float().masked_fill(scattered_padding(6), -torch.inf)}
        for attn_mask in (None, CAUSAL(6)):
            masks["attn_mask"] = attn_mask
            out, weights = compiled(x, x, x, **masks, need_weights=True)
            torch.testing.assert_close((out, weights), model(x, x, x, **masks, need_weights=True))
        masks["key_padding_mask"][0, 0] = -1.0
        with pytest.raises(RuntimeError, match="key_padding_mask has other entries than 0 and -inf"):
            compiled(x, x, x, **masks)


@pytest.mark.gpu
@pytest.mark.parametrize("learnable_alpha", [False, True])
def test_forward_and_backward_in_a_cuda_graph(target, learnable_alpha):
    """Neither padding nor alpha is read from the device, and a replay computes on what the inputs then hold."""
    if target.device.type != "cuda":
        pytest.skip(f"{target.name} serves no CUDA device")
    module = EntmaxAttention(64, 4, batch_first=True, learnable_alpha=learnable_alpha, backend=target.name)
    module.to("cuda", torch.bfloat16)
    x, dout = torch.randn(2, BATCH, 200, 64, dtype=torch.bfloat16, device="cuda")
    x.requires_grad_()
    padding = scattered_padding(200).cuda()

    def step():
        out, _ = module(x, x, x, key_padding_mask=padding, is_causal=True)
        return out, *torch.autograd.grad(out, [x, *module.parameters()], dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            before = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.mul_(2)
        dout.mul_(2)
        padding.copy_(padding.flip(0))
    graph.replay()
    for one, other, earlier in zip(captured, step(), before, strict=True):
        torch.testing.assert_close(one, other)
        assert not torch.equal(one, earlier)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"embed_dim": 10}, ValueError, "embed_dim=10: expected a multiple of num_heads, which is 4"),
            ({"embed_dim": 0}, ValueError, "embed_dim=0: expected at least 1"),
            ({"num_heads": 2.0}, TypeError, r"num_heads=2.0: expected an int"),
            ({"num_kv_heads": 3}, ValueError, "num_heads=4: expected a multiple of num_kv_heads, which is 3"),
            ({"dropout": 0.1}, ValueError, r"dropout=0.1: expected 0"),
            ({"kdim": -1}, ValueError, "kdim=-1: expected at least 1"),
            ({"alpha": 0.5}, ValueError, r"alpha=0.5: expected a number in \[1, 2\]"),
            ({"alpha": 1, "learnable_alpha": True}, ValueError, r"alpha=1: expected more than 1.001"),
            ({"alpha": True}, TypeError, "alpha=True: expected a number"),
        ],
    )
    def test_construction(self, options, error, message):
        with pytest.raises(error, match=message):
            EntmaxAttention(**{"embed_dim": EMBED, "num_heads": HEADS, **options})

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            (
                {"attn_mask": torch.zeros(5, 7)},
                ValueError,
                r"attn_mask is not the causal mask: expected True or -inf where j - i > 2, for 5 queries and 7 keys",
            ),
            (
                {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(1), "is_causal": True},
                ValueError,
                "attn_mask is not the causal mask",
            ),
            (
                {"attn_mask": torch.zeros(7, 5)},
                ValueError,
                r"attn_mask.shape=\(7, 5\): expected \(5, 7\) or \(12, 5, 7\)",
            ),
            (
                {"attn_mask": torch.zeros(5, 7).long()},
                TypeError,
                r"attn_mask.dtype=torch.int64: expected torch.bool or",
            ),
            ({"key_padding_mask": torch.ones(3, 7)}, ValueError, "key_padding_mask has other entries than 0 and -inf"),
            ({"key_padding_mask": torch.ones(7, 3)}, ValueError, r"key_padding_mask.shape=\(7, 3\): expected \(3, 7\)"),
            ({"key_padding_mask": torch.ones(3, 7).int()}, TypeError, "key_padding_mask.dtype=torch.int32"),
            ({"is_causal": 1}, TypeError, "is_causal=1: expected a bool"),
            ({"query": torch.zeros(3, 5, 11)}, ValueError, r"query.shape=\(3, 5, 11\): expected.*the last of them 12"),
            ({"key": torch.zeros(7, EMBED)}, ValueError, r"key.shape=\(7, 12\): expected 3 dimensions"),
            ({"key": torch.zeros(2, 7, EMBED)}, ValueError, r"value.shape=\(3, 7, 12\): expected \(2, 7, 12\)"),
            ({"query": torch.zeros(2, 5, EMBED)}, ValueError, r"key.shape=\(3, 7, 12\): expected a batch of 2"),
        ],
    )
    def test_call(self, options, error, message):
        module = EntmaxAttention(EMBED, HEADS, batch_first=True)
        arguments = dict(zip(("query", "key", "value"), inputs(dtype=torch.float32), strict=True))
        with pytest.raises(error, match=message):
            module(**{**arguments, **options})

    def test_a_batch_in_the_wrong_place(self):
        with pytest.raises(ValueError, match=r"expected a batch of 5 in dimension 1.*batch_first=False"):
            EntmaxAttention(EMBED, HEADS)(*inputs(dtype=torch.float32))

    def test_added_keys_before_all_queries(self):
        module = EntmaxAttention(EMBED, HEADS, batch_first=True, add_zero_attn=True)
        with pytest.raises(
            ValueError, match="is_causal=True with add_bias_kv or add_zero_attn: expected no more queries"
        ):
            module(*inputs(7, 4, dtype=torch.float32), is_causal=True)

    def test_an_unknown_backend(self):
        x = torch.randn(4, 2, EMBED)
        with pytest.raises(ValueError, match="backend='cuda'"):
            EntmaxAttention(EMBED, HEADS, backend="cuda")(x, x, x)
        with pytest.raises(adasplash2.UnsupportedError):
            EntmaxAttention(EMBED, HEADS, backend="triton")(x, x, x)


@pytest.fixture(scope="module")
def program():
    """The example as a module: its folder is no package."""
    path = Path(__file__).parents[1] / "examples" / "softmax_to_entmax.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestExample:
    def test_it_runs(self, program, tmp_path, capsys):
        results, picture = tmp_path / "results.json", tmp_path / "picture.png"
        program.main(
            ["--steps=4", "--further=3", "--seqlen=32", "--alpha=1.75", f"--json={results}", f"--plot={picture}"]
        )
        results = json.loads(results.read_text())
        rows = results["results"]
        softmax = {name: row["zeros"] == 0 for name, row in rows.items()}
        assert softmax == {name: name.startswith("softmax") for name in rows}
        assert {row["alpha"] for name, row in rows.items() if not softmax[name]} == {1.75}
        curves = results["held_out_loss_by_step"]
        for name, curve in curves.items():
            assert [step for step, _ in curve] == [0, 1, 2, 3]
            assert curve[-1][1] == rows[name]["held_out_loss"]
        # The schedule starts where softmax is; a conversion at once does not.
        starts = {name: curve[0][1] for name, curve in curves.items()}
        trained = rows["softmax, trained"]["held_out_loss"]
        assert starts["softmax, trained further"] == trained
        assert starts["converted, alpha raised in training"] == pytest.approx(trained)
        assert starts["converted at once, trained further"] == rows["converted, not trained further"]["held_out_loss"]
        assert "│ converted, alpha raised in training │ 1.75" in capsys.readouterr().out
        assert picture.read_bytes().startswith(b"\x89PNG\r\n")

    def test_the_page_shows_the_committed_result(self, program):
        root = Path(program.__file__).parents[1]
        results = json.loads((root / "examples" / "results" / "softmax_to_entmax.json").read_text(encoding="utf-8"))
        page = (root / "docs" / "nn.md").read_text(encoding="utf-8")
        table = [line for line in page.splitlines() if line.endswith("% |")]
        assert table == [f"| {' | '.join(row)} |" for row in program.cells(results)]

    def test_bad_options_are_refused(self, program, capsys):
        for option, message in (
            ("--steps=0", "0: expected at least 1"),
            ("--alpha=3", "3: expected a number in (1, 2]"),
        ):
            with pytest.raises(SystemExit):
                program.main([option])
            assert message in capsys.readouterr().err
