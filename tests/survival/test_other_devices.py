"""Saved on some devices and under one backend, restored on others and under the other."""

import jax
import numpy as np
import pytest

from jaxdistill import runner
from jaxdistill.parallel.mesh import make_mesh
from tests.test_backends import differences, min_max, toy_data
from tests.test_method_contract import ncfm_case
from tests.test_runner import assert_same_bits, checkpoints

# Devices for classes x for examples, and the backend.
JOURNEYS = {
    "8, 1, 2 devices": [(4, 2, "jit"), (1, 1, "jit"), (2, 1, "jit")],
    "8, 2, 1 devices": [(1, 8, "jit"), (1, 2, "jit"), (1, 1, "jit")],
    "pmap, jit, pmap": [(1, 8, "pmap"), (2, 4, "jit"), (1, 2, "pmap")],
}


def travel(method, data, frozen, journey, folder):
    """One step on each place; the last state, and that of a run on one device alone."""
    options = {"data": data, "frozen": frozen, "key": jax.random.key(2), "chunk": 1}
    for step, (classes, examples, backend) in enumerate(journey, 1):
        mesh = make_mesh(jax.devices()[: classes * examples], classes)
        here = {"mesh": mesh, "backend": backend, "workdir": folder, **options}
        if step > 1:
            # Nothing is run: what was saved elsewhere is read, and lies as it must here.
            arrived = runner.run(method, steps=step - 1, **here)
            assert_same_bits(arrived, state)  # noqa: F821 (of the place before)
            layouts = {leaf.sharding.mesh.shape_tuple for leaf in jax.tree.leaves(arrived)}
            assert layouts == {mesh.shape_tuple}
        state = runner.run(method, steps=step, **here)
        assert checkpoints(folder)[-1] == step
    alone = {"mesh": make_mesh(jax.devices()[:1]), **options}
    return state, runner.run(method, steps=len(journey), **alone)


@pytest.mark.parametrize(
    "journey",
    ["8, 1, 2 devices", pytest.param("8, 2, 1 devices", marks=pytest.mark.slow), "pmap, jit, pmap"],
)
def test_a_run_goes_on_elsewhere(tmp_path, journey):
    state, alone = travel(min_max(), *toy_data(), JOURNEYS[journey], tmp_path)
    assert int(state["steps"]) == 3
    assert not differences(state, alone, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("journey", ["8, 1, 2 devices", "pmap, jit, pmap"])
def test_ncfm_goes_on_elsewhere(tmp_path, journey):
    method, frozen, _ = ncfm_case(
        learned=True, warmup=0, strategy="none", finetune_learning_rate=0.01
    )
    state, alone = travel(method, toy_data()[0], frozen, JOURNEYS[journey], tmp_path)
    assert not differences(state, alone, rtol=1e-3)
    assert np.abs(np.asarray(jax.tree.leaves(state.sampler)[0])).max() > 0
