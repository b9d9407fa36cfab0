"""`hoist`: what a caller meets, and what is refused, by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hoisting import same_bits
from jax import lax

import frozen_optax as fo

X = jax.random.normal(jax.random.key(0), (6, 4))
Y = jnp.arange(6) / 6
PARAMS = {
    "encoder": {"w": jax.random.normal(jax.random.key(1), (4, 3)), "b": jnp.full(3, 0.1)},
    "head": jnp.array([1.0, -2.0, 0.5]),
}


def features(params, x):
    return jnp.tanh(x @ params["encoder"]["w"] + params["encoder"]["b"])


def loss(params, x, y):
    return jnp.mean((features(params, x) @ params["head"] - y) ** 2)


def noisy(params, x, y, key):
    hidden = features(params, x)
    hidden = hidden * jax.random.bernoulli(key, 0.5, hidden.shape)
    return jnp.mean((hidden @ params["head"] - y) ** 2)


def value_at(fun, params, *args):
    with jax.disable_jit():
        return fun(params, *args)


def test_rows_and_parameters_give_what_the_function_gives():
    hoisted = fo.hoist(loss, "encoder")
    rows = hoisted.prepare(PARAMS, X, Y)
    assert value_at(hoisted, PARAMS, rows) == value_at(loss, PARAMS, X, Y)
    assert len(rows) == 6
    assert rows.bytes_per_example == 3 * 4 + 4


def test_any_indices_of_rows_stand_for_those_examples():
    hoisted = fo.hoist(loss, "encoder")
    rows = hoisted.prepare(PARAMS, X, Y)
    picked = np.array([5, 0, 3])
    for some in (rows[picked], jax.device_get(rows)[picked]):
        expected = loss(PARAMS, X[picked], Y[picked])
        np.testing.assert_allclose(hoisted(PARAMS, some), expected, rtol=1e-6)
    with pytest.raises(TypeError, match=r"rows\[i : i \+ 1\]"):
        rows[0]


@pytest.mark.parametrize("last", [1, 2])
def test_a_smaller_last_batch_joins_the_others(last):
    hoisted = fo.hoist(loss, "encoder")
    parts = [hoisted.prepare(PARAMS, X[:4], Y[:4]), hoisted.prepare(PARAMS, X[:last], Y[:last])]
    rows = hoisted.join(parts)
    assert len(rows) == 4 + last
    for part, x, y in ((rows[:4], X[:4], Y[:4]), (rows[4:], X[:last], Y[:last])):
        np.testing.assert_allclose(hoisted(PARAMS, part), loss(PARAMS, x, y), rtol=1e-6)


def test_a_step_trains_from_rows_as_from_data():
    tx = fo.with_frozen(optax.adam(0.1), "encoder")
    hoisted = fo.hoist(loss, tx)

    def make_step(loss):
        @fo.jit(frozen=tx)
        def step(params, state, *batch):
            value, grads = fo.value_and_grad(loss, tx)(params, *batch)
            updates, state = tx.update(grads, state, params)
            return fo.apply_updates(params, updates), state, value

        return step

    live, from_rows = make_step(loss), make_step(hoisted)
    rows = hoisted.prepare(PARAMS, X, Y)
    found = fo.assert_step_freezes(from_rows, PARAMS, tx.init(PARAMS), rows, frozen=tx, exact=True)
    assert found == {"encoder/b": "itself", "encoder/w": "itself"}
    one = other = (PARAMS, tx.init(PARAMS), None)
    for _ in range(5):
        one, other = live(*one[:2], X, Y), from_rows(*other[:2], rows)
        np.testing.assert_allclose(one[2], other[2], rtol=1e-5)
    assert other[0]["encoder"]["w"] is PARAMS["encoder"]["w"]


def test_live_arguments_come_after_the_rows():
    hoisted = fo.hoist(noisy, "encoder", live_argnums=3)
    rows = hoisted.prepare(PARAMS, X, Y)
    for seed in range(3):
        key = jax.random.key(seed)
        assert value_at(hoisted, PARAMS, rows, key) == value_at(noisy, PARAMS, X, Y, key)
    many = jax.vmap(lambda key: hoisted(PARAMS, rows, key))(jax.random.split(key, 3))
    expected = jax.vmap(lambda key: noisy(PARAMS, X, Y, key))(jax.random.split(key, 3))
    np.testing.assert_allclose(many, expected, rtol=1e-6)
    with pytest.raises(TypeError, match="0 arguments were given after the rows"):
        hoisted(PARAMS, rows)


def test_raw_keys_steps_and_labels_may_be_live():
    def fun(params, step, x, y, key):
        noise = jax.random.normal(key, y.shape)
        return jnp.mean((features(params, x) @ params["head"] - y) ** 2 * noise) * step

    hoisted = fo.hoist(fun, "encoder", live_argnums=[1, 3, 4])
    key = jax.random.PRNGKey(0)
    rows = hoisted.prepare(PARAMS, X, live=(0.5, Y, key))
    assert rows.bytes_per_example == 12
    assert value_at(hoisted, PARAMS, rows, 2.0, Y, key) == value_at(fun, PARAMS, 2.0, X, Y, key)
    two = hoisted.prepare(PARAMS, X[:2], live=(0.5, Y[:2], key))  # as many as a raw key has words
    assert len(two) == 2


def test_auxiliary_results_and_objects_come_as_they_are():
    def fun(params, x, names, train: bool):
        hidden = features(params, x)
        scale = 2.0 if train else 1.0
        return jnp.sum(hidden @ params["head"]) * scale, {"hidden": hidden, "names": names}

    hoisted = fo.hoist(fun, "encoder")
    rows = hoisted.prepare(PARAMS, X, "texts", True)
    with jax.disable_jit():
        value, grads = fo.value_and_grad(fun, "encoder", has_aux=True)(PARAMS, X, "texts", True)
        again, same = fo.value_and_grad(hoisted, "encoder", has_aux=True)(PARAMS, rows)
    assert again[1]["names"] == "texts"
    assert same_bits((value[0], value[1]["hidden"], grads), (again[0], again[1]["hidden"], same))


def test_has_aux_says_that_a_pair_is_returned():
    def with_features(params, x, y):
        return loss(params, x, y), {"norm": jnp.sum(features(params, x) ** 2)}

    hoisted = fo.hoist(with_features, "encoder", has_aux=True)
    rows = hoisted.prepare(PARAMS, X, Y)
    (value, aux), grads = fo.value_and_grad(hoisted, "encoder", has_aux=True)(PARAMS, rows)
    live = fo.value_and_grad(with_features, "encoder", has_aux=True)(PARAMS, X, Y)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), live[0], (value, aux)
    )
    np.testing.assert_allclose(grads["head"], live[1]["head"], rtol=1e-5)
    with pytest.raises(TypeError, match=r"returns a pair .* and it returned 'list'"):
        fo.hoist(lambda *args: [loss(*args), 1], "encoder", has_aux=True).prepare(PARAMS, X, Y)


def test_what_is_shared_is_computed_once_for_all():
    def fun(params, x, temperature):
        weights = jnp.exp(params["encoder"]["w"])
        return jnp.sum(x @ weights @ params["head"]) / temperature + jnp.sum(
            weights @ params["head"]
        )

    hoisted = fo.hoist(fun, "encoder")
    rows = hoisted.prepare(PARAMS, X, 0.5)
    assert sorted(array.shape for array in rows.shared) == [(), (4, 3)]
    assert value_at(hoisted, PARAMS, rows) == value_at(fun, PARAMS, X, 0.5)
    with pytest.raises(ValueError, match="what all examples share is another in rows 1"):
        hoisted.join([rows, hoisted.prepare(PARAMS, X, 0.25)])


def test_one_hots_and_masks_are_made_again_and_not_kept():
    def fun(params, x, labels, lengths):
        mask = jnp.arange(100)[None, :] < lengths[:, None]
        one_hot = jax.nn.one_hot(labels, 50)
        hidden = features(params, x).sum(-1, keepdims=True) * params["head"][0]
        return jnp.sum(jnp.where(mask, hidden, 0.0)) + jnp.sum(one_hot * hidden)

    labels = jnp.arange(6, dtype=jnp.int32)
    rows = fo.hoist(fun, "encoder").prepare(PARAMS, X, labels, labels)
    assert rows.bytes_per_example == 4 + 4 + 4


def test_report_needs_no_arrays_and_names_where_it_ended():
    shapes = jax.eval_shape(lambda: (PARAMS, X, Y))
    report = fo.hoist(loss, "encoder").report(*shapes)
    assert report.share > 0.5
    assert report.bytes_per_example == 16
    assert report.pays_at == 2
    assert 1 < report.speed_up(2) < report.speed_up(10)
    assert report.stops == ("dot_general [6]: head",)
    assert "ended at        dot_general [6]: head" in str(report)


def test_nothing_to_hoist_is_an_error_that_names_where_it_ended():
    def fun(params, x):
        return jnp.sum((x + params["bias"]) @ params["w"])

    params = {"bias": jnp.ones(4), "w": jnp.ones((4, 3))}
    hoisted = fo.hoist(fun, "w")
    assert "nothing to hoist" in str(hoisted.report(params, X))
    with pytest.raises(ValueError, match=r"nothing can be hoisted.* add \[6, 4\]: bias"):
        hoisted.prepare(params, X)


def mixing(mix):
    def fun(params, x, y):
        return jnp.mean((mix(x @ params["encoder"]["w"]) @ params["head"] - y) ** 2)

    return fun


MIXES = {
    "sub": lambda x: x - x.mean(0),
    "batch norm": lambda x: (x - x.mean(0)) * lax.rsqrt(x.var(0) + 1e-5),
    "negatives": lambda x: jax.nn.softmax(x @ x.T) @ x,
    "sort": lambda x: jnp.sort(x, 0),
    "argsort": lambda x: x[jnp.argsort(x[:, 0])],
    "cumsum": lambda x: jnp.cumsum(x, 0),
    "roll": lambda x: jnp.roll(x, 1, 0),
    "flip": lambda x: x[::-1],
    "first": lambda x: x - x[0],
    "position": lambda x: x * jnp.arange(len(x))[:, None],
    "size": lambda x: x / len(x),
    "size as an index": lambda x: jnp.where(jnp.arange(3) < len(x) - 4, x, 0.0),
    "reshape": lambda x: x.reshape(3, -1).T.reshape(x.shape),
    "softmax": lambda x: jax.nn.softmax(x, 0),
    "scan": lambda x: lax.scan(lambda c, row: (c + row, c), x[0] * 0, x)[1],
    "map with a carry": lambda x: lax.associative_scan(jnp.add, x),
    "loop": lambda x: lax.fori_loop(0, 2, lambda i, x: jnp.roll(x, 1, 0), x),
    "as often as examples": lambda x: lax.fori_loop(0, len(x), lambda i, x: jnp.sin(x), x),
    "scan as often": lambda x: lax.scan(lambda x, _: (jnp.sin(x), None), x, length=len(x))[0],
    "branches": lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
    "fourier": lambda x: jnp.abs(jnp.fft.fft(x, axis=0)),
    "noise": lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
    "power": lambda x: lax.integer_pow(x, len(x)),
    "window": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 1), (1, 1), "SAME"),
    "tile": lambda x: jnp.tile(x, (2, 1)).reshape(x.shape[0], 2, 3)[:, 0],
    "take": lambda x: jnp.take(x, jnp.arange(len(x)) ^ 1, 0, mode="clip"),
    "product over them": lambda x: x @ (x.T @ x),
    "look up": lambda x: (x[jnp.zeros_like(x[:, 0], jnp.int32)] + x) @ jnp.ones((3, 3)),
    "while": lambda x: lax.while_loop(
        lambda carry: carry[0] < 1, lambda carry: (carry[0] + 1, carry[1][::-1]), (x.size * 0, x)
    )[1],
    "concatenate": lambda x: jnp.concatenate([x, -x]).reshape(len(x), 2, 3)[:, 0],
    "static branch": lambda x: jnp.sin(x) if len(x) == 6 else jnp.cos(x),
}


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_examples_stays_in_the_step(name):
    fun = mixing(MIXES[name])
    hoisted = fo.hoist(fun, "encoder")
    report = hoisted.report(PARAMS, X, Y)
    assert report.stops, "it ends before the head"
    rows = hoisted.prepare(PARAMS, X, Y)
    assert value_at(hoisted, PARAMS, rows) == value_at(fun, PARAMS, X, Y)
    # Other examples of other batches, in another number: the value is that of the function.
    picked = np.array([5, 2, 0, 1])
    expected = fun(PARAMS, X[picked], Y[picked])
    np.testing.assert_allclose(hoisted(PARAMS, rows[picked]), expected, rtol=1e-5)


def test_a_table_is_no_example_though_it_has_as_many_rows():
    table = jax.random.normal(jax.random.key(5), (6, 4))
    other = lambda x: table if len(x) == 6 else x
    fun = mixing(lambda x: x)
    by_table = lambda params, x, y: fun(params, jnp.sin(other(x)) + x + table.sum(), y)
    hoisted = fo.hoist(by_table, "encoder")
    with pytest.raises(ValueError, match="sin: it depends on the batch size"):
        hoisted.prepare(PARAMS, X, Y)


@pytest.mark.parametrize("inside", [lax.map, lambda f, x: lax.cond(True, f, f, x), jax.checkpoint])
def test_what_depends_on_the_batch_size_within_a_program_stays(inside):
    def fun(params, x, y):
        count = len(x)
        of = lambda x: jnp.sin(x) * count if count > 6 else jnp.sin(x) * 6.0
        call = inside(of)(x) if inside is jax.checkpoint else inside(of, x)
        return loss(params, call, y)

    stops = fo.hoist(fun, "encoder").report(PARAMS, X, Y).stops
    assert any("depends on the batch size" in stop for stop in stops)


def test_host_arrays_of_64_bits_are_taken_as_jax_takes_them():
    x, y, labels = np.asarray(X, np.float64), np.asarray(Y, np.float64), np.arange(6) % 3

    def fun(params, x, y, labels):
        picked = jnp.take_along_axis(features(params, x), labels[:, None], 1)[:, 0]
        return loss(params, x, y) + jnp.mean(picked * params["head"][labels])

    hoisted = fo.hoist(fun, "encoder")
    rows = hoisted.prepare(PARAMS, x, y, labels)
    assert {array.dtype.name for array in rows.each} == {"float32", "int32"}
    assert value_at(hoisted, PARAMS, rows) == value_at(fun, PARAMS, x, y, labels)


def test_what_depends_on_an_example_alone_is_hoisted_past_all_this():
    fun = mixing(lambda x: jax.nn.softmax(jnp.sort(jnp.cumsum(x[:, ::-1], 1), 1)))
    report = fo.hoist(fun, "encoder").report(PARAMS, X, Y)
    assert report.stops == ("dot_general [6]: head",)


def test_effects_stay_in_the_step():
    printed = []

    def fun(params, x, y):
        hidden = features(params, x)
        jax.debug.callback(lambda value: printed.append(float(value)), hidden.sum())
        return jnp.mean((hidden @ params["head"] - y) ** 2)

    hoisted = fo.hoist(fun, "encoder")
    rows = hoisted.prepare(PARAMS, X, Y)
    jax.effects_barrier()
    assert printed == []
    hoisted(PARAMS, rows)
    hoisted(PARAMS, rows)
    jax.effects_barrier()
    assert len(printed) == 2


def test_a_callback_of_the_host_stays_in_the_step():
    def fun(params, x, y):
        weights = jax.pure_callback(lambda w: w, PARAMS["encoder"]["w"], params["encoder"]["w"])
        return jnp.mean((x @ weights @ params["head"] - y) ** 2)

    assert "host" in str(fo.hoist(fun, "encoder").report(PARAMS, X, Y))
    with pytest.raises(ValueError, match="nothing can be hoisted"):
        fo.hoist(fun, "encoder").prepare(PARAMS, X, Y)


def test_a_key_among_the_data_is_refused_by_the_name_of_its_argument():
    with pytest.raises(TypeError, match=r"'key' holds a PRNG key.*live_argnums=3"):
        fo.hoist(noisy, "encoder").prepare(PARAMS, X, Y, jax.random.key(0))


def test_random_numbers_drawn_by_data_are_refused():
    def fun(params, x, seeds):
        noise = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), (3,)))(seeds)
        return jnp.sum((features(params, x) + noise) @ params["head"])

    with pytest.raises(ValueError, match=r"random_seed draws random numbers.*live_argnums"):
        fo.hoist(fun, "encoder").prepare(PARAMS, X, jnp.arange(6))


def test_arguments_with_different_numbers_of_examples_are_refused():
    with pytest.raises(ValueError, match=r"found 6 in 'x', 5 in 'y'"):
        fo.hoist(loss, "encoder").prepare(PARAMS, X, Y[:5])


def test_code_for_one_batch_size_alone_is_refused():
    fixed = lambda params, x, y: loss(params, x.reshape(6, 4), y)
    with pytest.raises(ValueError, match="cannot be traced with 12 examples instead of 6"):
        fo.hoist(fixed, "encoder").prepare(PARAMS, X, Y)


def test_differentiating_a_frozen_leaf_is_refused():
    hoisted = fo.hoist(loss, "encoder")
    rows = hoisted.prepare(PARAMS, X, Y)
    for differentiate in (
        jax.grad(hoisted),
        jax.grad(jax.jit(hoisted)),
        jax.jit(jax.grad(hoisted)),
    ):
        with pytest.raises(ValueError, match="'encoder/b', 'encoder/w' are differentiated"):
            differentiate(PARAMS, rows)
    jax.jit(fo.grad(jax.jit(hoisted), "encoder"))(PARAMS, rows)


def test_rows_of_another_selection_or_program_are_refused():
    whole, part = fo.hoist(loss, "encoder"), fo.hoist(loss, "encoder/w")
    rows = whole.prepare(PARAMS, X, Y)
    with pytest.raises(ValueError, match="do not hold what this function needs of 'x'"):
        part(PARAMS, rows)
    other = fo.hoist(lambda params, x, y: loss(params, 2 * x, y), "encoder")
    with pytest.raises(ValueError, match="do not hold what this function needs of 'x'"):
        other(PARAMS, rows)
    with pytest.raises(TypeError, match="expected the rows that prepare returned, found dict"):
        whole(PARAMS, {"x": X})
    with pytest.raises(ValueError, match="of another program"):
        whole.join([rows, part.prepare(PARAMS, X, Y)])


def test_rows_for_parameters_of_other_shapes_are_refused():
    hoisted = fo.hoist(
        lambda params, x, y: jnp.mean(features(params, x)) * params["head"][0], "encoder"
    )
    rows = hoisted.prepare(PARAMS, X, Y)
    narrow = PARAMS | {"encoder": {"w": jnp.ones((4, 3), jnp.bfloat16), "b": jnp.ones(3)}}
    with pytest.raises(ValueError, match="do not hold what this function needs"):
        hoisted(narrow, rows)


def test_code_that_changed_with_a_global_is_refused():
    scale = 1.0

    def fun(params, x, y):
        return loss(params, x * scale, y)

    hoisted = fo.hoist(fun, "encoder")
    rows = hoisted.prepare(PARAMS, X, Y)
    scale = 2.0
    with pytest.raises(ValueError, match="do not hold what this function needs"):
        hoisted(PARAMS, rows)


def test_constants_are_told_by_their_bits():
    constant = np.zeros(4, np.float32)

    def fun(params, x, y):
        return loss(params, x / constant, y)

    hoisted = fo.hoist(fun, "encoder")
    rows = hoisted.prepare(PARAMS, X, Y)
    constant[1] = -0.0
    with pytest.raises(ValueError, match="do not hold what this function needs"):
        hoisted(PARAMS, rows)


def test_a_function_of_a_users_own_name_for_positions():
    with pytest.raises(ValueError, match="live_argnums is 0: it names arguments after"):
        fo.hoist(loss, "encoder", live_argnums=0)
    with pytest.raises(TypeError, match="exactly one of the two"):
        fo.hoist(loss)
    with pytest.raises(ValueError, match="'encodr'"):
        fo.hoist(loss, "encodr").prepare(PARAMS, X, Y)


def test_a_value_of_an_outer_transformation_is_live():
    def outer(scale):
        hoisted = fo.hoist(lambda params, x, y: loss(params, x, y) * scale, "encoder")
        return hoisted(PARAMS, hoisted.prepare(PARAMS, X, Y))

    slope = jax.grad(outer)(2.0)
    np.testing.assert_allclose(slope, loss(PARAMS, X, Y), rtol=1e-6)
    many = jax.vmap(outer)(jnp.arange(3.0))
    np.testing.assert_allclose(many, jnp.arange(3.0) * loss(PARAMS, X, Y), rtol=1e-6)


def test_arguments_that_are_equal_and_no_arrays_are_told_by_kind():
    """`1 == True`, and one program may be compiled for either."""
    scale = lambda said: 1.0 if isinstance(said, bool) else 100.0
    of = lambda params, x, said: jnp.sum(x @ params["enc"] @ params["head"]) * scale(said)
    params = {"enc": jnp.ones((4, 3)), "head": jnp.ones(3)}
    hoisted, x = fo.hoist(of, "enc"), jnp.ones((6, 4))
    rows = [hoisted.prepare(params, x, said) for said in (1, True)]
    step = jax.jit(hoisted)
    assert [float(step(params, each)) for each in rows] == [7200.0, 72.0]
    with pytest.raises(ValueError, match="another program"):
        hoisted.join(rows)


@pytest.mark.parametrize("index", [6, -7, 100])
def test_a_row_that_is_not_there_is_an_error_of_its_index(index):
    loss = lambda params, x: jnp.sum(x @ params["enc"] @ params["head"])
    params = {"enc": jnp.ones((4, 3)), "head": jnp.ones(3)}
    rows = fo.hoist(loss, "enc").prepare(params, jnp.ones((6, 4)))
    for indices in (np.array([0, index]), [0, index]):
        with pytest.raises(IndexError):
            rows[indices]
    assert len(rows[np.array([5, -6, 5])]) == 3
