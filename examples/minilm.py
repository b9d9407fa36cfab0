"""all-MiniLM-L6-v2 in Flax: a sentence encoder of 22.6 million weights.

A BERT of 6 layers, width 384 and 12 heads, whose last layer is averaged over the tokens and scaled
to length one (Wang et al. 2020, https://arxiv.org/abs/2002.10957, and Reimers & Gurevych 2019,
https://arxiv.org/abs/1908.10084; weights under Apache-2.0). `make_reference.py` holds it against
the implementation that its authors publish.
"""

from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers
import wheels

_LAYERS = 6
WIDTH = 384
_HEADS = 12
_HIDDEN = 1536
_VOCABULARY = 30522
_POSITIONS = 512


def _layer_norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, name=name)


class _Embeddings(nn.Module):
    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        word = nn.Embed(_VOCABULARY, WIDTH, name="word")(ids)
        position = nn.Embed(_POSITIONS, WIDTH, name="position")(jnp.arange(ids.shape[1]))
        token_type = nn.Embed(2, WIDTH, name="token_type")(jnp.zeros_like(ids))
        return _layer_norm("norm")(word + position + token_type)


class _Attention(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        heads = (*x.shape[:2], _HEADS, WIDTH // _HEADS)
        query, key, value = (
            nn.Dense(WIDTH, name=name)(x).reshape(heads) for name in ("query", "key", "value")
        )
        attended = nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        return nn.Dense(WIDTH, name="output")(attended.reshape(x.shape))


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = _layer_norm("attention_norm")(x + _Attention(name="attention")(x, mask))
        hidden = nn.gelu(nn.Dense(_HIDDEN, name="mlp_in")(x), approximate=False)
        return _layer_norm("mlp_norm")(x + nn.Dense(WIDTH, name="mlp_out")(hidden))


class MiniLM(nn.Module):
    """The encoder: tokens in, one vector of length one per text out. It has no dropout."""

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Embeds a batch of texts.

        Args:
          ids: Token ids, an integer array of shape (texts, tokens).
          mask: True where a token belongs to its text, False at the padding; same shape. Each
            text has one token at least.

        Returns:
          Unit vectors, float32 of shape (texts, 384).
        """
        x = _Embeddings(name="embeddings")(ids)
        for i in range(_LAYERS):
            x = _Layer(name=f"layer_{i}")(x, mask)
        mean = jnp.mean(x, axis=1, where=mask[..., None])
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def load_params(wheel: Path) -> dict:
    """The pretrained parameters of `MiniLM`, read from the wheel at `wheel`.

    Returns:
      The tree that `MiniLM().init` has under "params", each leaf a float32 `jax.Array`. BERT's
      pooler is left out: no sentence embedding depends on it.
    """
    weights = safetensors.numpy.load(wheels.read(wheel, f"{wheels.MINILM_DIR}/model.safetensors"))

    def embed(name: str) -> dict:
        return {"embedding": jnp.asarray(weights[f"{name}.weight"])}

    def dense(name: str) -> dict:
        # PyTorch stores a linear map as (out, in), Flax as (in, out).
        kernel = jnp.asarray(weights[f"{name}.weight"].T)
        return {"kernel": kernel, "bias": jnp.asarray(weights[f"{name}.bias"])}

    def norm(name: str) -> dict:
        scale = jnp.asarray(weights[f"{name}.weight"])
        return {"scale": scale, "bias": jnp.asarray(weights[f"{name}.bias"])}

    def layer(name: str) -> dict:
        return {
            "attention": {
                "query": dense(f"{name}.attention.self.query"),
                "key": dense(f"{name}.attention.self.key"),
                "value": dense(f"{name}.attention.self.value"),
                "output": dense(f"{name}.attention.output.dense"),
            },
            "attention_norm": norm(f"{name}.attention.output.LayerNorm"),
            "mlp_in": dense(f"{name}.intermediate.dense"),
            "mlp_out": dense(f"{name}.output.dense"),
            "mlp_norm": norm(f"{name}.output.LayerNorm"),
        }

    embeddings = {
        "word": embed("embeddings.word_embeddings"),
        "position": embed("embeddings.position_embeddings"),
        "token_type": embed("embeddings.token_type_embeddings"),
        "norm": norm("embeddings.LayerNorm"),
    }
    layers = {f"layer_{i}": layer(f"encoder.layer.{i}") for i in range(_LAYERS)}
    return {"embeddings": embeddings, **layers}


def load_tokenizer(wheel: Path, length: int) -> tokenizers.Tokenizer:
    """The model's own tokenizer, read from the wheel at `wheel`, for texts of `length` tokens.

    Raises:
      ValueError: `length` is not between 3 and 512, the marks of start and end included.
    """
    if not 3 <= length <= _POSITIONS:
        raise ValueError(f"length must be between 3 and {_POSITIONS} tokens, got {length}.")
    tokenizer = tokenizers.Tokenizer.from_buffer(
        wheels.read(wheel, f"{wheels.MINILM_DIR}/tokenizer.json")
    )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return tokenizer


def tokenize(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask of `texts`, each padded or cut to the tokenizer's length.

    Returns:
      `ids`, int32 of shape (texts, length), and `mask`, bool of the same shape, as `MiniLM`
      takes them.
    """
    encodings = tokenizer.encode_batch(list(texts))
    ids = np.array([encoding.ids for encoding in encodings], np.int32)
    return ids, np.array([encoding.attention_mask for encoding in encodings], bool)
