"""Each framework's published example, changed by the diff that the docs show, and trained.

What is run is the file as it was published, of the release that goes with what is installed, the
oldest supported or the newest. Only sizes are set from here, and what reads a data set is stood in
for; the loop is the example's own.
"""

import importlib.metadata
import re
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
import stand_ins
import trying
from absl import flags
from flax import nnx
from held import assert_held
from published import DIFFS, Release, apply, blocks, read_diff, run_as, unpack

import frozen_optax as fo

# Those about this library are errors, and other people's own are not.
pytestmark = pytest.mark.filterwarnings("ignore", "error:::frozen_optax")

RELEASES = {
    "flax": [
        ("0.11.0", "4b03b7938b5e1f8c5843f59af41116e9184f98e10ce61a8d33b5dd7d2ba91edd"),
        ("0.12.12", "103cc503c94219513b73027aa0e93aac408adfd3fcdfb1df85e9d147219e4896"),
    ],
    "dm-haiku": [
        ("0.0.14", "0c1d56ef20e1e04d8551f788ff8964167092c5d8051b7c17ed3f9ce60c0b0a59"),
        ("0.0.17", "6daa56f3b54f43675713ef7525d1dec7327f2512b57cc2b12104f76f6d7cf581"),
    ],
    "equinox": [
        ("0.13.0", "d59615be722373e9d66e0ba78462964e6357fb76a8b1b98c2c6027961b778a69"),
        ("0.13.8", "dd075050018e2dd02e252e9d29d3060f7e67f085622d8d27a8e89e24bb8523db"),
    ],
    # The last release whose source distribution has examples.
    "optax": [("0.1.5", "0aa379b56f51dbd525562f5ee6805a180a2616f3e9fe8080582352bcbb520f2e")],
}


def numbers(version):
    return [int(number) for number in version.split(".")[:3]]


def release_of(package):
    """The newest that is pinned and not newer than what is installed."""
    installed = numbers(importlib.metadata.version(package))
    version, sha256 = [pin for pin in RELEASES[package] if numbers(pin[0]) <= installed][-1]
    return Release(package, version, sha256)


def published(release, room, *, changed_by):
    """The path of a file of the release that a diff has changed."""
    path, hunks = read_diff(changed_by)
    file = unpack(release, path, room)
    of = re.match(r"Of (\S+) (\S+)[.,;]", (DIFFS / changed_by).read_text()).groups()
    file.write_text(
        apply(hunks, file.read_text(), at_their_lines=of == (release.name, release.version))
    )
    return file


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A folder for an example, which leaves no module and no flag behind, and finds 32 bits."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    modules, defined = set(sys.modules), set(flags.FLAGS)
    with trying.precision(x64=False):  # netket, in a test before, turns on 64 by being imported
        yield tmp_path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    for name in set(flags.FLAGS) - defined:
        delattr(flags.FLAGS, name)


@pytest.fixture
def stand_in(monkeypatch):
    def put(modules):
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)

    return put


def test_linen_trains_a_decoder_on_a_frozen_encoder(room, monkeypatch, stand_in):
    file = published(release_of("flax"), room, changed_by="linen.diff")
    stand_in(stand_ins.clu())
    monkeypatch.syspath_prepend(file.parent)
    train = run_as("seq2seq", file)
    sizes = {"hidden_size": 8, "batch_size": 4, "num_train_steps": 4}
    flags.FLAGS(["train.py", *(f"--{name}={size}" for name, size in sizes.items())])
    table = train.CTable("0123456789+= ", train.FLAGS.max_len_query_digit)
    before = train.get_train_state(jax.random.key(0), table).params
    state = train.train_and_evaluate(str(room))
    assert state.step == 4
    frozen = state.tx.frozen.paths(before)
    assert frozen
    assert all(path.startswith("LSTMCell_0/") for path in frozen)
    assert_held(before, state.params, state.tx, frozen=frozen)


def test_nnx_trains_dense_layers_on_frozen_convolutions(room, stand_in):
    release = release_of("flax")  # the tutorial has been rewritten since the oldest
    diff, modules = {
        "0.11.0": ("nnx_0.11.diff", stand_ins.tensorflow()),
        "0.12.12": ("nnx.diff", stand_ins.hugging_face()),
    }[release.version]
    stand_in(modules)
    file = published(release, room, changed_by=diff)
    names = {"__name__": "mnist_tutorial"}
    cells = iter(blocks(file.read_text(), "{code-cell} ipython3"))
    params = lambda: jax.device_get(nnx.to_pure_dict(nnx.state(names["model"], nnx.Param)))
    for cell in cells:
        trains = "\n  train_step(" in cell
        if trains:
            before = params()
            names |= {"train_steps": 2, "eval_every": 1}
        exec(compile(cell, file.name, "exec"), names)
        if trains:
            break
    assert names["optimizer"].step[...] == 2
    frozen = [path for path in names["tx"].frozen.paths(before) if "linear" not in path]
    assert {path.partition("/")[0] for path in frozen} >= {"conv1", "conv2"}
    assert_held(before, params(), names["tx"], frozen=frozen)


def test_haiku_trains_the_head_and_norms_of_a_transformer(room, monkeypatch):
    file = published(release_of("dm-haiku"), room, changed_by="haiku.diff")
    monkeypatch.syspath_prepend(file.parents[2])
    train = run_as("transformer", file)
    text = room / "text.txt"
    text.write_text("To freeze, or not to freeze: that is the question. " * 20)
    flags.FLAGS(["train.py", f"--dataset_path={text}"])
    sizes = {"MAX_STEPS": 3, "NUM_LAYERS": 1, "MODEL_SIZE": 16, "NUM_HEADS": 2, "KEY_SIZE": 8}
    for name, size in {**sizes, "SEQUENCE_LENGTH": 16, "LOG_EVERY": 1}.items():
        monkeypatch.setattr(train, name, size)
    states, update = [], train.update

    def recorded(state, data):
        states.append(state)
        after, metrics = update(state, data)
        states.append(after)
        return after, metrics

    monkeypatch.setattr(train, "update", recorded)
    train.main(None)
    before, after = states[0], states[-1]
    assert after.step == 3
    tx = train.optimiser()
    frozen = tx.frozen.paths(before.params)
    moved = {path for path in fo.by_path("**").paths(before.params) if path not in frozen}
    assert {path.split("/")[-2] for path in moved} >= {"linear", "layer_norm", "layer_norm_1"}
    assert "language_model/embed/embeddings" in frozen
    assert_held(before.params, after.params, tx, frozen=frozen)
    for path in frozen:  # the very arrays: no step has copied them
        module, _, name = path.rpartition("/")
        assert after.params[module][name] is before.params[module][name]


def test_optax_trains_what_follows_a_frozen_layer(room, monkeypatch, stand_in):
    stand_in(stand_ins.datasets_of_optax())
    mnist = run_as("mnist", published(release_of("optax"), room, changed_by="optax.diff"))
    for name, size in {"DEFAULT_HIDDEN_SIZES": (8, 8), "BATCH_SIZE": 32, "N_EPOCHS": 2}.items():
        monkeypatch.setattr(mnist, name, size)
    seen, build_model, model_accuracy = {}, mnist.build_model, mnist.model_accuracy

    def build(layers):
        seen["init"], apply_fn = build_model(layers)
        return seen["init"], apply_fn

    def accuracy(model, dataset):
        (seen["after"],) = model.args
        return model_accuracy(model, dataset)

    train_on_mnist = mnist.train_on_mnist

    def train(optimizer, sizes):
        seen["tx"] = optimizer
        return train_on_mnist(optimizer, sizes)

    monkeypatch.setattr(mnist, "build_model", build)
    monkeypatch.setattr(mnist, "model_accuracy", accuracy)
    monkeypatch.setattr(mnist, "train_on_mnist", train)
    assert 0 <= mnist.main(None) <= 1
    before = seen["init"](jax.random.PRNGKey(mnist.SEED), jnp.zeros((1, 28, 28, 1)))
    frozen = ["mlp/~/linear_0/b", "mlp/~/linear_0/w"]
    assert_held(before, seen["after"], seen["tx"], frozen=frozen)


def test_equinox_trains_a_bias_beside_a_frozen_weight(room):
    file = published(release_of("equinox"), room, changed_by="equinox.diff")
    names = {"__name__": "readme"}
    for block in blocks(file.read_text(), "python"):
        exec(compile(block, file.name, "exec"), names)
    key = jax.random.PRNGKey(0)
    before = names["Linear"](names["in_size"], names["out_size"], key=key)
    assert np.asarray(names["opt_state"][0].count) == 3
    assert_held(before, names["model"], names["tx"], frozen=["weight"])
