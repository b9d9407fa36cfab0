"""What the pages say is so: code runs, links lead somewhere, promises are measured, files exist."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from pages import PAGES, ROOT, read, section, table

import frozen_optax as fo

MASK = {"encoder": True, "head": False}

WAYS = {
    "fo.with_frozen": lambda tx: fo.with_frozen(tx, "encoder"),
    "optax.selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=MASK),
    "optax.freeze before": lambda tx: optax.chain(optax.freeze(MASK), tx),
    "optax.freeze after": lambda tx: optax.chain(tx, optax.freeze(MASK)),
}


def apply_of(way):
    return fo.apply_updates if way.startswith("fo.") else optax.apply_updates


def make_params():
    odd = np.array([0x80000000, 1, 0x7F800001, 0x7FC00123], np.uint32).view(np.float32)
    return {"encoder": {"a": jnp.asarray(odd), "b": jnp.arange(4.0)}, "head": jnp.array([1.0, 2.0])}


def train(way, optimizer, params, gradients, steps=3, **extra_args):
    tx = optax.with_extra_args_support(WAYS[way](optimizer))
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(gradients, state, params, **extra_args)
        params = apply_of(way)(params, updates)
    return params


def bits(tree):
    return [np.asarray(leaf).view(np.uint32).tolist() for leaf in jax.tree.leaves(tree)]


def ones(params):
    return jax.tree.map(jnp.ones_like, params)


def odd_bits_survive(way):
    params = make_params()
    tx = WAYS[way](optax.sgd(0.1))
    updates, _ = jax.jit(tx.update)(ones(params), tx.init(params), params)
    return bits(jax.jit(apply_of(way))(params, updates)["encoder"]) == bits(params["encoder"])


def weight_decay_moves_nothing(way):
    params = make_params()
    after = train(way, optax.adamw(0.1, weight_decay=0.1), params, ones(params))
    return bits(after["encoder"]["b"]) == bits(params["encoder"]["b"])


def nothing_steers_clipping(way):
    params = make_params()
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))
    small = ones(params)
    large = small | {"encoder": jax.tree.map(lambda leaf: 9 * leaf, small["encoder"])}
    return bits(train(way, clipped, params, small)["head"]) == bits(
        train(way, clipped, params, large)["head"]
    )


def a_trained_nan_stays_out(way):
    params = make_params()
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))
    after = train(way, clipped, params, ones(params) | {"head": jnp.full(2, jnp.nan)})
    return bits(after["encoder"]["b"]) == bits(params["encoder"]["b"])


def a_frozen_nan_stays_out(way):
    params = make_params()
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))
    nans = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params["encoder"])
    return bool(
        np.isfinite(train(way, clipped, params, ones(params) | {"encoder": nans})["head"]).all()
    )


def extra_arguments_work(way):
    params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
    loss = lambda params: jnp.sum((params["encoder"] * params["head"]) ** 2)
    value, gradients = jax.value_and_grad(loss)(params)
    try:
        train(
            way,
            optax.lbfgs(),
            params,
            gradients,
            steps=1,
            value=value,
            grad=gradients,
            value_fn=loss,
        )
        train(way, optax.contrib.sophia(0.1), params, gradients, steps=1, obj_fn=loss)
    except Exception:
        return False
    return True


def any_leaf_may_be_frozen(way):
    encoder = {"steps": jnp.array(3), "mask": jnp.array([True]), "key": jax.random.key(0)}
    params = {"encoder": encoder, "head": jnp.ones(2)}
    gradients = jax.grad(lambda params: jnp.sum(params["head"] ** 2), allow_int=True)(params)
    try:
        after = train(way, optax.adamw(0.1), params, gradients)
        fo.assert_frozen(params, after, "encoder")
    except Exception:
        return False
    return True


def no_state_for_frozen_leaves(way):
    params = make_params()
    state = WAYS[way](optax.adam(0.1)).init(params)
    return sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * params["head"].size + 1


ODD_BITS = "-0.0, subnormals and NaN payloads survive when update and apply are compiled apart"
PROMISES = {
    ODD_BITS: odd_bits_survive,
    "weight decay moves no frozen leaf": weight_decay_moves_nothing,
    "frozen gradients do not steer clipping by global norm": nothing_steers_clipping,
    "a NaN in a trained gradient stays out of frozen leaves": a_trained_nan_stays_out,
    "a NaN in a frozen gradient stays out of trained leaves": a_frozen_nan_stays_out,
    "L-BFGS and Sophia get their extra arguments": extra_arguments_work,
    "integers, bools and PRNG keys may be frozen": any_leaf_may_be_frozen,
    "no optimizer state for frozen leaves": no_state_for_frozen_leaves,
}


@pytest.mark.parametrize("promise", PROMISES)
def test_the_table_of_promises_is_measured(promise):
    measured = ["yes" if PROMISES[promise](way) else "no" for way in WAYS]
    _, rows = table("README.md", "What it promises")
    assert rows[promise] == measured


def test_every_promise_of_the_table_is_measured():
    header, rows = table("README.md", "What it promises")
    assert set(rows) == set(PROMISES)
    assert [name.replace("`", "") for name in header[1:]] == list(WAYS)


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 150


# --- code

# How many blocks each page has, so that none is passed over.
BLOCKS = {
    "README.md": 1,
    "docs/checks.md": 1,
    "docs/checkpoints.md": 6,
    "docs/choosing.md": 5,
    "docs/cookbook.md": 11,
    "docs/cost.md": 1,
    "docs/distributed.md": 1,
    "docs/frameworks.md": 10,
    "docs/hoisting.md": 9,
    "docs/proofs.md": 2,
    "docs/stages.md": 5,
    "docs/which_way.md": 2,
    "docs/wrappers.md": 2,
}


def blocks_of(page):
    """Each block of code, below as many empty lines as make errors name lines of the page."""
    text = read(page)
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


@pytest.mark.parametrize("page", BLOCKS)
def test_the_code_runs_as_it_stands(page):
    names = {}
    for block in blocks_of(page):
        # One that does not import the library goes on from the one before.
        goes_on = "frozen_optax as fo" not in block
        names = names if goes_on else {"__name__": "page"}
        exec(compile(block, page, "exec"), names)


def test_no_code_is_left_out():
    assert {page: n for page in PAGES if (n := len(blocks_of(page)))} == BLOCKS
    for page in PAGES:
        openings = re.findall("^```.*", read(page), re.M)[::2]
        assert openings.count("```python") == len(blocks_of(page))
        # Others are commands, and diffs that `test_diffs` knows.
        assert set(openings) <= {"```python", "````diff", "```"}


# --- names, links, commands


def test_all_names_are_listed_and_no_others():
    listed = re.findall(r"`(\w+)`", section("README.md", "All names"))
    assert sorted(listed) == sorted(fo.__all__)


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", read(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if link.startswith("https://"):
            continue
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), link
        assert not heading or heading in anchors(target.resolve()), link


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_files_that_a_page_names_exist(page):
    folders = r"\.ci|\.github|benchmarks|docs|examples|frozen_optax|tests"
    for path in re.findall(rf"`((?:{folders})/[\w./]*)`", read(page)):
        assert (ROOT / path).exists(), path


def test_the_readme_leads_to_every_page():
    _, rows = table("README.md", "Where to read on")
    linked = [re.search(r"\((.*)\)", name)[1] for name in rows]
    assert sorted(linked) == PAGES[1:]


def test_the_checks_run_the_command_for_the_tests():
    command = next(line for line in read("README.md").splitlines() if "-m pytest" in line)
    assert command in read(".ci/run")


def test_the_map_names_every_file_of_the_library_and_none_that_is_not_there():
    rows = re.findall(
        r"^\| .* \| (`.*`) \|$", section("CONTRIBUTING.md", "To change X, open Y"), re.M
    )
    named = re.findall(r"`(.*?)`", " ".join(rows))
    assert len(named) == len(set(named))
    assert [path for path in named if not (ROOT / path).is_file()] == []
    library = (path.relative_to(ROOT).as_posix() for path in (ROOT / "frozen_optax").rglob("*.py"))
    assert set(library) - set(named) == set()
