"""Tokens per second in training: a Llama-style model of transformers, once with each attention.

    python benchmarks/training.py --device cuda          4 layers, 16 heads of 64 channels, 8192 tokens
    python benchmarks/training.py --seqlen 512 --layers 2 --heads 4

A step is forward, backward and AdamW, under bfloat16 autocast. Everyone makes it on a copy of the same model and the
same text, with a learning rate of 0: so all have the same weights in every round. They are timed at random weights and
after real training with entmax on the demo's text (``--steps``), as how sparse attention is depends on the weights.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import Case
from gate import make_gate
from measure import peak_memory
from providers import Provider, providers
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from stamp import machine_slug, stamp
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

from adasplash2 import options, registry
from adasplash2.bench.measure import Forward, interleaved, ratio, spread
from adasplash2.demo.text import Corpus, load_corpus
from adasplash2.integrations.transformers import register

__all__ = ["SDPA", "main"]

RESULTS = Path(__file__).parent / "results"

SDPA = "sdpa-bf16"
CONTESTANTS = (SDPA, "triton", "cupy", "numba", "adasplash")
LEARNING_RATE = 1e-3
WARM_UP = 20  # steps, of the training before the timing
PROGRESS = 100  # steps between two lines about it

Row = dict[str, Any]
Step = Callable[[], Tensor]


def implementation(provider: Provider, forward: Forward) -> str:
    """What transformers calls a provider's attention, registered if transformers has none of this name."""
    if provider.name == SDPA:
        return "sdpa"
    if provider.name in registry.names():
        name = f"adasplash2_{provider.name}"
        register(backend=provider.name, name=name)
        return name
    AttentionInterface.register(provider.name, functools.partial(_attend, forward=forward))
    return provider.name


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, forward: Forward, **options: Any
) -> tuple[Tensor, None]:
    """A causal attention that knows neither autocast nor strides, as transformers calls it."""
    q, k, v = (tensor.to(torch.bfloat16).contiguous() for tensor in (query, key, value))
    return forward(q, k, v).transpose(1, 2).contiguous(), None


def build(case: Case, layers: int, vocab_size: int, device: torch.device) -> LlamaForCausalLM:
    """The model at random weights; its perceptrons are as wide as Llama 2's."""
    width = case.heads * case.head_dim
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=43 * width // 16,
        num_hidden_layers=layers,
        num_attention_heads=case.heads,
        head_dim=case.head_dim,
        max_position_embeddings=case.seqlen,
        use_cache=False,
    )
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Nats per token, (), under autocast."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        loss: Tensor = model(tokens, labels=tokens).loss
    return loss


def make_step(model: LlamaForCausalLM, name: str, tokens: Tensor) -> Step:
    """What is timed, on a copy of the model with this attention."""
    own = copy.deepcopy(model)
    own.set_attn_implementation(name)
    optimizer = torch.optim.AdamW(own.parameters(), lr=0.0, fused=True)

    def step() -> Tensor:
        loss = loss_of(own, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def train(model: LlamaForCausalLM, name: str, corpus: Corpus, case: Case, steps: int, console: Console) -> None:
    """Train the model in place, with this attention."""
    model.set_attn_implementation(name)
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, WARM_UP, steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        tokens, _ = corpus.batch(case.batch, case.seqlen, generator)
        loss = loss_of(model, tokens.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % PROGRESS == 0 or step == steps - 1:
            console.print(f"training step {step + 1}/{steps}: loss {loss.item():.2f}", highlight=False)


def support_per_layer(model: LlamaForCausalLM, tokens: Tensor, case: Case, backend: str) -> list[dict[str, float]]:
    """Of each layer the support that entmax attention has on its q and k."""
    found = []
    attend = AttentionInterface()[model.config._attn_implementation]

    def measured(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(case.support((query, key, value), backend=backend))
        return attend(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("measured", measured)
    before = model.config._attn_implementation
    model.set_attn_implementation("measured")
    with torch.no_grad():
        loss_of(model, tokens)
    model.set_attn_implementation(before)
    return found


def attention_operators(step: Step) -> list[str]:
    """The operators of torch that a step's attention is made of: they tell which kernel torch has chosen."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sorted({event.name for event in profile.events() if "attention" in event.name})


def admit(
    case: Case, chosen: Sequence[str], device: torch.device, console: Console
) -> tuple[dict[str, str], list[Row]]:
    """Whose attention is right at this shape, by name: what transformers calls it; and a row about each other one."""
    arguments, dout = case.inputs(device)
    gate = make_gate(case, arguments, dout)
    known = {provider.name: provider for provider in providers() if provider.op == case.op}
    admitted, others = {}, []
    for name in chosen:
        console.print(f"compiling and checking {name}", highlight=False)
        row = _row(name)
        ready = known[name].setup(case, arguments)
        if isinstance(ready, str):
            others.append(row | {"status": "skipped", "reason": ready})
            continue
        try:
            gate.check(ready.forward, known[name].function, backward=True)
        except AssertionError as error:
            others.append(row | {"status": "refused", "reason": str(error)})
        except Exception as error:
            others.append(row | _failure(error))
        else:
            admitted[name] = implementation(known[name], ready.forward)
    return admitted, others


def _row(name: str) -> Row:
    label = next(provider.label for provider in providers() if provider.name == name)
    return {"provider": name, "label": label}


def _failure(error: Exception) -> Row:
    """Whatever it is: the others are still to be timed, and the exit status tells."""
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}


def time_all(
    model: LlamaForCausalLM, tokens: Tensor, admitted: Mapping[str, str], device: torch.device, seconds: float
) -> list[Row]:
    """A row for each contestant at the model's weights; ``speedup`` is sdpa's time over its own."""
    rows = {name: _row(name) for name in admitted}
    steps: dict[str, Step] = {}
    for name, attention in admitted.items():
        try:
            step = make_step(model, attention, tokens)
            operators = attention_operators(step)
            rows[name] |= {"status": "timed", "loss": step().item(), "operators": operators}
            rows[name]["peak_bytes"] = peak_memory(step, device)
        except Exception as error:
            rows[name] |= _failure(error)
        else:
            steps[name] = step
    times = interleaved(steps, device, seconds) if steps else {}
    for name, own in times.items():
        rows[name] |= {
            "rounds": len(own),
            "ms": spread(own),
            "tokens_per_second": spread([1e3 * tokens.numel() / ms for ms in own]),
        }
        if SDPA in times:
            rows[name] |= {"against": SDPA, "speedup": ratio(times[SDPA], own)}
    return list(rows.values())


def show(state: Mapping[str, Any], console: Console) -> None:
    """Print what was measured at one state of the weights."""
    for i, layer in enumerate(state["support"]):
        shares = f"{layer['elements']:.2%} of the weights, {layer['blocks']:.0%} of the blocks"
        console.print(f"layer {i}: {layer['size']:.1f} keys a row, {shares}", highlight=False)
    table = Table("", "tokens/s", "speed", "20% to 80%", "ms", "MB", title=f"after {state['steps']} steps of training")
    for row in state["rows"]:
        if row["status"] == "timed":
            median, low, high = row.get("speedup", [float("nan")] * 3)
            table.add_row(
                row["label"],
                f"{row['tokens_per_second'][0]:,.0f}",
                f"{median:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{row['ms'][0]:.1f}",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            )
    console.print(table)
    for row in state["rows"]:
        if row["status"] == "timed":
            console.print(f"{row['label']}: loss {row['loss']:.4f}; {', '.join(row['operators'])}", highlight=False)
        else:
            console.print(f"{row['label']} {row['status']}: {escape(row['reason'])}", highlight=False)


def run(arguments: argparse.Namespace, results: dict[str, Any], console: Console) -> None:
    """Measure, and put each state of the weights into the results as soon as it is measured."""
    case = Case(
        "topics",
        arguments.seqlen,
        head_dim=arguments.head_dim,
        heads=arguments.heads,
        batch=arguments.batch,
        dtype=torch.bfloat16,
        device=arguments.device.type,
    )
    corpus = load_corpus(case.seqlen)
    tokens = corpus.held_out_windows(case.batch, case.seqlen)[0].to(arguments.device)
    model = build(case, arguments.layers, corpus.tokenizer.vocab_size, arguments.device)
    results["setting"] = {
        name: getattr(arguments, name) for name in ("seqlen", "batch", "layers", "heads", "head_dim")
    } | {"alpha": case.alpha, "parameters": model.num_parameters()}
    admitted, others = admit(case, arguments.attention, arguments.device, console)
    entmax = next((name for name in admitted if name in registry.names()), None)
    for steps in dict.fromkeys((0, arguments.steps if entmax else 0)):
        if entmax and steps:
            train(model, admitted[entmax], corpus, case, steps, console)
        rows = time_all(model, tokens, admitted, arguments.device, arguments.seconds)
        support = support_per_layer(model, tokens, case, entmax) if entmax else []
        state = {"steps": steps, "support": support, "rows": rows + others}
        results["states"].append(state)
        show(state, console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        1 if the gate refused somebody or somebody failed; 130 where Ctrl-C left nothing to write; else 0.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    at_least_1 = options.integer(1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu by default")
    parser.add_argument("--attention", nargs="+", choices=CONTESTANTS, default=CONTESTANTS, help="all by default")
    parser.add_argument("--seqlen", type=at_least_1, default=8192, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--batch", type=at_least_1, default=1, help="sequences of a step (default: %(default)s)")
    parser.add_argument("--layers", type=at_least_1, default=4, help="of the model (default: %(default)s)")
    parser.add_argument("--heads", type=at_least_1, default=16, help="of each layer (default: %(default)s)")
    parser.add_argument("--head-dim", type=at_least_1, default=64, help="of each head (default: %(default)s)")
    parser.add_argument(
        "--steps", type=options.integer(0), default=300, help="of real training first (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=options.seconds, default=5.0, help="timed at each state of the weights (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="MACHINE-DATE-training.json in results/ by default")
    arguments = parser.parse_args(argv)
    results: dict[str, Any] = {"stamp": stamp(arguments.device), "setting": {}, "states": []}
    console = Console()
    try:
        run(arguments, results, console)
    except KeyboardInterrupt:
        console.print("interrupted: keeping what was measured")
    finally:
        if results["states"]:
            name = f"{machine_slug(results['stamp'])}-{results['stamp']['date'][:10]}-training.json"
            path = arguments.json or RESULTS / name
            path.write_text(json.dumps(results, indent=1) + "\n")
            console.print(f"written: {path}", soft_wrap=True)
    if not results["states"]:
        return 130
    return int(any(row["status"] in ("refused", "failed") for state in results["states"] for row in state["rows"]))


if __name__ == "__main__":
    sys.exit(main())
