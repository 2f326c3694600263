"""What a `config.json` says of a decoder; `test_layouts.py` has the weights."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.errors import InputError
from jaxdistill.io.decoders import config_of, decoder_shape, shape_of
from jaxdistill.nn.decoder import BlockShape

# The settings that decide of what the published models are, as their configs state them.
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN2_VL = QWEN2 | {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "model_type": "qwen2_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "vision_config": {"depth": 32, "hidden_size": 3584, "model_type": "qwen2_vl"},
    "vocab_size": 152064,
}
INTERNLM2 = {
    "architectures": ["InternLM2ForCausalLM"],
    "bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "internlm2",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "vocab_size": 92553,
}
INTERNVL = {
    "model_type": "internvl_chat",
    "llm_config": INTERNLM2,
    "vision_config": {"hidden_size": 1024, "model_type": "intern_vit_6b"},
}

SMALL = BlockShape(896, 14, 2, 4864, qkv_bias=True, rope_theta=1e6)
LARGE = BlockShape(3584, 28, 4, 18944, qkv_bias=True, rope_theta=1e6)
INTERN = BlockShape(4096, 32, 8, 14336, rope_theta=1e6, epsilon=1e-5)


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
}


@pytest.mark.parametrize("shape", [SMALL, BlockShape(32, 4, 2, 48, head_dim=6)])
def test_a_config_that_is_written_says_what_was_meant(shape):
    made = json.loads(json.dumps(config_of(shape, 3, 40, tied=True)))
    found, *rest = shape_of(made)
    assert rest == [3, 40, True] and found == shape._replace(head_dim=shape.length())
    assert made["model_type"] == ("qwen2" if shape.qkv_bias else "llama")


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (QWEN2, (SMALL, 24, 151936, True)),
        (QWEN2_VL, (LARGE, 28, 152064, False)),
        (INTERNLM2, (INTERN, 32, 92553, False)),
        (INTERNVL, (INTERN, 32, 92553, False)),
        ({"model_type": "internvl_chat", "llm_config": QWEN2}, (SMALL, 24, 151936, True)),
        # As newer versions write them.
        (
            {
                "model_type": "qwen2_vl",
                "tie_word_embeddings": False,
                "text_config": without(
                    QWEN2_VL, "rope_theta", "rope_scaling", "tie_word_embeddings"
                )
                | {
                    "model_type": "qwen2_vl_text",
                    "head_dim": 64,
                    "layer_types": ["full_attention"] * 28,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
                },
            },
            (LARGE._replace(head_dim=64, rope_theta=5e5), 28, 152064, False),
        ),
        (without(QWEN2, "tie_word_embeddings", "use_sliding_window"), (SMALL, 24, 151936, False)),
        (INTERNLM2 | {"rope_scaling": None}, (INTERN, 32, 92553, False)),
        # Of its first version, which leaves the base of its frequencies out.
        (LLAMA, (BlockShape(4096, 32, 32, 11008, epsilon=1e-5), 32, 32000, False)),
    ],
)
def test_what_configs_say(tmp_path, config, wanted):
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = decoder_shape(tmp_path)
    assert found == wanted
    kinds = [type(x) for x in (*found[0][:4], found[0].rope_theta, found[1], found[2])]
    assert kinds == [int, int, int, int, float, int, int]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QWEN2 | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rotary .* the kind 'yarn'"),
        (QWEN2 | {"rope_scaling": {"rope_type": "linear"}}, "rotary .* the kind 'linear'"),
        (INTERNLM2 | {"rope_scaling": {"type": [1]}}, r"rotary .* the kind \[1\]"),
        (QWEN2 | {"rope_scaling": 3}, "no dictionary"),
        (QWEN2 | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "a part of a head"),
        (QWEN2 | {"use_sliding_window": True}, "sliding windows"),
        (QWEN2 | {"layer_types": ["sliding_attention"]}, "sliding windows"),
        (QWEN2 | {"hidden_act": "gelu"}, "activation 'gelu'"),
        (QWEN2 | {"lm_head_bias": True}, r"biases \(lm_head_bias\)"),
        (INTERNLM2 | {"bias": True}, r"biases \(bias\)"),
        (without(INTERNLM2, "bias"), r"biases \(bias\)"),  # what its code takes then
        (QWEN2 | {"model_type": "gemma"}, r"model_type 'gemma'; qwen2, qwen2_vl, .* can be read"),
        (LLAMA | {"attention_bias": True}, r"biases \(attention_bias\)"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3"}}, "rotary .* the kind 'llama3'"),
        (INTERNVL | {"llm_config": 3}, "model_type None"),
        ([QWEN2], "no dictionary"),
        (without(QWEN2, "rope_theta"), "rope_theta is None; it must be a positive number"),
        (QWEN2 | {"hidden_size": 896.0}, "hidden_size is 896.0"),
        (QWEN2 | {"num_hidden_layers": True}, "num_hidden_layers is True"),
        (QWEN2 | {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        (QWEN2 | {"num_key_value_heads": 4}, "heads must be a multiple"),
        (QWEN2 | {"rms_norm_eps": 10**400}, "rms_norm_eps is 1000.*; it must be"),
        (QWEN2 | {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, not true or false"),
    ],
)
def test_what_blocks_do_not_have_is_refused(config, message):
    with pytest.raises(InputError, match=message) as caught:
        shape_of(config)
    assert len(str(caught.value)) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(
    key=st.sampled_from([*INTERNLM2, "llm_config", "rope_parameters", "layer_types"]), value=JSON
)
def test_any_value_is_read_or_refused_in_one_line(key, value):
    try:
        shape, depth, vocabulary, tied = shape_of(INTERNLM2 | {key: value})
    except InputError as error:
        assert len(str(error)) < 300
    else:
        assert shape.length() > 0 < depth and vocabulary > 0 and tied in (True, False)


def test_several_reasons_are_one_line():
    config = QWEN2 | {"use_sliding_window": True, "hidden_act": "relu", "mlp_bias": True}
    with pytest.raises(InputError, match=r"for sliding windows, the .* 'relu', biases \(mlp_b"):
        shape_of(config)


def test_the_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"config\.json gives no decoder: No such file"):
        decoder_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json gives no decoder: it is not JSON"):
        decoder_shape(tmp_path)


def test_heads_have_the_published_lengths():
    assert [shape.length() for shape in (SMALL, LARGE, INTERN)] == [64, 128, 128]
