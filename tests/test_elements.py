"""A part of a leaf trains: what is said of elements, their bits, their state, their program."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import host_bits, host_devices
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import frozen_optax as fo

SPARSE = np.arange(24).reshape(8, 3) % 5 < 2


def make_params():
    return {
        "embed": jnp.arange(24.0).reshape(8, 3) / 10,
        "encoder": jnp.array([-0.0, 1e-45]),
        "head": jnp.ones((3, 2)),
    }


def loss(params, tokens):
    return jnp.sum((params["embed"][tokens] @ params["head"]) ** 2) + params["encoder"].sum()


TOKENS = jnp.array([1, 7])
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.1))


def with_elements(elements, optimizer=OPTIMIZER):
    return fo.with_frozen(optimizer, "encoder", elements={"embed": elements})


def mask_of(rows):
    return np.isin(np.arange(8), rows)


# --- what may be said

ROWS = {  # which rows are frozen, and how that may be said
    "a slice": (slice(0, 6), range(6)),
    "a slice from the end": (slice(-3, None), range(5, 8)),
    "a slice with a step": (slice(None, None, 2), range(0, 8, 2)),
    "indices": ([0, 2, 3], [0, 2, 3]),
    "indices from the end, one of them twice": (np.array([-1, 0, 0]), [0, 7]),
    "a range": (range(2, 4), range(2, 4)),
    "a mask of rows": (mask_of([1, 5]), [1, 5]),
    "a list of bools": ([True] + [False] * 7, [0]),
    "an array of jax": (jnp.arange(8) < 6, range(6)),
    "a mask of the whole shape": (np.repeat(mask_of([1, 5])[:, None], 3, 1), [1, 5]),
    "a function": (lambda leaf: slice(0, leaf.shape[0] - 2), range(6)),
    "a function that computes with jax": (lambda leaf: jnp.arange(leaf.shape[0]) < 6, range(6)),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "under jit"])
@pytest.mark.parametrize("said", ROWS)
def test_rows_are_frozen_as_said_and_the_others_have_state(said, compiled):
    elements, rows = ROWS[said]
    frozen = mask_of(list(rows))
    params, tx = make_params(), with_elements(elements)
    wrap = jax.jit if compiled else lambda function: function
    state = wrap(tx.init)(params)
    assert optax.tree_utils.tree_get(state, "mu")["embed"].shape == ((~frozen).sum(), 3)
    updates, _ = wrap(tx.update)(jax.tree.map(jnp.ones_like, params), state, params)
    found = np.asarray(updates["embed"])
    assert (found[frozen].view(np.uint32) == 0x80000000).all()  # -0.0
    assert (found[~frozen] != 0).all()


@pytest.mark.parametrize(
    ("mask", "shape"),
    [
        (SPARSE, (int((~SPARSE).sum()),)),
        (np.broadcast_to(np.arange(3) < 1, (8, 3)), (8, 2)),
        (np.pad(np.zeros((2, 2), bool), ((1, 5), (0, 1)), constant_values=True), (2, 2)),
    ],
    ids=["scattered", "columns", "a block"],
)
def test_what_trains_is_a_vector_or_a_block_of_the_same_rank(mask, shape):
    params, tx = make_params(), with_elements(mask)
    state = tx.init(params)
    assert optax.tree_utils.tree_get(state, "mu")["embed"].shape == shape
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    np.testing.assert_array_equal(np.asarray(updates["embed"]) == 0, mask)


def test_a_mask_of_some_leading_axes_leaves_the_others_whole():
    params = {"stack": jnp.ones((4, 3, 5)), "head": jnp.ones(2)}
    mask = np.arange(12).reshape(4, 3) % 2 == 0
    tx = fo.with_frozen(optax.adam(0.1), elements={"stack": mask})
    assert optax.tree_utils.tree_get(tx.init(params), "mu")["stack"].shape == (6, 5)


def test_a_key_may_select_many_leaves_and_none_is_frozen_whole():
    params = {"blocks": {"w": jnp.ones((6, 2, 2)), "b": jnp.ones((6, 2))}, "head": jnp.ones(2)}
    tx = fo.with_frozen(optax.adam(0.1), elements={"blocks": slice(0, 4)})  # the last two of six
    mu = optax.tree_utils.tree_get(tx.init(params), "mu")
    assert jax.tree.map(jnp.shape, mu) == {
        "blocks": {"w": (2, 2, 2), "b": (2, 2)},
        "head": (2,),
    }
    assert tx.frozen.paths(params) == []


def test_a_mask_is_read_when_it_is_said():
    mask = mask_of(range(6))
    tx = with_elements(mask)
    mask[:] = True
    assert optax.tree_utils.tree_get(tx.init(make_params()), "mu")["embed"].shape == (2, 3)


REFUSED = {
    "a mask of another shape": (mask_of([1])[:7], r"'embed': the mask has the shape \(7,\)"),
    "a mask of another full shape": (SPARSE.T, r"'embed': the mask has the shape \(3, 8\)"),
    "a mask of everything": (np.ones(8, bool), r"'embed': .* freezes every element"),
    "a mask of nothing": (np.zeros(8, bool), r"'embed': .* freezes no element"),
    "a slice of everything": (slice(None), r"'embed': .* freezes every element"),
    "a slice of nothing": (slice(8, None), r"'embed': .* freezes no element"),
    "a slice out of range": (slice(0, 9), r"'embed': the index 9 is out of range"),
    "an index out of range": ([3, 8], r"'embed': the index 8 is out of range"),
    "an index before the first": ([-9], r"'embed': the index -9 is out of range"),
    "no index": ([], "'embed': found no indices"),
    "indices of two axes": ([[1, 2]], r"'embed': .*found an array of the shape \(1, 2\)"),
    "a bool": (True, "'embed': found True.*goes in frozen="),
    "a word": ("rows", "'embed': found 'rows', expected a boolean array"),
    "numbers": (np.ones(8), r"'embed': found a leaf float64\[8\]"),
    "a function of these": (lambda leaf: slice(0, 9), "'embed': the index 9 is out of range"),
    "a slice of words": (slice("a", "b"), "'embed': slice.* is no slice of integers"),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_makes_no_sense_is_refused_by_path(said):
    elements, message = REFUSED[said]
    with pytest.raises((ValueError, TypeError), match=message):
        with_elements(elements).init(make_params())


MAPPINGS = {
    "a leaf that is frozen as a whole": ({"encoder": [0]}, "'encoder' is frozen as a whole"),
    "a leaf named twice": ({"embed": [0], "emb*": [1]}, "'embed' are named twice.*'emb\\*'"),
    "no such leaf": ({"embedding": [0]}, "'embedding'.* selects nothing.*nearest.*'embed'"),
    "nothing": ({}, "freezes nothing"),
    "no mapping": ([0], "elements= is a mapping"),
}


@pytest.mark.parametrize("said", MAPPINGS)
def test_keys_that_make_no_sense_are_refused(said):
    elements, message = MAPPINGS[said]
    with pytest.raises((ValueError, TypeError), match=message):
        fo.with_frozen(optax.adam(0.1), "encoder", elements=elements).init(make_params())


def test_a_scalar_and_what_is_no_array_have_no_elements():
    for leaf, message in ((jnp.ones(()), "'x': it is a scalar"), (3.0, "'x': it is a scalar")):
        with pytest.raises(ValueError, match=message):
            fo.with_frozen(optax.sgd(0.1), elements={"x": [0]}).init({"x": leaf, "y": jnp.ones(2)})


def test_a_traced_mask_is_refused():
    def init(mask):
        return with_elements(mask).init(make_params())

    with pytest.raises(
        TypeError, match=r"'embed' are .* traced.*cannot depend on what it computes"
    ):
        jax.jit(init)(jnp.arange(8) < 6)


def test_trainable_names_leaves_that_train_in_part():
    params = make_params()
    elements = {"embed": slice(0, 6)}
    tx = fo.with_frozen(OPTIMIZER, trainable=["embed", "head"], elements=elements)
    assert tx.frozen.paths(params) == ["encoder"]
    with pytest.raises(ValueError, match=r"'embed' is frozen as a whole.*beside trainable="):
        fo.with_frozen(OPTIMIZER, trainable="head", elements=elements).init(params)
    again = fo.with_frozen(optax.sgd(0.1), tx)  # what is frozen is said once, elements and all
    fo.assert_frozen(params, params, again, expect_movement=False)
    with pytest.raises(TypeError, match="has elements of its own"):
        fo.with_frozen(optax.sgd(0.1), tx, elements=elements)


# --- bits

DTYPES = ["float32", "float16", "bfloat16", "complex64", "float8_e5m2", "float8_e4m3fn"]
DTYPES += ["float8_e4m3fnuz"]


def patterns(dtype, shape):
    """Bit patterns of every kind."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.random.default_rng(0).integers(0, 256, count, np.uint8)


@pytest.mark.parametrize("frozen", [mask_of(range(6)), SPARSE], ids=["rows", "scattered"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_elements_keep_every_bit_of_every_dtype(dtype, frozen):
    dtype = jnp.dtype(dtype)
    raw = patterns(dtype, (8, 3)).view(dtype).reshape(8, 3).copy()
    mask = np.broadcast_to(frozen.reshape(8, -1), (8, 3))
    raw[~mask] = 1
    params = {"embed": jnp.asarray(raw), "head": jnp.ones(2)}
    tx = fo.with_frozen(optax.sgd(0.5), elements={"embed": frozen})
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)

    def step(params):
        updates, _ = tx.update(grads, state, params)
        return fo.apply_updates(params, updates)

    def in_place(params):
        updates, _ = tx.update(grads, state, params)
        return fo.apply_updates(params, updates, tx)

    apart = fo.apply_updates(params, jax.jit(tx.update)(grads, state, params)[0])
    alike = step(params), in_place(params)
    fo.assert_trees_bit_identical(*alike)
    for after in (*alike, jax.jit(step)(params), jax.jit(in_place)(params), apart):
        assert after["embed"].dtype == dtype
        kept = lambda leaf: np.asarray(leaf)[mask].view(np.uint8)
        np.testing.assert_array_equal(kept(after["embed"]), kept(raw))
        assert not np.array_equal(np.asarray(after["embed"])[~mask], raw[~mask])
        fo.assert_frozen(params, after, tx)


def test_optax_adds_nothing_to_frozen_elements_in_one_program():
    params = make_params() | {"embed": make_params()["embed"].at[0].set(-0.0)}
    tx = with_elements(slice(0, 6))

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params, TOKENS)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    after, _ = step(params, tx.init(params))
    fo.assert_frozen(params, after, tx)


# --- in the tools


def test_a_step_under_jit_takes_such_a_leaf_whole():
    params, tx = make_params(), with_elements(slice(0, 6))

    @fo.jit(frozen=tx, donate_argnums=(0, 1))
    def step(params, state, tokens):
        grads = fo.grad(loss, tx)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates), state

    first, encoder = jax.tree.map(jnp.copy, params), params["encoder"]
    after, state = step(params, tx.init(params), TOKENS)
    assert after["encoder"] is encoder
    after, state = step(after, state, TOKENS)
    fo.assert_frozen(first, after, tx)
    assert (after["embed"][6:] != first["embed"][6:]).all()


@pytest.mark.parametrize("holes", [False, True])
def test_the_gradient_of_a_frozen_element_is_zero(holes):
    params, tx = make_params(), with_elements(SPARSE)
    grads = fo.grad(loss, tx, holes=holes)(params, TOKENS)
    expected = jax.grad(loss)(params, TOKENS)["embed"]
    np.testing.assert_array_equal(grads["embed"], jnp.where(SPARSE, 0, expected))
    value, again = fo.value_and_grad(loss, tx)(params, TOKENS)
    assert value == loss(params, TOKENS)
    np.testing.assert_array_equal(again["embed"], grads["embed"])


def test_assert_frozen_names_the_element_that_moved():
    params, tx = make_params(), with_elements(slice(0, 6))
    trained = params | {"embed": params["embed"].at[6].add(1)}
    fo.assert_frozen(params, trained, tx)
    moved = params | {"embed": trained["embed"].at[2, 1].set(-5.0)}
    with pytest.raises(AssertionError, match=r"embed: 1 of 24 .*first at \[2, 1\]: .*became -5.0"):
        fo.assert_frozen(params, moved, tx)
    with pytest.raises(AssertionError, match="no trainable leaf moved"):
        fo.assert_frozen(params, params, tx)
    with pytest.raises(AssertionError, match=r"embed: .*float32\[8, 3\] became"):
        fo.assert_frozen(params, params | {"embed": params["embed"].astype("bfloat16")}, tx)
    on_host = jax.tree.map(np.asarray, (params, moved))
    with pytest.raises(AssertionError, match=r"embed: 1 of 24 "):
        fo.assert_frozen(*on_host, tx)
    where = lambda state: state["params"]
    fo.assert_frozen({"params": params, "n": 1}, {"params": trained, "n": 2}, tx, where=where)
    with pytest.raises(AssertionError, match=r"embed: 1 of 24 "):
        fo.assert_frozen({"params": params}, {"params": moved}, tx, where=where)


def test_assert_frozen_of_elements_works_inside_jit():
    params, tx = make_params(), with_elements(SPARSE)
    check = chex.chexify(
        jax.jit(lambda before, after: fo.assert_frozen(before, after, tx)), async_check=False
    )
    at = tuple(np.argwhere(~SPARSE)[0]), tuple(np.argwhere(SPARSE)[0])
    check(params, params | {"embed": params["embed"].at[at[0]].add(1)})
    with pytest.raises(AssertionError, match="embed"):
        check(params, params | {"embed": params["embed"].at[at[1]].add(1)})


def test_a_fingerprint_is_of_the_frozen_elements():
    params, tx = make_params(), with_elements(slice(0, 6))
    found = fo.fingerprint(params, tx)
    assert list(found) == ["embed", "encoder"]
    assert re.fullmatch(r"float32\[8,3\]@[0-9a-f]{16} [0-9a-f]{16}", found["embed"])
    assert found == fo.fingerprint(jax.tree.map(np.asarray, params), tx)
    trained = params | {"embed": params["embed"].at[6].add(1)}
    moved = params | {"embed": params["embed"].at[5].add(1)}
    assert found == fo.fingerprint(trained, tx)
    fo.assert_fingerprint(trained, found, frozen=tx)
    with pytest.raises(AssertionError, match=r"embed: float32\[8,3\]@\S+ \S+ became"):
        fo.assert_fingerprint(moved, found, frozen=tx)
    with pytest.raises(ValueError, match=r"'embed' is of some of its elements\. .*frozen=tx"):
        fo.assert_fingerprint(trained, found)
    other = with_elements(slice(0, 5))
    with pytest.raises(ValueError, match="'embed' is of some of its elements, and not of those"):
        fo.assert_fingerprint(trained, found, frozen=other)
    check = fo.watch_fingerprint(found, every=1, frozen=tx)
    check(trained)
    check(moved)
    with pytest.raises(AssertionError, match=r"at call 2: (?s:.*)embed"):
        check.finish()


def test_restore_puts_back_the_frozen_elements():
    params, tx = make_params(), with_elements(SPARSE)
    params["embed"] = params["embed"].at[0].set(jnp.array([-0.0, 1e-45, jnp.nan]))
    drifted = jax.tree.map(lambda leaf: leaf * 3 + 1, params)
    restore = lambda drifted, params: fo.restore(drifted, params, tx)
    for restored in (restore(drifted, params), jax.jit(restore)(drifted, params)):
        fo.assert_frozen(params, restored, tx)
        np.testing.assert_array_equal(restored["embed"][~SPARSE], drifted["embed"][~SPARSE])
        assert isinstance(restored["embed"], jax.Array)


def test_an_update_of_what_is_said_to_be_frozen_is_refused():
    params = {"embed": jnp.ones((8, 3)), "encoder": jnp.ones(2), "head": jnp.ones((3, 2))}
    tx = fo.with_frozen(optax.sgd(0.5), "encoder", elements={"embed": slice(0, 6)})
    ours = tx.update(params, tx.init(params), params)[0]
    others = jax.tree.map(jnp.ones_like, params)
    moved = fo.apply_updates(params, ours, tx)
    fo.assert_frozen(params, moved, tx)
    for name, words in (("encoder", "is frozen"), ("embed", "has frozen elements")):
        updates = ours | {name: others[name]}
        with pytest.raises(ValueError, match=f"'{name}' {words}, and its update there is not zero"):
            fo.apply_updates(params, updates, tx)
        for number in (1, -0.5, True, 2**40, float("nan")):  # of Python's: at hand as well
            with pytest.raises(ValueError, match=f"'{name}' {words}"):
                fo.apply_updates(params, ours | {name: number}, tx)
    with pytest.raises(ValueError, match="'encoder' is frozen, and its update there is not zero"):
        fo.apply_updates(params, others, trainable=["embed", "head"])
    # Of elements that train it may be anything; and under a trace what moves is not hidden.
    trained = ours | {"embed": ours["embed"].at[6:].set(7.0)}
    assert float(fo.apply_updates(params, trained, tx)["embed"][7, 0]) == 8.0
    step = lambda params: fo.apply_updates(params, ours | {"encoder": params["encoder"]}, tx)
    assert jax.jit(step)(params)["encoder"].tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="encoder"):
        fo.jit(step, frozen=tx)(params)


def test_a_summary_of_elements_alone():
    params = {"embed": jnp.ones((8, 3)), "head": jnp.ones((3, 2))}
    tx = fo.with_frozen(optax.adam(1e-3), elements={"embed": slice(0, 6)})
    for optimizer in (tx, optax.adam(1e-3)):
        report = fo.summary(params, tx, optimizer)
        assert report.frozen.parameters == 18
        assert report.memory.optimizer_state == 2 * 4 * (6 + 6) + 4
        assert report.memory_without_freezing.optimizer_state == 2 * 4 * (24 + 6) + 4


def test_a_summary_counts_elements():
    params, tx = make_params(), with_elements(slice(0, 6))
    report = fo.summary(params, tx, optax.adam(1e-3))
    rows = [(row.path, row.shape, row.frozen, row.parameters) for row in report.rows]
    assert rows == [
        ("embed", (6, 3), True, 18),
        ("embed", (2, 3), False, 6),
        ("encoder", (2,), True, 2),
        ("head", (3, 2), False, 6),
    ]
    assert report.trained.parameters == 12
    assert report.memory.optimizer_state == 2 * 4 * 12 + 4
    assert report.memory.gradients == 4 * (24 + 6)  # jax makes that of a leaf whole
    mesh = Mesh(np.array(host_devices(8)), "x")
    split = jax.device_put(params["embed"], NamedSharding(mesh, PartitionSpec("x")))
    sharded = fo.summary(params | {"embed": split}, tx, optax.adam(1e-3))
    assert sharded.memory_per_device.optimizer_state == 2 * 4 * 12 + 4
    assert sharded.memory_per_device.parameters == 4 * (3 + 2 + 6)


KNOWS_WHOLE_LEAVES = {
    "freeze": lambda tx: fo.freeze(tx),
    "partition": lambda tx: fo.partition(make_params(), tx),
    "nnx_filter": lambda tx: fo.nnx_filter(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tx),
    "stages": lambda tx: fo.stages({tx: 0}),
    "assert_update_freezes": lambda tx: fo.assert_update_freezes(tx, make_params(), tx),
    "assert_step_freezes": lambda tx: fo.assert_step_freezes(
        lambda params: params, make_params(), frozen=tx
    ),
}


@pytest.mark.parametrize("room", KNOWS_WHOLE_LEAVES)
def test_what_knows_whole_leaves_refuses_elements(room):
    with pytest.raises(TypeError, match=r"freezes elements within leaves, {'embed': slice.*tx\.fr"):
        KNOWS_WHOLE_LEAVES[room](with_elements(slice(0, 6)))


def test_whole_leaves_beside_elements_are_proved():
    tx = with_elements(slice(0, 6))
    found = fo.assert_update_freezes(tx, make_params(), tx.frozen)
    assert found == {"encoder": "a constant -0.0"}


def test_a_checkpoint_holds_such_a_leaf_whole(tmp_path):
    params, tx = make_params(), with_elements(slice(0, 6))
    fo.save_trained(tmp_path / "saved", params, tx)
    empty = params | {"embed": jnp.zeros((8, 3)), "head": jnp.zeros((3, 2))}
    loaded = fo.load_trained(tmp_path / "saved", empty)
    fo.assert_trees_bit_identical(loaded, params)
    assert host_bits(loaded["embed"]).tolist() == host_bits(params["embed"]).tolist()
