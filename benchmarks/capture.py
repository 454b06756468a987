"""Makes data/demo_qkv.npz: what attention is called with in the demo's model, trained with entmax on real text.

    python benchmarks/capture.py

The model has heads of 64 channels, wider than the demo's. One head of each layer, over held-out text, in float16 to
keep the file small.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from cases import CAPTURED
from rich.progress import track

import adasplash2
from adasplash2.demo.model import Transformer, capture_qkv, entmax_attend
from adasplash2.demo.text import load_corpus
from adasplash2.demo.train import Learner, held_out_loss, train

__all__ = ["main"]

ALPHA = 1.5
SEQLEN = 1024
HEAD_DIM = 64


def main(argv: Sequence[str] | None = None) -> None:
    """Train, capture, write, and say what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240, help="of training, 240 by default, as in the demo")
    steps = parser.parse_args(argv).steps

    corpus = load_corpus(SEQLEN)
    learner = Learner("entmax", Transformer(corpus.tokenizer.vocab_size, entmax_attend(ALPHA), head_dim=HEAD_DIM))
    for _ in track(train([learner], corpus, steps=steps, seqlen=SEQLEN), "training", total=steps):
        pass
    print(f"held-out loss: {held_out_loss(learner.model, corpus, seqlen=SEQLEN):.3f} nats per token")

    tokens, _ = corpus.held_out_windows(1, SEQLEN)
    layers = capture_qkv(learner.model, tokens)
    # Head i of layer i, [layers, seqlen, head_dim] each.
    q, k, v = (torch.stack([layer[part][0, i] for i, layer in enumerate(layers)]).half() for part in range(3))
    for i in range(len(layers)):
        own_q, own_k = q[None, i : i + 1].float(), k[None, i : i + 1].float()
        stats = adasplash2.support(own_q, own_k, alpha=ALPHA, is_causal=True)
        print(f"head {i} of layer {i}: support {stats.element_density:.2%} of the elements")
    CAPTURED.parent.mkdir(exist_ok=True)
    np.savez_compressed(CAPTURED, q=q.numpy(), k=k.numpy(), v=v.numpy())
    print(f"written: {CAPTURED}, {CAPTURED.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
