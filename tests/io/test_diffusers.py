"""Weights and configs of diffusers' transformers: the bits, the names, and what is refused."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxdistill.errors import Diverged, InputError
from jaxdistill.io import diffusers

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "dit"
WEIGHTS = f"{diffusers.STEM}.safetensors"
CHECKPOINT = diffusers.read_checkpoint(FOLDER)
CONFIG, SHAPE = CHECKPOINT.config, CHECKPOINT.shape
# As facebook/DiT-XL-2-256 states what decides.
XL = {
    "_class_name": "Transformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "cross_attention_dim": None,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
}


def stored():
    return safetensors.numpy.load_file(FOLDER / "transformer" / WEIGHTS)


def same(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert x.dtype == other[name].dtype and x.shape == other[name].shape
        assert x.tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("kind", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("limit", [10**9, 20_000])
def test_weights_go_through_without_a_change_of_a_bit(tmp_path, kind, limit):
    tensors = {name: x.astype(kind) for name, x in stored().items()}
    params = diffusers.params_of(tensors, SHAPE)
    diffusers.save_transformer(tmp_path, params, SHAPE, shard_bytes=limit)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 1) == (tmp_path / f"{WEIGHTS}.index.json").is_file() == (limit < 10**9)
    written = {k: x for path in shards for k, x in safetensors.numpy.load_file(path).items()}
    same(written, tensors)
    same(diffusers.tensors_of(diffusers.load_transformer(tmp_path, SHAPE), SHAPE), tensors)


def test_codes_of_positions_may_be_there():
    tensors = stored() | {"pos_embed.pos_embed": np.zeros((1, 16, 16), np.float32)}
    diffusers.params_of(tensors, SHAPE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proj_out_1.bias": None}, r"lacks 1 tensors: proj_out_1.bias"),
        ({"proj_out_3.bias": np.zeros(2, np.float32)}, "1 tensors have no place: proj_out_3.bias"),
        ({"proj_out_1.bias": np.zeros(2, np.float32)}, r"shape \(2,\), the transformer wants \(32"),
        ({"proj_out_1.bias": np.zeros(32, np.float64)}, "float64; it must be"),
        ({"proj_out_1.bias": np.full(32, np.nan, np.float32)}, "not finite"),
        (
            {"transformer_blocks.1.ff.net.2.bias": np.zeros(16, np.float16)},
            "float16, the same of the first block float32",
        ),
    ],
)
def test_what_is_no_such_transformer_is_named(change, message):
    tensors = {name: x for name, x in (stored() | change).items() if x is not None}
    with pytest.raises(InputError, match=message):
        diffusers.params_of(tensors, SHAPE)


def test_parameters_that_are_not_its_own_are_not_written(tmp_path):
    params = diffusers.params_of(stored(), SHAPE)
    for change, message in [
        ({"head": {"bias": np.zeros(2)}}, "have also head/bias"),
        ({"output": params["output"] | {"bias": np.zeros(3, np.float32)}}, ""),
    ]:
        with pytest.raises((InputError, ValueError), match=message):
            diffusers.tensors_of(params | change, SHAPE)
    broken = params | {"output": params["output"] | {"bias": np.full(12, np.inf, np.float32)}}
    with pytest.raises(Diverged, match="output/bias"):
        diffusers.save_transformer(tmp_path / "a", broken, SHAPE)
    assert not (tmp_path / "a").exists()


def test_what_configs_say():
    shape = diffusers.shape_of(XL)
    assert shape == diffusers.Shape(32, 4, 2, 16, 72, 28, 1000, True, 1e-5)
    assert diffusers.shape_of(json.loads(json.dumps(diffusers.config_of(shape)))) == shape
    assert diffusers.config_of(SHAPE).items() <= CONFIG.items()
    assert CHECKPOINT.scheduler == (1000, ("linear", 1e-4, 0.02))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "_class_name is 'Flux"),
        ({"norm_type": "ada_norm_single"}, "norm_type is"),
        ({"activation_fn": ["gelu-approximate"]}, "activation_fn is"),
        ({"cross_attention_dim": 8}, "cross_attention_dim is 8"),
        ({"attention_bias": False}, "attention_bias is False"),
        ({"out_channels": 5}, "out_channels is 5"),
        ({"num_layers": True}, "num_layers is True"),
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"sample_size": 33}, "patches of 2"),
        ({"norm_eps": "x"}, "norm_eps is 'x'"),
    ],
)
def test_configs_of_other_networks_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        diffusers.shape_of(XL | change)
    incomplete = {k: v for k, v in XL.items() if k != "attention_bias"}
    with pytest.raises(InputError, match="attention_bias is None"):
        diffusers.shape_of(incomplete)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule 'squaredcos"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"beta_start": 0.5}, "must rise"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
    ],
)
def test_other_schedules_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        diffusers.scheduler_of(CHECKPOINT.scheduler_config | change)


def test_folders(tmp_path):
    folder = shutil.copytree(FOLDER / "transformer", tmp_path / "alone")
    with pytest.raises(InputError, match=r"holds no scheduler_config\.json"):
        diffusers.read_checkpoint(folder)
    shutil.copy(FOLDER / "scheduler" / "scheduler_config.json", folder)
    alone = diffusers.read_checkpoint(folder)
    assert alone.shape == SHAPE
    assert diffusers.fingerprint(alone) == diffusers.fingerprint(CHECKPOINT)
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="no folder with diffusion_pytorch_model"):
        diffusers.load_transformer(folder, SHAPE)
    with pytest.raises(InputError, match=r"holds no config\.json"):
        diffusers.read_checkpoint(tmp_path)
