"""Parameters on disk: there and back, and everything that is not what it says it is."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.errors import InputError
from jaxdistill.io import weights

PARAMS = {
    "trunk": {"blocks": {"kernel": jnp.arange(6.0).reshape(2, 3)}},
    "head": {"bias": jnp.ones(3, jnp.bfloat16), "steps": jnp.int32(7)},
}


@pytest.fixture
def folder(tmp_path):
    weights.save(tmp_path / "a", "net", PARAMS, {"method": "x"})
    return tmp_path / "a"


def test_parameters_come_back_with_their_card(folder):
    params, card = weights.load(folder, "net")
    assert card["method"] == "x" and card["parameters"] == 10
    for got, want in (
        (params["trunk"]["blocks"]["kernel"], PARAMS["trunk"]["blocks"]["kernel"]),
        (params["head"]["bias"], PARAMS["head"]["bias"]),
        (params["head"]["steps"], PARAMS["head"]["steps"]),
    ):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_a_card_of_other_parameters_is_refused(folder, tmp_path):
    weights.save(tmp_path / "b", "net", {"x": jnp.zeros(2)}, {})
    (folder / "net.json").write_bytes((tmp_path / "b" / "net.json").read_bytes())
    with pytest.raises(InputError, match=r"is not the card of net\.safetensors"):
        weights.load(folder, "net")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_gets_through(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("weights")
    weights.save(folder, "net", PARAMS, {})
    path = folder / data.draw(st.sampled_from(["net.safetensors", "net.json"]))
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip", "replace"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        path.write_bytes(content[:place])
    elif kind == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
    else:
        path.write_bytes(data.draw(st.binary(max_size=200)))
    try:
        params, _ = weights.load(folder, "net")
    except InputError as error:
        assert "\n" not in str(error)
    else:  # only what the card says beside the parameters may have changed
        assert path.name == "net.json"
        np.testing.assert_array_equal(
            params["trunk"]["blocks"]["kernel"], PARAMS["trunk"]["blocks"]["kernel"]
        )


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"net\.safetensors is no file"):
        weights.load(tmp_path, "net")
    (folder / "net.json").unlink()
    with pytest.raises(InputError, match=r"net\.json is no file"):
        weights.load(folder, "net")


def test_a_deep_card_is_refused(folder):
    (folder / "net.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="is no card of parameters"):
        weights.load(folder, "net")


def test_a_forged_file_with_a_fitting_card_is_refused(folder):
    import hashlib

    content = (2**40).to_bytes(8, "little") + b"{}"
    (folder / "net.safetensors").write_bytes(content)
    card = json.loads((folder / "net.json").read_text())
    card["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "net.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match="cannot be used"):
        weights.load(folder, "net")


def test_other_shapes_are_named(folder):
    params, _ = weights.load(folder, "net")
    weights.check_shapes("it", params, PARAMS)
    with pytest.raises(InputError, match=r"it has head/bias of shape \(3,\), .* network None"):
        weights.check_shapes("it", params, {"trunk": PARAMS["trunk"], "head": {"steps": params}})


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file/a: Not a directory"):
        weights.save(tmp_path / "file" / "a", "net", PARAMS, {})
