"""Decoders in PyTorch's layouts: against a forward pass in torch's conventions, there and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdistill.errors import Diverged, InputError
from jaxdistill.io import decoders, layouts
from jaxdistill.nn.decoder import Blocks, BlockShape, RMSNorm, causal_mask, positions_of
from jaxdistill.nn.vlm import VLM
from jaxdistill.vlm.decoding import generate

WIDTH, HEADS, KV, HIDDEN, DEPTH, VOCABULARY, D = 12, 6, 2, 20, 3, 17, 4
QWEN2 = BlockShape(WIDTH, HEADS, KV, HIDDEN, D, True, 1000.0, 1e-5)
INTERNLM2 = QWEN2._replace(qkv_bias=False)
# layout -> what stands before "model.layers", and before the head
WHERE = {
    "qwen2": ("model.", ""),
    "qwen2_in_internvl": ("language_model.model.", "language_model."),
    "qwen2_in_vlm": ("model.language_model.", ""),
    "internlm2": ("model.", ""),
    "internlm2_in_internvl": ("language_model.model.", "language_model."),
}


def shape_of(layout):
    return QWEN2 if layout.startswith("qwen2") else INTERNLM2


def checkpoint(layout, dtype=np.float32, *, tied=False):
    """Random tensors with the names and shapes that torch's modules of an architecture have."""
    rng = np.random.default_rng(0)
    body, head = WHERE[layout]
    qwen2 = layout.startswith("qwen2")
    tensors = {}

    def add(name, *shape, around=0.0):
        tensors[name] = (around + rng.normal(size=shape) / 3).astype(dtype)

    add(f"{body}{'embed_tokens' if qwen2 else 'tok_embeddings'}.weight", VOCABULARY, WIDTH)
    for i in range(DEPTH):
        own = f"{body}layers.{i}."
        if qwen2:
            for name, heads in (("q", HEADS), ("k", KV), ("v", KV)):
                add(f"{own}self_attn.{name}_proj.weight", heads * D, WIDTH)
                add(f"{own}self_attn.{name}_proj.bias", heads * D)
            add(f"{own}self_attn.o_proj.weight", WIDTH, HEADS * D)
            add(f"{own}mlp.gate_proj.weight", HIDDEN, WIDTH)
            add(f"{own}mlp.up_proj.weight", HIDDEN, WIDTH)
            add(f"{own}mlp.down_proj.weight", WIDTH, HIDDEN)
            add(f"{own}input_layernorm.weight", WIDTH, around=1.0)
            add(f"{own}post_attention_layernorm.weight", WIDTH, around=1.0)
        else:
            add(f"{own}attention.wqkv.weight", (HEADS + 2 * KV) * D, WIDTH)
            add(f"{own}attention.wo.weight", WIDTH, HEADS * D)
            add(f"{own}feed_forward.w1.weight", HIDDEN, WIDTH)
            add(f"{own}feed_forward.w2.weight", WIDTH, HIDDEN)
            add(f"{own}feed_forward.w3.weight", HIDDEN, WIDTH)
            add(f"{own}attention_norm.weight", WIDTH, around=1.0)
            add(f"{own}ffn_norm.weight", WIDTH, around=1.0)
    add(f"{body}norm.weight", WIDTH, around=1.0)
    if not tied:
        add(f"{head}{'lm_head' if qwen2 else 'output'}.weight", VOCABULARY, WIDTH)
    return tensors


def write(path, tensors):
    safetensors.numpy.save_file(dict(tensors), path, metadata={"format": "pt"})
    return path


def read(path):
    return {name: x for name, x in safetensors.numpy.load_file(path).items()}


def torch_logits(tensors, layout, tokens):
    """The logits of one text in float64, on the tensors by their names, as torch computes them."""
    body, head = WHERE[layout]
    qwen2 = layout.startswith("qwen2")
    get = lambda name: np.asarray(tensors[name], np.float64)  # noqa: E731
    time = len(tokens)

    def norm(x, weight):
        return weight * (x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5))

    frequencies = 1.0 / 1000.0 ** (np.arange(0, D, 2) / D)
    angles = np.outer(np.arange(time), frequencies)
    angles = np.concatenate([angles, angles], -1)  # (t, d)

    def rotate_half(x):
        return np.concatenate([-x[..., D // 2 :], x[..., : D // 2]], -1)

    def turned(x):  # (heads, t, d)
        return x * np.cos(angles) + rotate_half(x) * np.sin(angles)

    def heads_of(x, weight, bias):
        return (x @ weight.T + bias).reshape(time, -1, D).transpose(1, 0, 2)

    table = get(f"{body}{'embed_tokens' if qwen2 else 'tok_embeddings'}.weight")
    x = table[tokens]
    for i in range(DEPTH):
        own = f"{body}layers.{i}."
        if qwen2:
            y = norm(x, get(f"{own}input_layernorm.weight"))
            q, k, v = (
                heads_of(y, get(f"{own}self_attn.{n}.weight"), get(f"{own}self_attn.{n}.bias"))
                for n in ("q_proj", "k_proj", "v_proj")
            )
            names = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
            out, second = "self_attn.o_proj", "post_attention_layernorm"
        else:
            y = norm(x, get(f"{own}attention_norm.weight"))
            # (t, (h gs d)) -> (t, h, gs, d): the queries of a group, its key, its value.
            fused = (y @ get(f"{own}attention.wqkv.weight").T).reshape(time, KV, -1, D)
            q = fused[:, :, :-2].reshape(time, HEADS, D).transpose(1, 0, 2)
            k, v = (fused[:, :, at].transpose(1, 0, 2) for at in (-2, -1))
            names = ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
            out, second = "attention.wo", "ffn_norm"
        k, v = (np.repeat(part, HEADS // KV, axis=0) for part in (k, v))
        scores = turned(q) @ turned(k).transpose(0, 2, 1) / np.sqrt(D)
        scores = np.where(np.tril(np.ones((time, time), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = (weights @ v).transpose(1, 0, 2).reshape(time, HEADS * D)
        x = x + mixed @ get(f"{own}{out}.weight").T
        y = norm(x, get(f"{own}{second}.weight"))
        gate, up, down = (get(f"{own}{name}.weight") for name in names)
        gate = y @ gate.T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ up.T)) @ down.T
    last = f"{head}{'lm_head' if qwen2 else 'output'}.weight"
    return norm(x, get(f"{body}norm.weight")) @ (get(last) if last in tensors else table).T


def our_logits(params, shape, tokens):
    """The logits of one text by our blocks."""
    there = jnp.ones((1, len(tokens)), bool)
    table = jnp.asarray(params["embedding"]["embedding"], jnp.float32)
    x = table[jnp.asarray(tokens)][None]
    blocks = Blocks(shape, DEPTH)
    x, _ = blocks.apply({"params": params["body"]}, x, positions_of(there), causal_mask(there))
    x = RMSNorm(shape.epsilon).apply({"params": params["norm"]}, x)[0]
    return x @ (params["output"]["kernel"] if "output" in params else table.T)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", WHERE)
def test_what_is_loaded_computes_what_torch_does(tmp_path, layout, tied):
    tensors = checkpoint(layout, tied=tied)
    path = write(tmp_path / "model.safetensors", tensors)
    shape = shape_of(layout)
    params, left = decoders.load_decoder(path, "auto", shape, DEPTH, tied=tied)
    assert left == () and ("output" in params) != tied
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 9)
    wanted = torch_logits(tensors, layout, tokens)
    assert np.std(wanted) > 0.5
    with jax.default_matmul_precision("highest"):
        made = our_logits(params, shape, tokens)
    np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("layout", WHERE)
def test_there_and_back_every_byte_is_the_same(tmp_path, layout, dtype):
    tensors = checkpoint(layout, jnp.dtype(dtype))
    shape = shape_of(layout)
    # With what is on the edge of the type: the smallest numbers, and a zero below zero.
    first = tensors[min(tensors)]
    first.reshape(-1)[:3] = [-0.0, jnp.finfo(dtype).smallest_subnormal, jnp.finfo(dtype).max]
    write(tmp_path / "model.safetensors", tensors)
    params, _ = decoders.load_decoder(tmp_path, layout, shape, DEPTH)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(dtype)}
    params = jax.tree.map(jnp.asarray, params)
    assert decoders.save_decoder(tmp_path / "again", params, layout, shape) == ()
    again = read(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, x in tensors.items():
        assert (again[name].dtype, again[name].shape) == (x.dtype, x.shape)
        assert again[name].tobytes() == x.tobytes(), name
    with safetensors.safe_open(tmp_path / "again" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_layouts_become_one_another(tmp_path):
    """A fused tensor holds, group by group, what the three of the other architecture hold."""
    tensors = checkpoint("internlm2")
    params, _ = layouts.params_of(tensors, "internlm2", INTERNLM2, DEPTH)
    apart, _ = layouts.tensors_of(params, "qwen2", INTERNLM2)
    q, k, v = (apart[f"model.layers.1.self_attn.{n}_proj.weight"] for n in "qkv")
    group = HEADS // KV * D
    pieces = []
    for i in range(KV):
        pieces += [q[i * group : (i + 1) * group]]
        pieces += [k[i * D : (i + 1) * D], v[i * D : (i + 1) * D]]
    fused = tensors["model.layers.1.attention.wqkv.weight"]
    np.testing.assert_array_equal(np.concatenate(pieces), fused)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("multimodal", [False, True])
def test_the_models_of_transformers_are_read_and_read_what_is_written(tmp_path, multimodal, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    text = {
        "hidden_size": WIDTH * 2,
        "intermediate_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "num_hidden_layers": DEPTH,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        "tie_word_embeddings": tied,
    }
    if multimodal:
        text["rope_parameters"]["mrope_section"] = [1, 1, 0]
        eyes = {"depth": 1, "embed_dim": 16, "hidden_size": WIDTH * 2, "num_heads": 2}
        config = transformers.Qwen2VLConfig(
            text_config=text, vision_config=eyes, tie_word_embeddings=tied
        )
        kind = transformers.Qwen2VLForConditionalGeneration
    else:
        config, kind = transformers.Qwen2Config(**text), transformers.Qwen2ForCausalLM
    torch.manual_seed(0)
    theirs = kind(config).float().eval()
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 9)

    @torch.no_grad()
    def logits_of(model):
        return model.float().eval()(input_ids=torch.tensor(tokens)[None]).logits[0].numpy()

    with torch.no_grad():
        for name, x in theirs.named_parameters():
            x.copy_(torch.randn_like(x) / 3 + ("norm" in name))
    theirs.tie_weights()
    wanted = logits_of(theirs)
    # By the names that were published, and by those of the modules.
    for original, layout in ((True, "qwen2"), (False, ("qwen2", "qwen2_in_vlm")[multimodal])):
        folder = tmp_path / str(original)
        theirs.save_pretrained(folder, save_original_format=original)
        shape, depth, vocabulary, said = decoders.decoder_shape(folder)
        assert (depth, vocabulary, said) == (DEPTH, VOCABULARY, tied)
        assert layouts.recognized(read(folder / "model.safetensors")) == layout
        params, left = decoders.load_decoder(folder, "auto", shape, depth, tied=tied)
        assert all("visual." in name for name in left) and bool(left) == multimodal
        made = our_logits(params, shape, tokens)
        np.testing.assert_allclose(made, wanted, rtol=1e-4, atol=1e-4)
    if not multimodal:
        for limit in (10**9, 3000):
            folder = tmp_path / f"{limit}"
            decoders.save_decoder(folder, params, "qwen2", shape, shard_bytes=limit)
            config.save_pretrained(folder)
            np.testing.assert_array_equal(logits_of(kind.from_pretrained(folder)), wanted)


# -------------------------------------------------------------------------------------- shards


def sharded(folder, tensors, count=3):
    """Shards and their index, as other programs write them."""
    names = sorted(tensors)
    where = {n: f"model-{i % count + 1:05}-of-{count:05}.safetensors" for i, n in enumerate(names)}
    for file in sorted(set(where.values())):
        write(folder / file, {n: tensors[n] for n in names if where[n] == file})
    size = sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_shards_are_read_by_their_index(tmp_path):
    tensors = checkpoint("qwen2")
    sharded(tmp_path, tensors)
    params, _ = decoders.load_decoder(tmp_path, "auto", QWEN2, DEPTH)
    whole, _ = layouts.params_of(tensors, "qwen2", QWEN2, DEPTH)
    jax.tree.map(np.testing.assert_array_equal, params, whole)


def test_shards_are_written_with_an_index(tmp_path):
    tensors = checkpoint("internlm2", jnp.bfloat16)
    params, _ = layouts.params_of(tensors, "internlm2", INTERNLM2, DEPTH)
    decoders.save_decoder(tmp_path, params, "internlm2", INTERNLM2, shard_bytes=1500)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(p.name for p in tmp_path.iterdir()) == [*files, "model.safetensors.index.json"]
    found = {}
    for file in files:
        held = read(tmp_path / file)
        assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= 1500
        assert all(index["weight_map"][name] == file for name in held)
        found |= held
    assert found.keys() == tensors.keys() == index["weight_map"].keys()
    assert all(found[name].tobytes() == x.tobytes() for name, x in tensors.items())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    again, _ = decoders.load_decoder(tmp_path, "auto", INTERNLM2, DEPTH)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    # One file there would be read before the shards, or beside them.
    with pytest.raises(InputError, match=r"holds model-00001.* of other weights"):
        decoders.save_decoder(tmp_path, params, "internlm2", INTERNLM2)
    assert not (tmp_path / "model.safetensors").exists()
    decoders.save_decoder(tmp_path, params, "internlm2", INTERNLM2, shard_bytes=1500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["weight_map"].update(x="../other.safetensors"), "beside it"),
        (lambda index: index["weight_map"].update(x=3), "beside it"),
        (lambda index: index.pop("weight_map"), "beside it"),
        (lambda index: index["weight_map"].update(x="model-9.safetensors"), "9.* is no file"),
        (
            lambda index: index["weight_map"].update(x="model-00001-of-00003.safetensors"),
            "names x, and its shards lack them",
        ),
    ],
)
def test_an_index_of_other_files_is_refused(tmp_path, change, message):
    index = sharded(tmp_path, checkpoint("qwen2"))
    change(index)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        decoders.load_decoder(tmp_path, "auto", QWEN2, DEPTH)


# -------------------------------------------------------------------------- what does not fit


def loaded(tensors, layout="qwen2", shape=QWEN2, depth=DEPTH, **rest):
    return layouts.params_of(tensors, layout, shape, depth, **rest)


def test_what_is_no_part_of_the_decoder_is_listed():
    tensors = checkpoint("qwen2")
    others = {"visual.patch.weight": np.zeros(2, np.int8), "a": np.zeros((), np.float64)}
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    params, left = loaded(tensors | others | computed)
    assert left == ("a", *computed, "visual.patch.weight")
    jax.tree.map(np.testing.assert_array_equal, params, loaded(tensors)[0])


@pytest.mark.parametrize(
    ("name", "x"),
    [
        ("lm_head.bias", np.zeros(VOCABULARY, np.float32)),
        ("model.norm.bias", np.zeros(WIDTH, np.float32)),
        ("model.layers.1.self_attn.q_norm.weight", np.zeros(D, np.float32)),
        (f"model.layers.{DEPTH}.mlp.up_proj.weight", np.zeros((HIDDEN, WIDTH), np.float32)),
    ],
)
def test_parts_of_the_decoder_without_a_place_are_refused(name, x):
    with pytest.raises(InputError, match=f"it has {name}, for which"):
        loaded(checkpoint("qwen2") | {name: x})


def test_biases_are_not_dropped():
    with pytest.raises(InputError, match=r"layers\.0\.self_attn\.k_proj\.bias.* and more, for"):
        loaded(checkpoint("qwen2"), shape=INTERNLM2)
    with pytest.raises(InputError, match="layout has no biases"):
        loaded(checkpoint("internlm2"), "internlm2", QWEN2)
    params, _ = loaded(checkpoint("qwen2"))
    for layout in ("qwen2", "internlm2"):
        with pytest.raises(InputError, match="no place for body/stack/k/bias"):
            layouts.tensors_of(params, layout, INTERNLM2)


def test_what_is_missing_is_named(tmp_path):
    tensors = checkpoint("qwen2")
    del tensors["model.layers.2.mlp.up_proj.weight"], tensors["model.norm.weight"]
    wanted = r"lacks model\.norm\.weight, model\.layers\.2\.mlp\.up_proj\.weight$"
    with pytest.raises(InputError, match=wanted):
        loaded(tensors)
    # Nor is any memory taken for blocks that are not there.
    with pytest.raises(InputError, match=r"lacks model\.layers\.3\.[^,]*,.*, [^,]* and more"):
        loaded(checkpoint("qwen2"), depth=10**12)
    with pytest.raises(InputError, match=r"lacks lm_head\.weight; if the head is tied, say"):
        loaded(checkpoint("qwen2", tied=True))
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(InputError, match=r"a\.safetensors does not give this decoder: it lacks"):
        decoders.load_decoder(path, "qwen2", QWEN2, DEPTH)
    params, _ = loaded(checkpoint("qwen2"))
    del params["body"]["stack"]["o"]
    with pytest.raises(InputError, match="the parameters lack body/stack/o/kernel"):
        layouts.tensors_of(params, "qwen2", QWEN2)


def test_a_tied_head_is_the_table_or_is_refused():
    tensors = checkpoint("qwen2")
    with pytest.raises(InputError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        loaded(tensors, tied=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    params, left = loaded(tensors, tied=True)
    assert left == ("lm_head.weight",) and "output" not in params


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("model.embed_tokens.weight", (VOCABULARY, 13), r"\(any, 12\)"),
        ("model.embed_tokens.weight", (VOCABULARY,), r"\(any, 12\)"),
        ("model.norm.weight", (13,), r"\(12,\)"),
        ("lm_head.weight", (WIDTH, VOCABULARY), r"\(17, 12\)"),
        ("model.layers.1.self_attn.k_proj.weight", (HEADS * D, WIDTH), r"\(8, 12\)"),
        ("model.layers.1.mlp.down_proj.weight", (HIDDEN, WIDTH), r"\(12, 20\)"),
    ],
)
def test_other_shapes_are_named(name, shape, wanted):
    tensors = checkpoint("qwen2") | {name: np.zeros(shape, np.float32)}
    has = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(InputError, match=f"{name} has the shape {has}, the decoder wants {wanted}"):
        loaded(tensors)


def test_a_fused_tensor_of_another_shape_is_named():
    name = "model.layers.0.attention.wqkv.weight"
    tensors = checkpoint("internlm2") | {name: np.zeros((HEADS * 3 * D, WIDTH), np.float32)}
    with pytest.raises(InputError, match=rf"{name} has the shape \(72, 12\), .* wants \(40, 12\)"):
        loaded(tensors, "internlm2", INTERNLM2)


def test_other_types_and_numbers_are_refused():
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = checkpoint("qwen2")
    for dtype in ("int8", "float64"):
        with pytest.raises(InputError, match=f"{name} is {dtype}; it must be bfloat16"):
            loaded(tensors | {name: tensors[name].astype(dtype)})
    with pytest.raises(InputError, match=f"{name} is float16, the same of the first .* float32"):
        loaded(tensors | {name: tensors[name].astype(np.float16)})
    broken = tensors[name].copy()
    broken[2, 3] = np.inf
    with pytest.raises(InputError, match=f"{name} holds values that are not finite"):
        loaded(tensors | {name: broken})


def test_parameters_that_do_not_fit_are_not_written(tmp_path):
    folder = tmp_path / "out"

    def save(params, layout="internlm2"):
        decoders.save_decoder(folder, params, layout, INTERNLM2)

    good, _ = loaded(checkpoint("internlm2"), "internlm2", INTERNLM2)
    flat = traverse_util.flatten_dict(good, sep="/")

    def changed(path, change):
        return traverse_util.unflatten_dict(flat | {path: change(flat[path])}, sep="/")

    with pytest.raises(Diverged, match="body/stack/up/kernel is not finite"):
        save(changed("body/stack/up/kernel", lambda x: x * np.nan))
    with pytest.raises(InputError, match=r"up/kernel has the shape \(3, 12\), .*\(3, 12, 20\)"):
        save(changed("body/stack/up/kernel", lambda x: x[:, :, 0]))
    with pytest.raises(InputError, match=r"k/kernel has the shape \(2, 12, 8\), .*\(3, 12, 8\)"):
        save(changed("body/stack/k/kernel", lambda x: x[:2]))
    with pytest.raises(InputError, match=r"output/kernel has the shape \(12, 16\), .*\(12, 17\)"):
        save(changed("output/kernel", lambda x: x[:, 1:]))
    with pytest.raises(InputError, match="norm/scale is float64"):
        save(changed("norm/scale", lambda x: x.astype(np.float64)))
    with pytest.raises(InputError, match="become one tensor, and differ in their types"):
        save(changed("body/stack/k/kernel", lambda x: x.astype(np.float16)))
    with pytest.raises(InputError, match="there is no layout 'auto'; choose from qwen2, "):
        save(good, "auto")
    assert not folder.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*: Not a directory"):
        decoders.save_decoder(tmp_path / "file" / "a", good, "internlm2", INTERNLM2)


# ---------------------------------------------------------------------------- auto, damaged files


def test_auto_knows_every_layout_and_no_other():
    for layout in WHERE:
        assert layouts.recognized(checkpoint(layout, tied=True)) == layout
    assert set(WHERE) == set(layouts.LAYOUTS)
    other = {"transformer.wte.weight": 0, "transformer.h.0.ln_1.weight": 0}
    with pytest.raises(InputError, match=r"no layout has names such as transformer\.h.*: qwen2, q"):
        layouts.recognized(other)
    with pytest.raises(
        InputError, match=r"^several layouts have .* which it is: qwen2, internlm2$"
    ):
        layouts.recognized([*checkpoint("qwen2"), *checkpoint("internlm2")])


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = write(tmp_path / "model.safetensors", checkpoint("qwen2"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged .*; copy it again"):
        decoders.load_decoder(tmp_path, "auto", QWEN2, DEPTH)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damage_is_told_or_is_in_the_numbers_alone(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("layouts")
    tensors = checkpoint("internlm2")
    sharded(folder, tensors)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip", "replace"]))
    # Most of a file are numbers, and its header comes first.
    place = data.draw(st.integers(0, min(len(content), 1000) - 1))
    if kind == "cut":
        path.write_bytes(content[:place])
    elif kind == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
    else:
        path.write_bytes(data.draw(st.binary(max_size=200)))
    try:
        params, _ = decoders.load_decoder(folder, "internlm2", INTERNLM2, DEPTH)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert kind == "flip"
        whole, _ = loaded(tensors, "internlm2", INTERNLM2)
        assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, whole)


def test_types_that_numpy_does_not_have_are_refused(tmp_path):
    tensors = checkpoint("qwen2")
    name = "model.layers.1.mlp.down_proj.weight"
    path = write(tmp_path / "a.safetensors", tensors | {name: tensors[name].astype(np.uint8)})
    content = path.read_bytes()
    assert content.count(b'"U8"') == 1
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].replace(b'"U8"', b'"F8_E5M2"').rstrip()
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    with pytest.raises(InputError, match=f"does not give this decoder: {name} "):
        decoders.load_decoder(path, "qwen2", QWEN2, DEPTH)


def test_where_nothing_is(tmp_path):
    for path in (tmp_path, tmp_path / "a.safetensors"):
        with pytest.raises(InputError, match="is no file, and no folder with model"):
            decoders.load_decoder(path, "auto", QWEN2, DEPTH)
    (tmp_path / "model.safetensors.index.json").write_text("[" * 10_000)
    with pytest.raises(InputError, match="is no index of shards"):
        decoders.load_decoder(tmp_path, "auto", QWEN2, DEPTH)


# ------------------------------------------------------------------------------- a student of ours


@pytest.mark.parametrize(
    ("layout", "tied"), [("qwen2_in_vlm", True), ("internlm2_in_internvl", False)]
)
def test_a_student_that_went_out_and_came_back_writes_the_same(tmp_path, layout, tied):
    shape = shape_of(layout)
    model = VLM(VOCABULARY, shape, DEPTH, 4, (8, 8, 1), tied)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(2, 8, 8, 1)), jnp.float32)
    tokens = jnp.asarray(rng.integers(2, VOCABULARY, (2, 5)))
    there = jnp.arange(5) < jnp.array([[5], [3]])
    shapes = jax.eval_shape(model.init, jax.random.key(0), images, tokens, there)["params"]
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)

    left = decoders.save_decoder(tmp_path, params, layout, shape, shard_bytes=5000)
    mine = {"places", "projector_0", "projector_1", "vision"}
    assert {path.partition("/")[0] for path in left} == mine and len(left) == 7
    decoder, rest = decoders.load_decoder(tmp_path, "auto", shape, DEPTH, tied=tied)
    assert rest == () and decoder.keys() | mine == params.keys()
    again = {name: params[name] for name in mine} | decoder
    jax.tree.map(np.testing.assert_array_equal, again, params)

    write_answers = jax.jit(
        lambda params: generate(model, params, images, tokens, there, length=6, eos=1)
    )
    made, wanted = write_answers(again), write_answers(params)
    jax.tree.map(np.testing.assert_array_equal, made, wanted)
    assert len(np.unique(wanted.tokens)) > 2
