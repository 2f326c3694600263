import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.errors import InputError
from jaxdistill.nn.decoder import BlockShape, causal_mask, rotated
from jaxdistill.nn.recalibrator import Recalibrator
from jaxdistill.nn.vlm import VLM
from jaxdistill.vlm.decoding import generate

BLOCK = BlockShape(16, 4, 2, 24, qkv_bias=True)
MODEL = VLM(11, BLOCK, 2, 4, (8, 8, 1))


@pytest.fixture(scope="module")
def read():
    """Images, questions padded to different lengths, parameters."""
    keys = jax.random.split(jax.random.key(0), 3)
    images = jax.random.normal(keys[0], (3, 8, 8, 1))
    tokens = jax.random.randint(keys[1], (3, 5), 2, 11)
    there = jnp.arange(5) < jnp.array([[5], [3], [1]])
    # Away from the start, where attention hardly tells one token from another.
    params = jax.jit(MODEL.init)(keys[2], images, tokens, there)["params"]
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x + 0.1, params)
    return images, tokens, there, params


def _attention64(x, params, shape, there):
    """One block in float64 by NumPy, token by token and head by head."""
    d, half = shape.length(), shape.length() // 2
    positions = np.maximum(np.cumsum(there) - 1, 0)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + shape.epsilon) * scale

    def turn(vector, position):
        out = vector.copy()
        for i in range(half):
            angle = position * shape.rope_theta ** (-i / half)
            a, b = vector[i], vector[i + half]
            out[i] = a * np.cos(angle) - b * np.sin(angle)
            out[i + half] = b * np.cos(angle) + a * np.sin(angle)
        return out

    y = norm(x, params["attention_norm"]["scale"])
    q, k, v = (y @ params[n]["kernel"] + params[n]["bias"] for n in "qkv")
    mixed = np.zeros((len(x), shape.heads * d))
    for h in range(shape.heads):
        own = h // (shape.heads // shape.kv_heads)
        for t in range(len(x)):
            query = turn(q[t, h * d : (h + 1) * d], positions[t])
            seen = [s for s in range(t + 1) if there[s]]
            keys = [turn(k[s, own * d : (own + 1) * d], positions[s]) for s in seen]
            scores = np.exp([query @ key / np.sqrt(d) for key in keys])
            values = v[seen, own * d : (own + 1) * d]
            mixed[t, h * d : (h + 1) * d] = scores @ values / scores.sum()
    x = x + mixed @ params["o"]["kernel"]
    y = norm(x, params["mlp_norm"]["scale"])
    gate = y @ params["gate"]["kernel"]
    return (
        x + (gate / (1 + np.exp(-gate)) * (y @ params["up"]["kernel"])) @ params["down"]["kernel"]
    )


def test_the_model_is_what_its_parts_say_in_float64(read):
    images, tokens, there, params = read
    hidden = MODEL.apply({"params": params}, images, tokens, there, method="encode")
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for i in range(3):
        image = np.asarray(images[i], np.float64).reshape(2, 4, 2, 4).swapaxes(1, 2).reshape(4, 16)

        def gelu(x):
            return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

        x = gelu(image @ p["vision"]["kernel"] + p["vision"]["bias"]) + p["places"]
        for layer, act in (("projector_0", gelu), ("projector_1", lambda x: x)):
            x = act(x @ p[layer]["kernel"] + p[layer]["bias"])
        x = np.concatenate([x, p["embedding"]["embedding"][np.asarray(tokens[i])]])
        seen = np.concatenate([np.ones(4, bool), np.asarray(there[i])])
        for layer in range(2):
            own = jax.tree.map(lambda x, layer=layer: x[layer], p["body"]["stack"])
            x = _attention64(x, own, BLOCK, seen)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["norm"]["scale"]
        np.testing.assert_allclose(hidden[i][seen], x[seen], rtol=2e-4, atol=2e-5)


def test_padding_changes_nothing_and_the_future_neither(read):
    images, tokens, there, params = read
    encode = jax.jit(lambda t: MODEL.apply({"params": params}, images, t, there, method="encode"))
    hidden = encode(tokens)
    seen = jnp.concatenate([jnp.ones((3, 4), bool), there], 1)
    other = encode(jnp.where(there, tokens, 7))
    np.testing.assert_array_equal(hidden[seen], other[seen])
    later = encode(tokens.at[:, 2].set(1))
    np.testing.assert_array_equal(hidden[:, :6], later[:, :6])
    assert np.abs(hidden[0, 6:] - later[0, 6:]).max() > 1e-3


def test_positions_turn_by_their_difference_alone():
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    place = lambda x, p: rotated(x, jnp.array([[p]]), 100.0).reshape(-1)  # noqa: E731
    near, far = place(x, 3) @ place(y, 1), place(x, 30) @ place(y, 28)
    np.testing.assert_allclose(near, far, rtol=1e-5)
    assert not np.isclose(near, place(x, 3) @ place(y, 2), rtol=1e-2)


@pytest.mark.slow
def test_writing_is_reading_what_was_written(read):
    images, tokens, there, params = read
    key = jax.random.split(jax.random.key(5), 3)
    for keys in (None, key):
        made = generate(
            MODEL, params, images, tokens, there, length=6, eos=1, keys=keys, temperature=1.0
        )
        # All at once, the answers behind the questions.
        both = jnp.concatenate([tokens, made.tokens], 1)
        seen = jnp.concatenate([there, made.there], 1)
        logits = MODEL.apply({"params": params}, images, both, seen)
        log_probs = jax.nn.log_softmax(logits)
        for i in range(3):
            last = 3 + int(there[i].sum())
            where = [last, *range(4 + 5, 4 + 5 + 5)]
            for j in range(6):
                if made.there[i, j]:
                    row = log_probs[i, where[j]]
                    if keys is None:
                        assert made.tokens[i, j] == row.argmax()
                    said = made.log_probs[i, j]
                    np.testing.assert_allclose(said, row[made.tokens[i, j]], atol=2e-5)
        ends = np.asarray(made.tokens == 1).cumsum(1) > 0
        np.testing.assert_array_equal(made.there[:, 1:], ~ends[:, :-1])
    alone = generate(
        MODEL, params, images[:1], tokens[:1], there[:1], length=6, eos=1, keys=key[:1]
    )
    np.testing.assert_array_equal(alone.tokens[0], made.tokens[0])  # an example's key is its own


def test_published_sizes():
    # Paper's table 6a: Recalibrators of 524.8 and 503.3 million parameters.
    def millions(block):
        net = Recalibrator(block, 8192, norm="none")
        args = (jnp.zeros((1, 2, block.width)), jnp.ones((1, 2), bool), jnp.zeros((1, 3, 8192)))
        made = jax.eval_shape(net.init, jax.random.key(0), *args, jnp.ones((1, 3), bool))
        return sum(x.size for x in jax.tree.leaves(made)) / 1e6

    qwen = BlockShape(3584, 28, 4, 18_944, head_dim=128, qkv_bias=True)
    intern = BlockShape(4096, 32, 8, 14_336, head_dim=128)
    assert round(millions(qwen), 1) == 524.8 and round(millions(intern), 1) == 503.3


def test_a_recalibrated_prefix_knows_no_answer_and_padding_is_nothing():
    keys = jax.random.split(jax.random.key(1), 3)
    prefix, answer = jax.random.normal(keys[0], (2, 4, 16)), jax.random.normal(keys[1], (2, 3, 20))
    there = jnp.arange(4) < jnp.array([[4], [2]]), jnp.ones((2, 3), bool)
    net = Recalibrator(BLOCK, 20)
    params = jax.jit(net.init)(keys[2], prefix, there[0], answer, there[1])
    # The same parameters whoever the prefix is of.
    whose = functools.partial(net.init, prefix_from_teacher=True)
    longer = jnp.zeros((2, 6, 20)), jnp.ones((2, 6), bool)
    other = jax.eval_shape(whose, keys[2], *longer, answer, there[1])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, other)
    params = jax.tree.map(lambda x: 5 * x, params)
    apply = jax.jit(lambda p, a: net.apply(params, p, there[0], a, there[1]))
    q, a = apply(prefix, answer)
    q2, a2 = apply(prefix, answer.at[:, 1:].add(1.0))
    np.testing.assert_array_equal(q, q2)
    np.testing.assert_array_equal(a[:, :1], a2[:, :1])
    _, a3 = apply(jnp.where(there[0][..., None], prefix, 9.0), answer)
    np.testing.assert_array_equal(a, a3)
    _, a4 = apply(prefix.at[:, 0].add(1.0), answer)
    assert np.abs(a - a4).max() > 1e-3


@pytest.mark.parametrize("wrong", [{"heads": 3}, {"head_dim": 3}])
def test_heads_that_cannot_be_made(wrong):
    with pytest.raises(InputError, match="heads"):
        BLOCK._replace(**wrong).length()


def test_a_causal_mask_leaves_padding_out():
    there = jnp.array([[True, True, False, True]])
    whole = causal_mask(there)
    np.testing.assert_array_equal(whole[0, 3], [True, True, False, True])
    np.testing.assert_array_equal(whole[0, 1], [True, True, False, False])
