"""`hoist` over models of many kinds: exact op by op, and hoisting what it can."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from hoisting import SIZE, assert_exact
from jax import lax

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (SIZE, 4))
Y = jnp.arange(SIZE) / SIZE
IDS = jnp.arange(SIZE * 5).reshape(SIZE, 5) % 7
LABELS = jnp.arange(SIZE) % 3


def random(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape) / 2


def mlp():
    params = {f"layer_{i}": {"w": random(4, 4, seed=i), "b": random(4, seed=9)} for i in range(3)}

    def loss(params, x, y):
        for layer in params.values():
            x = jax.nn.gelu(x @ layer["w"] + layer["b"])
        return jnp.mean((x.sum(-1) - y) ** 2)

    return loss, ["layer_0", "layer_1"], params, (X, Y)


class ConvNet(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not self.train, name="norm")(x)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = nn.avg_pool(nn.Conv(6, (3, 3), strides=2, name="conv_1")(x), (2, 2))
        return nn.Dense(3, name="head")(x.reshape(len(x), -1))


def convolutions():
    images = random(SIZE, 8, 8, 2)
    variables = ConvNet().init(KEY, images)
    norm = {"norm": {"mean": random(4), "var": jnp.abs(random(4, seed=3))}}
    variables = {"params": variables["params"], "batch_stats": norm}

    def loss(variables, images, labels):
        logits = ConvNet().apply(variables, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    frozen = ["params/conv", "params/norm", "params/conv_1", "batch_stats"]
    return loss, frozen, variables, (images, LABELS)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, ids, mask, deterministic=True):
        x = nn.Embed(7, 4, name="embed")(ids) + nn.Embed(5, 4, name="place")(jnp.arange(5))
        hidden = nn.LayerNorm(name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(
            hidden, mask=mask[:, None, None, :]
        )
        x = nn.Dropout(0.5, deterministic=deterministic)(nn.Dense(4, name="layer")(x))
        return nn.Dense(1, name="head")(x.mean(1, where=mask[..., None]))[:, 0]


def transformer():
    mask = IDS != 3
    params = Transformer().init(KEY, IDS, mask)["params"]

    def loss(params, ids, mask, y, key):
        apply = Transformer().apply
        found = apply({"params": params}, ids, mask, False, rngs={"dropout": key})
        return jnp.mean((found - y) ** 2)

    frozen = ["embed", "place", "norm", "attention"]
    return loss, frozen, params, (IDS, mask, Y), (jax.random.key(7),), 4


def scan_over_layers():
    params = {"layers": {"w": random(3, 4, 4), "b": random(3, 4)}, "head": random(4)}

    def loss(params, x, y):
        def layer(x, weights):
            return jnp.tanh(x @ weights["w"] + weights["b"]), None

        x, _ = lax.scan(jax.checkpoint(layer), x, params["layers"])
        return jnp.mean((x @ params["head"] - y) ** 2)

    return loss, "layers", params, (X, Y)


def adapters_in_the_middle():
    lora = {"a": random(4, 2), "b": random(2, 4, seed=2)}
    params = {"w0": random(4, 4), "w1": random(4, 4, seed=1), "lora": lora, "w2": random(4)}

    def loss(params, x, y):
        x = jnp.tanh(x @ params["w0"])
        x = jnp.tanh(x @ params["w1"] + x @ params["lora"]["a"] @ params["lora"]["b"])
        return jnp.mean((x @ params["w2"] - y) ** 2)

    return loss, ["w0", "w1", "w2"], params, (X, Y)


def weight_tying():
    params = {"embed": random(7, 4), "mix": random(4, 4, seed=1), "head": random(4, 4, seed=2)}

    def loss(params, ids):
        x = jnp.tanh(params["embed"][ids[:, :-1]] @ params["mix"]) @ params["head"]
        logits = x @ params["embed"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    return loss, ["embed", "mix"], params, (IDS,)


def two_towers():
    params = {"image": random(4, 4), "scale": random(4), "text": random(4, 4, seed=1)}

    def loss(params, x, z):
        one = jnp.tanh(x @ params["image"]) * params["scale"]
        other = jnp.tanh(z @ params["text"])
        logits = one @ other.T  # each example with all others: the live part
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(len(x))).mean()

    return loss, ["image", "scale"], params, (X, X + 1)


def distillation():
    teacher = {"w": random(4, 8), "v": random(8, 3)}
    params = {"teacher": teacher, "student": random(4, 3, seed=4)}

    def loss(params, x):
        known = jax.nn.log_softmax(jax.nn.relu(x @ params["teacher"]["w"]) @ params["teacher"]["v"])
        known = lax.stop_gradient(known)
        found = jax.nn.log_softmax(x @ params["student"])
        return jnp.mean(jnp.sum(jnp.exp(known) * (known - found), -1))

    return loss, "teacher", params, (X,)


def reference_policy():
    params = {"reference": random(4, 3), "policy": random(4, 3, seed=1)}

    def of(weights, x, action):
        logits = jax.nn.log_softmax(jnp.tanh(x) @ weights)
        return jnp.take_along_axis(logits, action[:, None], 1)[:, 0]

    def loss(params, x, better, worse):
        gain = [
            of(params["policy"], x, action) - of(params["reference"], x, action)
            for action in (better, worse)
        ]
        return -jnp.mean(jax.nn.log_sigmoid(gain[0] - gain[1]))

    return loss, "reference", params, (X, LABELS, 2 - LABELS)


def int8_dequantised():
    quantised = jnp.arange(-8, 8, dtype=jnp.int8).reshape(4, 4)
    base = {"w": quantised, "scale": jnp.full(4, 0.1)}
    params = {"base": base, "adapter": random(4, 4), "head": random(4)}

    def loss(params, x, y):
        weights = params["base"]["w"].astype(jnp.float32) * params["base"]["scale"]
        x = jnp.tanh(x @ weights)
        return jnp.mean((jnp.tanh(x @ params["adapter"]) @ weights @ params["head"] - y) ** 2)

    return loss, "base", params, (X, Y)


def vision_transformer():
    params = {"class": random(1, 1, 4), "w": random(4, 4), "head": random(4)}

    def loss(params, patches, y):
        first = jnp.broadcast_to(params["class"], (len(patches), 1, 4))
        x = jnp.concatenate([first, patches], 1)
        x = jax.vmap(lambda x: jax.nn.softmax(x @ x.T) @ x @ params["w"])(x)
        return jnp.mean((x[:, 0] @ params["head"] - y) ** 2)

    return loss, ["class", "w"], params, (random(SIZE, 3, 4), Y)


def flattened_tokens():
    params = {"w": random(4, 4), "head": random(4)}

    def loss(params, x, y):
        tokens = jnp.tanh(x.reshape(-1, 4) @ params["w"])
        tokens = jax.nn.softmax(tokens).reshape(x.shape)
        return jnp.mean((tokens.transpose(1, 0, 2).mean(0) @ params["head"] - y) ** 2)

    return loss, "w", params, (random(SIZE, 3, 4), Y)


def one_by_one():
    params = {"w": random(4, 4), "head": random(4)}

    def loss(params, x, y):
        x = lax.map(lambda row: jnp.tanh(row @ params["w"]), x)
        x = lax.cond(params["w"].sum() > 0, jnp.sin, jnp.cos, x)
        x = lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ params["w"]), x)
        return jnp.mean((x @ params["head"] - y) ** 2)

    return loss, "w", params, (X, Y)


def user_derivatives():
    @jax.custom_vjp
    def clipped(x):
        return jnp.clip(x, -1, 1)

    clipped.defvjp(lambda x: (clipped(x), None), lambda _, g: (g * 3,))
    params = {"w": random(4, 4), "v": random(4, 4, seed=1), "head": random(4)}

    def loss(params, x, y):
        x = clipped(x @ params["w"])
        return jnp.mean((clipped(x @ params["v"]) @ params["head"] - y) ** 2)

    return loss, "w", params, (X, Y)


def trained_statistics_over_the_batch():
    params = {"w": random(4, 4), "v": random(4, 4, seed=1), "head": random(4)}

    def loss(params, x, y):
        x = jnp.tanh(x @ params["w"])
        x = (x - x.mean(0)) * lax.rsqrt(x.var(0) + 1e-5)
        return jnp.mean((jnp.tanh(x @ params["v"]) @ params["head"] - y) ** 2)

    return loss, ["w", "v"], params, (X, Y)


def bfloat16():
    params = {"w": random(4, 4), "head": random(4)}

    def loss(params, x, y):
        x = jax.nn.silu(x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16))
        return jnp.mean((x.astype(jnp.float32) @ params["head"] - y) ** 2)

    return loss, "w", params, (X, Y)


def nnx_split():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.encoder = nnx.Linear(4, 8, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.head = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x):
            return self.head(jax.nn.relu(self.norm(self.encoder(x))))[:, 0]

    graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    loss = lambda params, x, y: jnp.mean((nnx.merge(graph, params)(x) - y) ** 2)
    return loss, ["encoder", "norm"], params, (X, Y)


def equinox_module():
    model = eqx.nn.MLP(4, "scalar", 8, 2, key=KEY)
    loss = lambda model, x, y: jnp.mean((jax.vmap(model)(x) - y) ** 2)
    return loss, ["layers/0", "layers/1"], model, (X, Y)


def haiku_module():
    forward = lambda x: hk.Linear(1, name="head")(jnp.tanh(hk.Linear(8, name="base")(x)))[:, 0]
    model = hk.without_apply_rng(hk.transform(forward))
    loss = lambda params, x, y: jnp.mean((model.apply(params, x) - y) ** 2)
    return loss, "base", model.init(KEY, X), (X, Y)


ZOO = {
    # name: (model, the least share of the forward FLOPs that is hoisted, bytes an example)
    "mlp": (mlp, 0.6, 20),
    "convolutions": (convolutions, 0.95, 28),
    "transformer": (transformer, 0.4, 89),
    "scan": (scan_over_layers, 0.85, 20),
    "adapters": (adapters_in_the_middle, 0.5, 36),
    "tying": (weight_tying, 0.2, 84),
    "towers": (two_towers, 0.15, 32),
    "distillation": (distillation, 0.6, 28),
    "reference": (reference_policy, 0.3, 32),
    "int8": (int8_dequantised, 0.3, 20),
    "vision": (vision_transformer, 0.9, 20),
    "flattened": (flattened_tokens, 0.8, 20),
    "one by one": (one_by_one, 0.9, 20),
    "derivatives": (user_derivatives, 0.4, 20),
    "statistics": (trained_statistics_over_the_batch, 0.1, 20),
    "bfloat16": (bfloat16, 0.6, 12),
    "nnx": (nnx_split, 0.7, 36),
    "equinox": (equinox_module, 0.7, 36),
    "haiku": (haiku_module, 0.6, 36),
}


# Those that are tried at each run: unrolled, scanned, looked up, in pairs, of a framework.
OFTEN = {"transformer", "scan", "tying", "towers", "int8", "statistics", "nnx"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in OFTEN else [pytest.mark.exhaustive]) for name in ZOO],
)
def test_model_is_exact_and_keeps_the_least(name):
    make, share, size = ZOO[name]
    tolerance = 2e-2 if name == "bfloat16" else 2e-5
    report = assert_exact(*make(), tolerance=tolerance)
    assert report.share > share, str(report)
    assert report.bytes_per_example <= size, str(report)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "name", sorted(OFTEN | {"adapters", "derivatives", "one by one", "vision"})
)
def test_gradient_is_exact_op_by_op(name):
    make, *_ = ZOO[name]
    assert_exact(*make(), with_gradient=True, tolerance=2e-2)


def test_gradient_of_trained_layers_is_exact_op_by_op():
    assert_exact(*user_derivatives(), with_gradient=True)
