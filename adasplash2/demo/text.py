"""Real text that every machine has: the source code of Python's standard library, and a small tokenizer for it."""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Corpus", "Tokenizer", "load_corpus"]

# A line break with the indentation after it; letters, or signs, with the space before them; any other byte.
_PIECE = re.compile(rb"\n *| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|.", re.DOTALL)


class Tokenizer:
    """The 256 bytes, and the most frequent words, signs and indentations of a text.

    A piece of text outside the vocabulary is spelled by the longest tokens that fit, in the end by bytes, so every
    text can be encoded.
    """

    def __init__(self, text: bytes, vocab_size: int = 2048) -> None:
        """Builds the vocabulary.

        Args:
            text: what the frequencies are counted on.
            vocab_size: number of tokens, at least 256. A short text may give fewer.
        """
        if vocab_size < 256:
            raise ValueError(f"vocab_size={vocab_size}: expected at least 256, one token for each byte")
        counts = Counter(piece for piece in _PIECE.findall(text) if len(piece) > 1)
        self.pieces = [bytes([byte]) for byte in range(256)]
        self.pieces += [piece for piece, _ in counts.most_common(vocab_size - 256)]
        self._ids = {piece: token for token, piece in enumerate(self.pieces)}
        self._spelling: dict[bytes, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.pieces)

    def encode(self, text: bytes) -> Tensor:
        """The tokens of a text: (n,) int64."""
        return torch.tensor([token for piece in _PIECE.findall(text) for token in self._spell(piece)])

    def _spell(self, piece: bytes) -> list[int]:
        if piece not in self._spelling:
            end = next(end for end in range(len(piece), 0, -1) if piece[:end] in self._ids)
            rest = self._spell(piece[end:]) if end < len(piece) else []
            self._spelling[piece] = [self._ids[piece[:end]], *rest]
        return self._spelling[piece]

    def decode(self, tokens: Tensor) -> bytes:
        """The text that (n,) tokens stand for."""
        return b"".join(self.pieces[token] for token in tokens.tolist())

    def label(self, token: int) -> str:
        """A token as a short printable label: a space is drawn as a dot, a line break as an arrow."""
        text = self.pieces[token].decode("latin-1")
        if text.startswith("\n"):
            return f"↵{len(text) - 1 or ''}"
        return text.replace(" ", "·") if text.replace(" ", "").isprintable() else repr(text)[1:-1]


@dataclass(frozen=True)
class Corpus:
    """Text split by file into a part to train on and a part that no model sees.

    Attributes:
        tokenizer: built from the training text.
        train: (n_train,) int64 tokens.
        held_out: (n_held_out,) int64 tokens.
    """

    tokenizer: Tokenizer
    train: Tensor
    held_out: Tensor

    def batch(self, batch: int, seqlen: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random windows of the training text.

        Returns:
            Inputs and targets, each (batch, seqlen) int64; a target is the token after its input.
        """
        starts = torch.randint(len(self.train) - seqlen, (batch, 1), generator=generator)
        window = self.train[starts + torch.arange(seqlen + 1)]
        return window[:, :-1], window[:, 1:]

    def held_out_windows(self, count: int, seqlen: int) -> tuple[Tensor, Tensor]:
        """Windows spread evenly over the held-out text, the same at every call; shapes as ``batch``."""
        starts = torch.linspace(0, len(self.held_out) - seqlen - 1, count).long()[:, None]
        window = self.held_out[starts + torch.arange(seqlen + 1)]
        return window[:, :-1], window[:, 1:]


def load_corpus(seqlen: int, vocab_size: int = 2048, folder: Path | None = None) -> Corpus:
    """Reads and encodes the modules at the top of a folder; every tenth file is held out.

    Args:
        seqlen: longest window that will be asked for, in tokens.
        vocab_size: number of tokens of the tokenizer.
        folder: where the ``*.py`` files are; Python's standard library by default.

    Raises:
        RuntimeError: the folder holds too little text for windows of ``seqlen`` tokens.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    files = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    train = b"".join(text for i, text in enumerate(files) if i % 10 != 9)
    held_out = b"".join(files[9::10])
    tokenizer = Tokenizer(train, vocab_size)
    corpus = Corpus(tokenizer, tokenizer.encode(train), tokenizer.encode(held_out))
    shortest = min(len(corpus.train), len(corpus.held_out))
    if shortest <= seqlen:
        raise RuntimeError(
            f"{folder} holds {len(files)} Python files, whose shorter part has {shortest} tokens; "
            f"windows of seqlen {seqlen} need more text"
        )
    return corpus
