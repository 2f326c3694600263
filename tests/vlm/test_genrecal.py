"""The family of vision-language models: its texts, its losses, its stages, a run."""

import contextlib
import functools
import io
import json
import re
import shutil
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxdistill
from jaxdistill import config as configs
from jaxdistill import keywords, settings
from jaxdistill.data import sources, text, vqa
from jaxdistill.data.device import draw
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.eval import answers
from jaxdistill.io import decoders, weights
from jaxdistill.nn.recalibrator import Recalibrator
from jaxdistill.nn.vlm import part_of
from jaxdistill.tasks import languages, vlm
from jaxdistill.vlm import across, dskd, genrecal, llava_kd, logits, losses
from jaxdistill.vlm.decoding import Written
from jaxdistill.vlm.diagnosis import diagnosis
from jaxdistill.vlm.genrecal import recalibrated_losses
from jaxdistill.vlm.groups import Groups
from jaxdistill.vlm.pairs import (
    TokenisedPair,
    answer_logits,
    encoded,
    predicting,
    states,
    teacher_states,
)
from tests.pages import Page
from tests.test_backends import differences, run_on
from tests.test_method_contract import together

SMOKE = "genrecal:smoke"
WORDS = ["café ou thé?", "no", "yes, 😀", "where is the bag?"]


@pytest.fixture(scope="module")
def questions():
    return vqa.grid(sources.load("digits"), train=300, validation=60, test=60)


class Ready(NamedTuple):
    """A task with both models, fresh, a batch of it, and the method with its programs."""

    resolved: Any
    task: Any
    pair: Any
    frozen: Any
    batch: Any
    method: Any


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    resolved = settings.resolve(configs.load(SMOKE))
    loaded = resolved.family.load(resolved, tmp_path_factory.mktemp("task"), lambda: False)
    task = loaded.task
    batch = draw(task.batches(4), task.examples.load(), jax.random.key(0))
    keys = dict(zip(("teacher", "student"), jax.random.split(jax.random.key(1)), strict=True))
    # Away from the start, where a model hardly looks at its images.
    frozen = {
        side: jax.tree.map(
            lambda x: 6 * x if x.ndim > 1 else x, jax.jit(getattr(task, f"{side}_model").init)(key)
        )
        for side, key in keys.items()
    }
    method = resolved.rows["genrecal"].recipe(task).method  # of two steps a stage
    method = method._replace(init=jax.jit(method.init), step=jax.jit(method.step))
    return Ready(resolved, task, task.pair(batch), frozen, batch, method)


# ---------------------------------------------------------------------------- texts


@pytest.mark.parametrize("kind", ["characters", "bytes", "bpe:262"])
def test_texts_come_back_and_lie_in_bytes(kind, tmp_path):
    by = text.tokenizer(kind, WORDS)
    made = text.tokens(by, WORDS, text.EOS)
    for words, ids, there in zip(WORDS, *made, strict=True):
        assert text.answer_text(by, ids) == words
        assert b"".join(by.pieces[i] for i in ids[there]) == words.encode()
        assert ids[there][-1] == text.EOS and not (ids[~there] != text.PAD).any()
    assert by.size == len(by.pieces) and by.pieces[:3] == (b"", b"", b"")
    (tmp_path / "tokenizer.json").write_text(by.stored)
    for again in (text.tokenizer(kind, WORDS), text.tokenizer(f"{tmp_path}/tokenizer.json", [])):
        assert again.fingerprint() == by.fingerprint()
        assert [again.split(words) for words in WORDS] == [by.split(words) for words in WORDS]
    others = {"characters", "bytes", "bpe:262"} - {kind}
    assert by.fingerprint() not in {text.tokenizer(k, WORDS).fingerprint() for k in others}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("words", "no tokenizer is called words: give characters"),
        ("bpe:20", "byte-pair encodings start at 259 ids"),
        ("nowhere.json", "nowhere.json is no file"),
    ],
)
def test_tokenizers_that_are_none(kind, said):
    with pytest.raises(InputError, match=said):
        text.tokenizer(kind, WORDS)


def test_tokenizers_of_one_vocabulary_and_other_rules_are_two(tmp_path):
    made = json.loads(text.tokenizer("bpe:264", WORDS * 3).stored)
    prints = set()
    for change in ("nothing", "merges", "space", "padding"):
        said = json.loads(json.dumps(made))
        if change == "merges":
            said["model"]["merges"].reverse()
        if change == "space":
            said["pre_tokenizer"]["add_prefix_space"] = True
        if change == "padding":
            said["padding"] = {
                "strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
            }  # fmt: skip
        path = tmp_path / f"{change}.json"
        path.write_text(json.dumps(said))
        if change == "space":
            with pytest.raises(InputError, match="puts a space before a text"):
                text.tokenizer(str(path), [])
            continue
        prints.add(text.tokenizer(str(path), []).fingerprint())
    assert len(prints) == 2  # padding says nothing of how a text is split


def test_texts_that_do_not_fit():
    by = text.tokenizer("characters", WORDS)
    with pytest.raises(InputError, match="takes 5 tokens of characters, and there is room for 4"):
        text.tokens(by, ["no", "nooo"], text.EOS, 4)
    with pytest.raises(InputError, match="no token is 'z'"):
        by.split("zoo")


def test_byte_level_letters_are_all_bytes():
    assert text.byte_level("Ġhello") == b" hello" and text.byte_level("Ċ") == b"\n"
    assert text.byte_level("Ã©") == "é".encode()
    letters = "".join(text._BYTES)
    assert sorted(text.byte_level(letters)) == list(range(256))
    with pytest.raises(InputError, match="stands for no byte"):
        text.byte_level("a b")


# ---------------------------------------------------------------------------- questions


def test_answers_are_what_the_pictures_show(questions):
    """Each answer, found anew from the pictures, whose cells are images of the set."""
    data = sources.load("digits")
    known = {image.tobytes(): label for image, label in zip(*data.train, strict=True)}
    places = ("top left", "top right", "bottom left", "bottom right")
    name = [n.lower() for n in data.class_names]
    for image, question, answer, kind in zip(*questions.train, strict=True):
        cells = image.reshape(2, 8, 2, 8, 1).swapaxes(1, 2).reshape(4, 8, 8, 1)
        seen = [name[known[np.ascontiguousarray(cell).tobytes()]] for cell in cells]
        kind = vqa.KINDS[kind]
        if kind == "describe":
            assert answer == "top row: {} and {}. bottom row: {} and {}.".format(*seen)
            continue
        if kind in ("at", "next"):
            (place,) = (i for i, p in enumerate(places) if p in question)
            moves = {"beside": 1, "below": 2, "above": 2, "diagonally": 3}
            move = next((m for word, m in moves.items() if word in question), 0)
            assert (move > 0) == (kind == "next") and answer == seen[place ^ move]
            continue
        words = question.replace("?", " ").replace(".", " ").replace(":", " ").split()
        (asked,) = set(words) & set(name)
        there = [s == asked for s in seen]
        if kind == "count":
            assert answer == ("zero", "one", "two", "three", "four")[sum(there)]
        elif kind == "exist":
            assert answer == ("yes" if any(there) else "no")
        elif kind == "where":
            assert sum(there) == 1 and answer == f"at the {places[there.index(True)]}"
        else:
            top, bottom = sum(there[:2]), sum(there[2:])
            assert answer == ("same", "top", "bottom")[(top > bottom) + 2 * (bottom > top)]


def test_no_image_is_in_two_splits_and_a_seed_says_all(questions):
    cells = [
        {c.tobytes() for x in part.images for row in np.split(x, 2) for c in np.split(row, 2, 1)}
        for part in (questions.train, questions.validation, questions.test)
    ]
    assert not cells[0] & cells[1] and not cells[0] & cells[2] and not cells[1] & cells[2]
    make = functools.partial(vqa.grid, sources.load("digits"), validation=60, test=60)
    longer, other = make(train=320), make(train=300, seed=1)
    for one, two in zip(longer.train, questions.train, strict=True):
        np.testing.assert_array_equal(one[:300], two)
    assert longer.test.fingerprint(vqa.KINDS) == questions.test.fingerprint(vqa.KINDS)
    assert other.test.fingerprint(vqa.KINDS) != questions.test.fingerprint(vqa.KINDS)
    assert questions.test.fingerprint(vqa.KINDS[::-1]) != questions.test.fingerprint(vqa.KINDS)
    guessed = answers.majority(questions.train, questions.test)
    right = np.array([a == b for a, b in zip(guessed, questions.test.answers, strict=True)])
    assert 0.05 < right.mean() < 0.4  # asked evenly, and no more can be guessed


@pytest.fixture
def own(tmp_path):
    """A folder with six questions about three pictures, and two to be tested on."""
    folder = tmp_path / "shelves"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c", "d"):
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    line = '{{"image": "{}.png", "question": "how many {}?", "answer": "{}"}}'
    rows = [line.format(n, w, a) for n in "abc" for w, a in (("jars", "two"), ("cups", "no"))]
    (folder / "train.jsonl").write_text("\n".join(rows))
    (folder / "test.jsonl").write_text(line.format("d", "cups", "two") + "\n")
    return folder


def test_questions_of_ones_own(own):
    data = vqa.folder(own, train=100, validation=100, test=100)
    assert data.name == "shelves" and data.kinds == ("questions",)
    # Both questions about the last picture are held out.
    assert [len(x.answers) for x in (data.train, data.validation, data.test)] == [4, 2, 1]
    np.testing.assert_array_equal(data.validation.images[0], np.asarray(Image.open(own / "c.png")))
    first = np.asarray(Image.open(own / "a.png"))
    np.testing.assert_array_equal(data.train.images[1], first)
    assert data.train.questions[:2] == ("how many jars?", "how many cups?")
    assert data.train.answers[:2] == ("two", "no")
    few = vqa.folder(own, train=2, validation=1, test=1, image_size=4)
    assert few.train.images.shape == (2, 4, 4, 3)
    (own / "validation.jsonl").write_text((own / "test.jsonl").read_text())
    assert len(vqa.folder(own, train=9, validation=9, test=9).train.answers) == 6
    config = configs.load("genrecal:smoke,baselines=", {"data.name": str(own)})
    config.teacher.patch, config.student.patch = 4, 8
    resolved = settings.resolve(config)
    task = resolved.family.shapes(resolved)
    assert task.examples.shapes.shapes[0] == (8, 8, 3)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "line 2 is no JSON"),
        ("[1]", "line 2 is no object with image, question and answer"),
        ('{"image": "a.png", "question": "?"}', "line 2 has no answer; each line needs"),
        ('{"image": "no.png", "question": "?", "answer": "x"}', "line 2: 'no.png' is no file in"),
        ('{"image": "../a.png", "question": "?", "answer": "x"}', "'../a.png' is no file in"),
        ('{"image": "a.png", "question": "?", "answer": "x", "kind": 3}', "kind is 3; it must be"),
        ('{"image": "a.png", "question": "\\ud83d", "answer": "x"}', "the question has half a"),
    ],
)
def test_lines_that_are_no_questions(own, line, said):
    good = (own / "train.jsonl").read_text().splitlines()
    (own / "train.jsonl").write_text("\n".join([good[0], line, *good[1:]]))
    with pytest.raises(InputError, match=re.escape(said)) as error:
        vqa.folder(own, train=9, validation=1, test=9)
    assert "\n" not in str(error.value)


def test_signs_that_end_no_line(own):
    line = '{"image": "a.png", "question": "how\u2028many?", "answer": "two"}'
    (own / "test.jsonl").write_text("\ufeff" + line + "\r\n", "utf-8")
    data = vqa.folder(own, train=9, validation=1, test=9)
    assert data.test.questions == ("how\u2028many?",)


def test_folders_that_lack_something(own):
    (own / "test.jsonl").write_text("")
    with pytest.raises(InputError, match=r"no questions for test; give test\.jsonl some lines"):
        vqa.folder(own, train=9, validation=1, test=9)
    (own / "test.jsonl").unlink()
    with pytest.raises(InputError, match=r"test\.jsonl is missing"):
        vqa.folder(own, train=9, validation=1, test=9)


# ---------------------------------------------------------------------------- losses and stages


def test_a_recalibrator_that_does_nothing_loses_nothing(ready):
    """A student that is the teacher, read by the teacher's head as it is."""
    _, task, pair, frozen, *_ = ready
    model, params = task.teacher_model, frozen["teacher"]
    made = states(model, params, pair.images, pair.teacher)
    identity = lambda params, p, _, a, __, **___: (p, a)  # noqa: E731
    for own_prefix in (False, True):
        found = recalibrated_losses(
            identity, (), functools.partial(model.head, params), made, made, pair.teacher.answer,
            own_prefix=own_prefix,
        )  # fmt: skip
        assert float(found.kl[0]) < 1e-4 and float(found.mse[0]) == 0
        said = answer_logits(model, params, pair.images, pair.teacher)
        log_probs = np.asarray(jax.nn.log_softmax(said), np.float64)
        there = np.asarray(pair.teacher.answer_there)
        ids = np.asarray(pair.teacher.answer)
        wanted = -np.take_along_axis(log_probs, ids[..., None], -1)[..., 0][there].sum()
        np.testing.assert_allclose(found.ce[0], wanted, rtol=1e-5)
        assert float(found.ce[1]) == there.sum()


def test_the_first_token_is_read_from_the_student_alone(ready):
    _, task, pair, frozen, *_ = ready
    model, params = task.teacher_model, frozen["teacher"]
    made = states(model, params, pair.images, pair.teacher)
    identity = lambda params, p, _, a, __, **___: (p, a)  # noqa: E731

    def slope(boundary):
        def value(prefix):
            found = recalibrated_losses(
                identity, (), functools.partial(model.head, params),
                made._replace(prefix=prefix), made, pair.teacher.answer,
                own_prefix=False,
                weights=genrecal._weights(
                    pair.teacher.answer_there, genrecal.Recalibration(boundary=boundary)
                ),
            )  # fmt: skip
            return found.ce[0]

        return np.abs(jax.grad(value)(made.prefix)).sum(-1) > 0

    last = pair.teacher.question_there.sum(1) + model.image_tokens - 1
    wanted = np.arange(made.prefix.shape[1]) == np.asarray(last)[:, None]
    np.testing.assert_array_equal(slope("include"), wanted)
    assert not slope("exclude").any()
    # And it is the state from which a model writes its first token.
    first = predicting(made.prefix, made.prefix_there, made.answer)[:, 0]
    written = model.generate(params, pair.images, *pair.teacher[:2], length=1).tokens[:, 0]
    np.testing.assert_array_equal(written, model.head(params, first).argmax(-1))


def test_what_tokens_weigh():
    there = jnp.array([[True, True, True], [True, False, False]])
    weights = lambda **given: genrecal._weights(there, genrecal.Recalibration(**given))  # noqa: E731
    np.testing.assert_array_equal(weights(), there)
    np.testing.assert_array_equal(weights(first=3.0), [[3, 1, 1], [3, 0, 0]])
    np.testing.assert_array_equal(weights(boundary="exclude", first=3.0), [[0, 1, 1], [0, 0, 0]])
    np.testing.assert_allclose(weights(mean="examples", first=2.0), [[0.5, 0.25, 0.25], [1, 0, 0]])


def test_what_a_recalibrator_is_told(ready):
    """Positions of the teacher's own sequence, and which states of the answer it does not see."""
    _, task, pair, frozen, *_ = ready
    own = states(task.student_model, frozen["student"], pair.images, pair.student)
    theirs = states(task.teacher_model, frozen["teacher"], pair.images, pair.teacher)
    module = Recalibrator(task.student_model.block, task.teacher_model.width, 1, hides=True)

    @jax.jit
    def run(params, answer, told):
        return module.apply(
            params, own.prefix, own.prefix_there, answer, theirs.answer_there, **told
        )[1]

    params = jax.jit(module.init)(
        jax.random.key(0), own.prefix, own.prefix_there, theirs.answer, theirs.answer_there
    )
    # Away from the start, where attention is even and positions hardly matter.
    params = jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, params)
    r = genrecal.Recalibration(positions="kept", hide=1.0)
    told = genrecal._seen(theirs, pair.keys, r)
    np.testing.assert_array_equal(
        told["answer_starts"], task.teacher_model.image_tokens + pair.teacher.question_there.sum(1)
    )
    assert told["hidden"].all()
    plain = run(params, theirs.answer, {})
    there = np.asarray(theirs.answer_there)
    same = {"answer_starts": own.prefix_there.sum(1, dtype=jnp.int32)}
    np.testing.assert_allclose(run(params, theirs.answer, same)[there], plain[there], rtol=1e-5)
    kept = run(params, theirs.answer, {"answer_starts": told["answer_starts"]})
    assert np.abs(kept - plain)[there].max() > 1e-3
    # What is hidden is not seen, whatever it is.
    other = jnp.ones_like(theirs.answer)
    blind = [run(params, answer, {"hidden": told["hidden"]}) for answer in (theirs.answer, other)]
    np.testing.assert_array_equal(*blind)
    some = genrecal._seen(theirs, pair.keys, genrecal.Recalibration(hide=0.5))["hidden"]
    assert some.any() and not some.all()


def test_states_before_the_final_norm_make_the_same_model(ready):
    _, task, pair, frozen, *_ = ready
    groups = ready.resolved.groups
    model, params = task.teacher_model, frozen["teacher"]
    before = languages.language(
        groups.model._replace(final_norm="before"), groups.teacher, model.vocabulary,
        pair.images.shape[1:],
    )  # fmt: skip
    said = [
        jax.jit(functools.partial(answer_logits, m))(params, pair.images, pair.teacher)
        for m in (model, before)
    ]
    np.testing.assert_allclose(*said, rtol=1e-5, atol=1e-6)
    hidden = [states(m, params, pair.images, pair.teacher).answer for m in (model, before)]
    assert (hidden[0] != hidden[1]).any()
    args = pair.images, *pair.teacher[:2]
    written = [m.generate(params, *args, length=4).tokens for m in (model, before)]
    np.testing.assert_array_equal(*written)


def test_each_stage_trains_what_it_should_and_nothing_else(ready):
    *_, frozen, batch, method = ready
    _trains(method, frozen, batch, [set(), {"body"}, {"body", "embedding", "projector"}])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "wanted", "moves"),
    [
        (
            {"train_embedding": True, "train_vision": True, "regularize_later": True},
            [set(), {"body", "embedding", "vision"}, {"body", "embedding", "projector", "vision"}],
            (True, True, False),
        ),
        (
            {"train_projector": True, "train_recalibrator": False, "start": "last", "depth": 1},
            [set(), {"body", "projector"}, {"body", "embedding", "projector"}],
            (True, False, False),
        ),
    ],
)
def test_what_else_may_be_trained(ready, flags, wanted, moves):
    row = ready.resolved.rows["genrecal"]
    method = row.module.recipe(ready.task, **row.settings | flags).method
    method = method._replace(init=jax.jit(method.init), step=jax.jit(method.step))
    _trains(method, ready.frozen, ready.batch, wanted, moves, flags.get("regularize_later", False))


def _trains(method, frozen, batch, wanted, moves=(True, True, False), later=False):
    """Six steps, two of each stage: what moves and what does not."""
    state = method.init(jax.random.key(0), frozen, batch)
    for number in range(6):
        after, metrics = method.step(state, frozen, batch, jax.random.key(number))
        changed = jax.tree_util.tree_map_with_path(
            lambda path, a, b: (part_of(path), bool((a != b).any())), state.student, after.student
        )
        pairs = jax.tree.leaves(changed, is_leaf=lambda x: isinstance(x, tuple))
        stage = number // 2
        assert {part for part, moved in pairs if moved} == wanted[stage]
        assert all(moved for part, moved in pairs if part == "body") == (stage > 0)
        moved = jax.tree.map(
            lambda a, b: bool((a != b).any()), state.recalibrator, after.recalibrator
        )
        assert all(jax.tree.leaves(moved)) == any(jax.tree.leaves(moved)) == moves[stage]
        assert (metrics["kl"] > 0) == (stage < 2) and (metrics["sft"] > 0) == (stage > 0)
        assert (metrics["regularizer"] > 0) == (stage == 0 or (later and stage == 1))
        # Moments start anew with a stage.
        assert int(after.opt[1].count) == number % 2 + 1
        state = after


@pytest.mark.parametrize("method", ["genrecal", "sft", "mined", "dskd", "llava_kd"])
def test_what_is_trained_has_float32_under_frozen_bfloat16(method):
    config = configs.load(f"{SMOKE},baselines=,method={method}")
    config.model = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    resolved = settings.resolve(config)
    task = resolved.family.shapes(resolved)
    (row,) = resolved.rows.values()
    recipe = row.recipe(task)
    kinds = {x.dtype for x in jax.tree.leaves(recipe.frozen.shapes)}
    assert kinds == {jnp.dtype("bfloat16")}

    def once(frozen, data, key):
        batch = draw(recipe.method.batches, data, key)
        state = recipe.method.init(key, frozen, batch)
        return state, recipe.method.step(state, frozen, batch, key)[0]

    shapes = recipe.frozen.shapes, task.examples.shapes, jax.random.key(0)
    before, after = jax.eval_shape(once, *shapes)
    assert before == after
    floats = [x.dtype for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}


def test_stages_that_are_none(ready):
    resolved, task, *_ = ready
    empty = dict(resolved.rows["genrecal"].settings, align=0, distil=0, tune=0)
    with pytest.raises(InputError, match="all 0; give a stage some steps"):
        resolved.rows["genrecal"].module.recipe(task, **empty)
    for wrong, said in (
        ({"start": "last", "depth": 2}, "copies the student's last 2 blocks, and it has 1"),
        ({"ce": 0.0, "kl": 0.0}, "are both 0; give one of them, or take supervised"),
        ({"boundary": "exclude", "first": 2.0}, "which method.boundary=exclude leaves out"),
    ):
        with pytest.raises(InputError, match=said):
            resolved.rows["genrecal"].module.recipe(
                task, **resolved.rows["genrecal"].settings | wrong
            )


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 2])
def test_logits_of_some_tokens_at_a_time_make_the_same_step(ready, number):
    resolved, task, _, frozen, batch, method = ready
    row = resolved.rows["genrecal"]
    # Answers are no multiple of five.
    few = {f"{side}_model": getattr(task, f"{side}_model")._replace(slots=5)
           for side in ("teacher", "student")}  # fmt: skip
    assert all(length % 5 for length in task.answer_length)
    other = row.module.recipe(task._replace(**few), **row.settings).method
    state = method.init(jax.random.key(0), frozen, batch)._replace(step=jnp.int32(number))
    args = state, frozen, batch, jax.random.key(0)
    (after, said), (again, more) = method.step(*args), jax.jit(other.step)(*args)
    for name in said:
        np.testing.assert_allclose(more[name], said[name], rtol=1e-4, atol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, (again.student, again.recalibrator), (after.student, after.recalibrator))


@pytest.mark.slow
def test_states_of_padding_are_never_seen(ready):
    """The same question with more room for it gives the same losses."""
    *_, frozen, batch, method = ready
    longer = {
        name: jnp.pad(x, ((0, 0), (0, 3))) if name.endswith(("question", "answer")) else x
        for name, x in batch.items()
    }
    state = method.init(jax.random.key(0), frozen, batch)
    for number in (0, 2, 4):
        at = state._replace(step=jnp.int32(number))
        said, more = (method.step(at, frozen, b, jax.random.key(0))[1] for b in (batch, longer))
        for name in said:
            np.testing.assert_allclose(said[name], more[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", get_args(across.Name))
def test_losses_between_tokenizers_see_no_padding(ready, name):
    """A batch's loss is the sum of those of its texts, each as long as it is."""
    _, task, pair, frozen, *_ = ready
    one = across.text_loss(task, name, 1.0)
    said = [
        answer_logits(getattr(task, f"{side}_model"), frozen[side], pair.images, texts)
        for side, texts in (("teacher", pair.teacher), ("student", pair.student))
    ]
    sums, counts = jax.vmap(one)(*said, pair)
    assert (counts > 0).all() and jnp.isfinite(sums).all()
    for i in range(2):
        own = jax.tree.map(lambda x, i=i: x[i], pair)
        m, k = (int(side.answer_there.sum()) for side in (own.teacher, own.student))
        sides = (
            side._replace(answer=side.answer[:n], answer_there=side.answer_there[:n])
            for side, n in ((own.teacher, m), (own.student, k))
        )
        groups = Groups(own.groups.teacher[:m], own.groups.student[:k])
        short = TokenisedPair(own.images, *sides, groups, own.partners[:k])
        value, count = one(said[0][i, :m], said[1][i, :k], short)
        np.testing.assert_allclose(value, sums[i], rtol=2e-5, atol=1e-6)
        assert int(count) == int(counts[i])
    # The teacher is held still.
    slope = jax.grad(lambda p: jax.vmap(one)(p, said[1], pair)[0].sum())(said[0])
    assert not slope.any()


def test_divergences_of_one_vocabulary_refuse_two(ready):
    said = "under which one id is two things; give student.tokenizer the teacher's"
    with pytest.raises(InputError, match=said):
        logits.recipe(ready.task, **keywords.defaults(logits.recipe))
    config = configs.load("genrecal:smoke,baselines=,method=forward_kl")
    assert config.student.tokenizer == config.teacher.tokenizer
    resolved = settings.resolve(config)
    recipe = resolved.rows["logits"].recipe(resolved.family.shapes(resolved))
    assert recipe.steps == 6


def _alike(task):
    """A task whose student is built and reads as the teacher."""

    def pair(batch):
        made = task.pair(batch)
        return made._replace(student=made.teacher)

    one = dict.fromkeys(("teacher", "student"), "one")
    return task._replace(student_model=task.teacher_model, tokenizer_sha256=one, pair=pair)


def _single(ready, **given):
    """A step of divergences between the teacher and itself, and its first state."""
    task = _alike(ready.task)
    recipe = logits.recipe(task, **keywords.defaults(logits.recipe) | {"steps": 4} | given)
    frozen = {side: ready.frozen["teacher"] for side in ("teacher", "student")}
    state = recipe.method.init(jax.random.key(0), frozen, ready.batch)
    return jax.jit(recipe.method.step), state, frozen


@pytest.mark.parametrize(
    ("name", "on_policy"), [*((d, 0.0) for d in get_args(logits.Divergence)), ("jsd", 1.0)]
)
def test_a_student_that_is_its_teacher_is_at_rest(ready, name, on_policy):
    """Under one tokenizer, on any text: value and gradient are 0, and only then."""
    step, state, frozen = _single(ready, divergence=name, sft=0.0, on_policy=on_policy)
    _, same = step(state, frozen, ready.batch, jax.random.key(0))
    other = state._replace(params=jax.tree.map(lambda x: 0.9 * x, state.params))
    _, apart = step(other, frozen, ready.batch, jax.random.key(0))
    assert abs(same[name]) < 1e-6 < apart[name] and same["grad_norm"] < 1e-2 * apart["grad_norm"]


@pytest.mark.slow
def test_texts_of_the_student_are_its_own(ready):
    """GKD: what it writes is drawn from the keys, taught there, and left out of cross-entropy."""
    step, state, frozen = _single(ready, on_policy=0.5, weight=0.0)
    _, mixed = step(state, frozen, ready.batch, jax.random.key(0))
    task = _alike(ready.task)
    pair = task.pair(ready.batch)
    side, own = logits._written(task, frozen["student"], pair, 0.5, 1.0)
    assert 0 < own.sum() < 4  # of this batch
    np.testing.assert_array_equal(side.answer[~own], pair.student.answer[~own])
    assert (side.answer[own] != pair.student.answer[own]).any()
    rest = jax.tree.map(lambda x: x[np.asarray(~own)], pair._replace(keys=None))
    said = answer_logits(task.teacher_model, frozen["teacher"], rest.images, rest.student)
    total, count = losses.cross_entropy(rest.student.answer, said, rest.student.answer_there)
    np.testing.assert_allclose(mixed["sft"], total / count, rtol=1e-5)


def _softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def _cosines(y, z):
    """Of the vectors of all inner products of rows, text by text."""
    pairs = [[np.array([[a @ b for a in x] for b in x]).ravel() for x in side] for side in (y, z)]
    return [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in zip(*pairs, strict=True)]


def test_terms_of_images_are_those_of_numpy():
    numbers = np.random.default_rng(0)
    y, z, other = (numbers.normal(size=(3, 5, v)) for v in (7, 7, 4))
    single = lambda *arrays: [jnp.asarray(x, jnp.float32) for x in arrays]  # noqa: E731
    wanted = _kl(_softmax(y), _softmax(z)).sum()
    np.testing.assert_allclose(llava_kd.visual(*single(y, z)), (wanted, 15), rtol=1e-5)
    for student in (z, other):  # relations may be those of two vocabularies
        wanted = 3 - sum(_cosines(y, student))
        found = llava_kd.relation(*single(y, student))
        np.testing.assert_allclose(found, (wanted, 3), rtol=1e-5)
    for term in (llava_kd.visual, llava_kd.relation):
        into = jax.grad(lambda *a, term=term: term(*a)[0], argnums=(0, 1))(*single(y, z))
        assert not into[0].any() and into[1].any()
    # The same up to a factor, and nothing at all.
    assert abs(llava_kd.relation(*single(y, 3 * y))[0]) < 1e-5
    slope = jax.grad(lambda z: llava_kd.relation(*single(y), z)[0])(jnp.zeros((3, 5, 7)))
    assert jnp.isfinite(slope).all()
    with pytest.raises(InputError, match="relations are compared token by token"):
        llava_kd.relation(*single(y, z[:, :4]))


def test_llava_kd_trains_in_three_stages(ready):
    task = _alike(ready.task)
    settings_of = keywords.defaults(llava_kd.recipe)
    stages = dict.fromkeys(("pretrain", "tune", "distil"), 2)
    recipe = llava_kd.recipe(task, **settings_of | stages)
    assert recipe.steps == 6
    init, step = recipe.method.init, jax.jit(recipe.method.step)
    teacher = ready.frozen["teacher"]
    frozen = {"teacher": teacher, "student": jax.tree.map(lambda x: 0.9 * x, teacher)}
    state = init(jax.random.key(0), frozen, ready.batch)
    decoder = {"body", "embedding"}
    for number in range(6):
        after, metrics = step(state, frozen, ready.batch, jax.random.key(0))
        stage = number // 2
        moved = jax.tree_util.tree_map_with_path(
            lambda path, a, b: (part_of(path), bool((a != b).any())), state.params, after.params
        )
        pairs = jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, tuple))
        assert {part for part, yes in pairs if yes} == {"projector"} | (decoder if stage else set())
        assert all(yes for part, yes in pairs if part == "projector")
        far = sum(float(metrics[name]) for name in ("response", "visual", "relation"))
        assert (far > 0) == (stage != 1) and metrics["sft"] > 0
        whole = metrics["sft"] + metrics["response"] + metrics["visual"] + metrics["relation"] / 2
        np.testing.assert_allclose(metrics["loss"], whole, rtol=1e-5)
        assert int(after.opt[1].count) == number % 2 + 1
        if number == 0:
            _is_said_by_both(task, frozen, ready.batch, metrics)
        state = after
    # A student that is its teacher is at rest but for the cross-entropy.
    same = init(jax.random.key(0), frozen | {"student": teacher}, ready.batch)
    _, metrics = step(same, frozen, ready.batch, jax.random.key(0))
    assert all(abs(metrics[name]) < 1e-5 for name in ("response", "visual", "relation"))


def _is_said_by_both(task, frozen, batch, metrics):
    """The terms of the first step, from both models' states in float64."""
    pair, model = task.pair(batch), task.student_model
    side = pair.student
    tokens = jnp.concatenate([side.question, side.answer], 1)
    there = jnp.concatenate([side.question_there, side.answer_there], 1)
    images, answers = {}, {}
    for name, params in frozen.items():
        logits = model.head(params, model.encode(params, pair.images, tokens, there))
        images[name] = np.asarray(logits, np.float64)[:, : model.image_tokens]
        answers[name] = np.asarray(
            answer_logits(model, params, pair.images, side), np.float64
        )[np.asarray(side.answer_there)]  # fmt: skip
    visual = _kl(_softmax(images["teacher"]), _softmax(images["student"])).mean()
    response = _kl(_softmax(answers["teacher"]), _softmax(answers["student"])).mean()
    relation = 1 - np.mean(_cosines(images["teacher"], images["student"]))
    for name, wanted in (("visual", visual), ("response", response), ("relation", relation)):
        np.testing.assert_allclose(metrics[name], wanted, rtol=1e-3, atol=1e-6)


def test_what_llava_kd_cannot_compare_is_refused(ready):
    plain = keywords.defaults(llava_kd.recipe)
    with pytest.raises(InputError, match="method llava_kd compares token by token, and teacher"):
        llava_kd.recipe(ready.task, **plain)
    alike = _alike(ready.task)
    said = "makes 16 tokens of one and the student 4; give student.patch the teacher's"
    with pytest.raises(InputError, match=said):
        llava_kd.recipe(alike._replace(student_model=ready.task.student_model), **plain)
    with pytest.raises(InputError, match=r"method\.response, visual and relation are all 0"):
        llava_kd.recipe(alike, **plain | dict.fromkeys(("response", "visual", "relation"), 0.0))
    with pytest.raises(InputError, match="pretrain, tune and distil are all 0; give a stage some"):
        llava_kd.recipe(alike, **plain | dict.fromkeys(("pretrain", "tune", "distil"), 0))
    config = configs.load("genrecal:smoke,baselines=,method=llava_kd")
    assert config.student.patch == config.teacher.patch
    assert config.student.tokenizer == config.teacher.tokenizer
    apart = configs.load("genrecal:smoke,baselines=,method=llava_kd,patches=two")
    assert apart.student.patch == 2 * apart.teacher.patch
    with pytest.raises(InputError, match="patches=three: give one or two"):
        configs.load("genrecal:patches=three")


def test_dskd_knows_what_was_read_and_what_comes(ready):
    _, task, pair, frozen, *_ = ready
    for name in ("teacher", "student"):
        model, params, side = getattr(task, f"{name}_model"), frozen[name], getattr(pair, name)
        found, said = dskd.known(model, params, states(model, params, pair.images, side), side)
        np.testing.assert_allclose(found.hidden @ found.head, said, rtol=1e-4, atol=1e-4)
        wanted = answer_logits(model, params, pair.images, side)
        np.testing.assert_allclose(said, wanted, rtol=1e-5, atol=1e-5)
        table = np.asarray(params["embedding"]["embedding"])
        question, answer = np.asarray(side.question), np.asarray(side.answer)
        for i, length in enumerate(np.asarray(side.question_there).sum(1)):
            read = [question[i, length - 1], *answer[i, :-1]]
            np.testing.assert_array_equal(found.inputs[i], table[read])
            np.testing.assert_array_equal(found.targets[i], table[answer[i]])


@pytest.mark.slow
def test_dskd_trains_its_maps_at_a_rate_of_their_own(ready):
    _, task, _, frozen, batch, _ = ready
    moved = {}
    for rates in ((0.0, 1e-3), (1e-3, 0.0)):
        given = dict(zip(("learning_rate", "projection_rate"), rates, strict=True))
        recipe = dskd.recipe(task, **keywords.defaults(dskd.recipe) | given | {"steps": 4})
        state = recipe.method.init(jax.random.key(0), frozen, batch)
        after, metrics = jax.jit(recipe.method.step)(state, frozen, batch, jax.random.key(0))
        moved[rates] = [
            {bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, sides), strict=True)}
            for sides in zip(state.params, after.params, strict=True)
        ]
        np.testing.assert_allclose(
            metrics["loss"], metrics["dskd"] / 2 + metrics["sft"] / 2, rtol=1e-6
        )
    assert moved[0.0, 1e-3] == [{False}, {True}] and moved[1e-3, 0.0] == [{True}, {False}]
    # The maps stay behind.
    assert jax.tree.structure(recipe.method.output(after)) == jax.tree.structure(frozen["student"])
    assert set(recipe.rates) == {"learning_rate", "projection_rate"}
    shapes = [x.shape for x in after.params.projections]
    d, e = task.student_model.width, task.teacher_model.width
    assert shapes == [(2 * d, 2 * e), (e, d), (d, e)]
    with pytest.raises(InputError, match="are both 0; give one of them"):
        dskd.recipe(task, weight=0.0, sft=0.0)


def test_answers_are_aligned_by_their_bytes(ready):
    _, task, pair, *_ = ready
    for own in (jax.tree.map(lambda x, i=i: x[i], pair._replace(keys=None)) for i in range(4)):
        for number in range(own.groups.teacher.max() + 1):
            spelt = [
                b"".join(
                    p if isinstance(p, bytes) else p.encode()
                    for p in (task.pieces[side][i] for i in texts.answer[ids == number])
                )
                for side, texts, ids in (
                    ("teacher", own.teacher, own.groups.teacher),
                    ("student", own.student, own.groups.student),
                )
            ]
            assert spelt[0] == spelt[1] != b""
        ends = [int(texts.answer_there.sum()) for texts in (own.teacher, own.student)]
        assert (own.groups.teacher >= 0).sum() == ends[0]
        # By edit distance an end meets the end, and padding nothing.
        assert own.partners[ends[1] - 1] == ends[0] - 1 and (own.partners[ends[1] :] == -1).all()


@pytest.mark.slow
def test_eight_devices_do_what_one_does(ready):
    """Answers differ in length, so means of means over the devices would be another loss."""
    resolved, task, _, frozen, *_ = ready
    settings_of = {"batch_size": 8, "clip": 1e-6}  # so small that Adam is linear in what it gets
    stages = {"align": 1, "distil": 1, "tune": 1}
    genrecal = resolved.rows["genrecal"]
    rows = {
        "genrecal": genrecal.module.recipe(
            task, **genrecal.settings | settings_of | stages | {"contrast": 0.5}
        ),
    }
    plain = keywords.defaults(across.recipe) | settings_of
    rows["alm"] = across.recipe(task, **plain)
    rows["dskd"] = dskd.recipe(task, **keywords.defaults(dskd.recipe) | settings_of)
    three = dict.fromkeys(("pretrain", "tune", "distil"), 1)
    plain = keywords.defaults(llava_kd.recipe) | settings_of | three
    rows["llava_kd"] = llava_kd.recipe(_alike(task), **plain)
    tested = together({name: made.method for name, made in rows.items()})
    given = dict.fromkeys(rows, frozen)
    near = jax.tree.map(lambda x: 0.9 * x, frozen["teacher"])
    given["llava_kd"] = {"teacher": frozen["teacher"], "student": near}
    data = task.examples.load()
    records, state = run_on(1, "jit", tested, data, given, 3)
    for backend in ("jit", "pmap"):
        others, other = run_on(8, backend, tested, data, given, 3)
        wrong = {
            **differences([v for _, v in others], [v for _, v in records], 2e-4),
            **differences(other, state, 2e-4),
        }
        assert not wrong, f"{backend}: {wrong}"


def test_answers_of_the_teacher_take_the_place_of_those_of_the_data(ready, tmp_path, capsys):
    resolved, task, *_, frozen, _, _ = ready
    config = configs.load(SMOKE)
    config.data.train = 4
    loaded = resolved.family.load(settings.resolve(config), tmp_path, lambda: False)
    known, named = loaded.data.train, loaded.data.tokenizers
    arrays = vlm._arrays(known, named, dict.fromkeys(named, (60, 60)))
    end = [text.EOS] * 60
    by = named["teacher"]
    said = [
        [*by.split("yes"), *end],
        by.split("yes") * 60,  # no end
        [by.pieces.index(b"\xff"), *end],  # no whole character
        [*by.split("no" * 31), *end],  # longer than the student writes
    ]
    rows = jnp.array([row[:60] for row in said], jnp.int32)
    writes = task.teacher_model._replace(
        generate=lambda *args, **others: Written(rows, rows >= 0, 0.0 * rows)
    )
    reading = vlm._Reading(
        resolved,
        task._replace(teacher_model=writes, answer_length=(60, 60)),
        arrays,
        loaded.source,
        lambda: (frozen, {"teacher_sha256": "its"}),
        tmp_path / "readings",
        lambda: False,
    )
    made = vlm._answered(reading, known, named)
    assert made.answers == ("yes", *known.answers[1:])
    assert "3 of 4 answers of the teacher have no end" in capsys.readouterr().out
    # What is kept is read again, and nothing is made.
    again = reading._replace(task=task, models=lambda: ({}, {"teacher_sha256": "its"}))
    assert vlm._answered(again, known, named).answers == made.answers
    with pytest.raises(Interrupted, match="stopped while the teacher answers"):
        vlm._answered(reading._replace(arrays=arrays | {}, should_stop=lambda: True,
                      folder=tmp_path / "others"), known, named)  # fmt: skip


def test_a_diagnosis_tells_a_reader_from_a_copier(ready):
    """One Recalibrator passes on the teacher's states, the other the student's alone."""
    _, task, pair, frozen, *_ = ready
    theirs = teacher_states(task.teacher_model, frozen["teacher"], pair)
    # A student whose states are the teacher's own.
    head = functools.partial(task.teacher_model.head, frozen["teacher"])

    def copier(prefix, prefix_there, answer, answer_there, *, prefix_from_teacher):
        return prefix, answer

    def reader(prefix, prefix_there, answer, answer_there, *, prefix_from_teacher):
        last = predicting(prefix, prefix_there, answer)[:, :1]
        return prefix, jnp.broadcast_to(last, answer.shape)

    for recalibrate, reads in ((copier, False), (reader, True)):
        said = diagnosis(recalibrate, head, theirs, theirs, pair.teacher.answer, theirs.answer)
        later = said.there.at[:, 0].set(False)
        # The first token comes of the prefix in both.
        assert (said.recalibrated != said.swapped)[:, 0].all()
        assert (said.recalibrated != said.swapped)[later].any() == reads
        np.testing.assert_array_equal(said.recalibrated, said.regularized)
        np.testing.assert_array_equal(said.student_mean, said.teacher_mean)
    said = diagnosis(copier, head, theirs, theirs, pair.teacher.answer, theirs.answer)
    np.testing.assert_array_equal(said.recalibrated, said.teacher)
    logits = answer_logits(task.teacher_model, frozen["teacher"], pair.images, pair.teacher)
    total, _ = losses.cross_entropy(pair.teacher.answer, logits, pair.teacher.answer_there)
    np.testing.assert_allclose(jnp.where(said.there, said.teacher, 0).sum(), total, rtol=1e-5)


@pytest.mark.slow
def test_the_gradient_that_reaches_the_student(ready):
    """Its norm at the student's states, against differences of the loss along it."""
    _, task, _, frozen, batch, method = ready
    resolved = ready.resolved
    row = resolved.rows["genrecal"]
    state = method.init(jax.random.key(0), frozen, batch)._replace(step=jnp.int32(2))
    _, said = method.step(state, frozen, batch, jax.random.key(0))
    assert said["student_grad"] > 0 and said["sft_grad"] > 0
    # Without the teacher's losses nothing comes from there; without SFT nothing from it.
    alone = row.module.recipe(task, **row.settings | {"sft": 0.0}).method
    _, less = jax.jit(alone.step)(state, frozen, batch, jax.random.key(0))
    assert less["sft_grad"] == 0
    np.testing.assert_allclose(less["student_grad"], said["student_grad"], rtol=1e-5)


@pytest.mark.slow
def test_a_recalibrator_is_diagnosed_as_it_was_trained(ready):
    """Positions that are kept, and embeddings in the place of states."""
    resolved, task, pair, frozen, batch, _ = ready
    row = resolved.rows["genrecal"]
    other = {"positions": "kept", "reads": "tokens", "contrast": 0.5}
    recipe = row.module.recipe(task, **row.settings | other)
    state = jax.jit(recipe.method.init)(jax.random.key(0), frozen, batch)
    # Away from the start, where positions hardly matter.
    learned = jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, state.recalibrator)
    use = jax.jit(recipe.aside.use)
    said = use(state.student, learned, frozen, pair._replace(keys=None))
    at = state._replace(recalibrator=learned)
    _, metrics = jax.jit(recipe.method.step)(at, frozen, batch, jax.random.key(0))
    mean = said.recalibrated[said.there].mean()
    np.testing.assert_allclose(mean, metrics["ce"], rtol=1e-4)
    whole = metrics["ce"] + metrics["kl"] + metrics["regularizer"] + metrics["contrast"] / 2
    np.testing.assert_allclose(metrics["loss"], whole, rtol=1e-5)
    # Of the answer it has seen the tokens, and nothing that the teacher makes of the question.
    known = encoded(task.teacher_model, frozen["teacher"], pair.images, pair.teacher)
    known = jax.random.normal(jax.random.key(3), known.shape)
    own = use(state.student, learned, frozen, pair._replace(keys=None, hidden=known))
    np.testing.assert_array_equal(own.recalibrated, said.recalibrated)
    assert (own.teacher != said.teacher).all()


def test_prefixes_are_told_apart_as_numpy_does():
    numbers = np.random.default_rng(0)
    mine, other = numbers.normal(size=(2, 5, 3))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (mine, other)]
    near = unit[0] @ unit[1].T / 0.1
    wanted = -sum(np.log(_softmax(x)[np.arange(5), np.arange(5)]).sum() for x in (near, near.T))
    single = [jnp.asarray(x, jnp.float32) for x in (mine, other)]
    np.testing.assert_allclose(genrecal.contrast(*single), (wanted / 2, 5), rtol=1e-5)
    assert genrecal.contrast(single[0], 3 * single[0])[0] < genrecal.contrast(*single)[0]


class Once(NamedTuple):
    """A run that was never stopped."""

    config: Any
    workdir: Any
    records: list
    out: str


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    config = configs.load(SMOKE + ",baselines=sft+blind+sequence_kd+dskd")
    config.teacher.cache = True
    workdir = tmp_path_factory.mktemp("once") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        records = jaxdistill.train(config, workdir)
    return Once(config, workdir, records, out.getvalue())


@pytest.mark.slow
def test_the_report_shows_answers_and_all_that_was_trained(once):
    page = Page(once.workdir / "report.html")
    assert len(page.pictures) >= 2 and page.text.count("Before that") == 2
    assert {"dskd", "blind"} <= {c for row in page.cells for c in row}


@pytest.mark.slow
def test_what_lies_in_a_finished_folder_is_looked_at(once, tmp_path):
    """Answers, readings and the Recalibrator: missing, damaged or another's."""
    config, records = once.config, once.records
    workdir = shutil.copytree(once.workdir, tmp_path / "run")
    (workdir / "answers" / "sft.json").write_text("[]")
    (workdir / "artifacts" / "answers.png").unlink()
    before = json.loads((workdir / "answers" / "teacher.json").read_text())
    assert len(jaxdistill.train(config, workdir)) == len(records)
    assert len(json.loads((workdir / "answers" / "sft.json").read_text())) == len(before)
    assert (workdir / "artifacts" / "answers.png").is_file()
    # Another's Recalibrator.
    (workdir / "artifacts" / "recalibration-genrecal.png").unlink()
    card = workdir / "artifacts" / "aside.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"config_hash": "another's"}))
    with pytest.raises(InputError, match=r"aside\.safetensors is of another run; delete"):
        jaxdistill.train(config, workdir)
    (workdir / "artifacts" / "aside.safetensors").unlink()
    with pytest.raises(InputError, match=r"aside\.safetensors is no file.*; delete"):
        jaxdistill.train(config, workdir)
    shutil.rmtree(workdir / "artifacts")
    # Readings that are damaged.
    (found,) = (workdir / "readings").glob("hidden-*.safetensors")
    found.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"cannot be used .*; delete it, and the same command"):
        jaxdistill.train(config, workdir)


# ---------------------------------------------------------------------------- a run


@pytest.mark.slow
def test_a_run_stopped_anywhere_ends_with_the_same_bits(once, tmp_path):
    config, records = once.config, once.records
    shutil.copytree(once.workdir, tmp_path / "once")
    answered = [r for r in records if r["evaluation"] == "answers"]
    rows = {r["row"] for r in answered}
    assert rows == {"majority", "teacher", "genrecal", "sft", "blind", "sequence_kd", "dskd"}
    overall = {r["row"]: r for r in answered if r["metric"] == "exact match"}
    for row, record in overall.items():
        own = [r for r in answered if r["row"] == row and r["metric"] != "exact match"]
        mean = sum(r["value"] * r["questions"] for r in own) / record["questions"]
        assert mean == pytest.approx(record["value"])
    rng = np.random.default_rng(0)
    for _ in range(60):
        left = int(rng.integers(2, 9))
        try:
            again = jaxdistill.train(config, tmp_path / "stopped", _after(left))
            break
        except Interrupted:
            continue
    strip = lambda rs: [{k: v for k, v in r.items() if "seconds" not in k} for r in rs]  # noqa: E731
    assert strip(again) == strip(records)
    folders = "artifacts", *(f"baselines/{row}/artifacts" for row in ("sft", "dskd"))
    for folder in (*folders, "teacher", "start"):
        name = {"teacher": "teacher"}.get(folder, "student")
        one, two = (weights.load(tmp_path / w / folder, name)[0] for w in ("once", "stopped"))
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), one, two))
    for row, record in overall.items():
        said = json.loads((tmp_path / "once" / "answers" / f"{row}.json").read_text())
        assert len(said) == record["questions"]
    assert (tmp_path / "once" / "artifacts" / "answers.png").is_file()
    assert (tmp_path / "once" / "artifacts" / "recalibration-genrecal.png").is_file()
    _as_online(tmp_path / "once", config)
    # The student alone is left: neither teacher nor Recalibrator, nor DSKD's maps.
    student, card = weights.load(tmp_path / "once" / "artifacts", "student")
    start, _ = weights.load(tmp_path / "once" / "start", "student")
    for folder in folders:
        student, card = weights.load(tmp_path / "once" / folder, "student")
        assert jax.tree.map(np.shape, student) == jax.tree.map(np.shape, start)
    assert card["tokenizer_sha256"] and json.dumps(card)
    assert "right to the letter" in once.out and "majority" in once.out
    _answers_alone(tmp_path / "once", config)


def _as_online(workdir, config):
    """A teacher that reads at each step leads to the same student, but for rounding."""
    online = config.copy_and_resolve_references().unlock()
    online.teacher.cache, online.teacher.dir = False, str(workdir / "teacher")
    online.evals, online.baselines, online.method = {}, {}, config.baselines.dskd
    jaxdistill.train(online, workdir.parent / "online")
    one, _ = weights.load(workdir / "baselines" / "dskd" / "artifacts", "student")
    two, _ = weights.load(workdir.parent / "online" / "artifacts", "student")
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), one, two)


def _answers_alone(workdir, config):
    """A student needs neither its config, nor data, nor teacher, and answers as in the table."""
    resolved = settings.resolve(config)
    loaded = resolved.family.load(resolved, workdir, lambda: False)
    asked, own = loaded.data, loaded.data.pair.student
    moved = workdir.parent / "moved"
    for folder in ("artifacts", "baselines/blind/artifacts"):
        shutil.copytree(workdir / folder, moved, dirs_exist_ok=True)
        student = jaxdistill.load_student(moved)
        texts = student.answer(asked.questions.images[:9], asked.questions.questions[:9])
        images = asked.pair.images[:9] * (folder == "artifacts")
        params, _ = weights.load(workdir / folder, "student")
        seen = (jnp.asarray(x) for x in (images, own.question[:9], own.question_there[:9]))
        length = loaded.task.answer_length[1]
        written = loaded.task.student_model.generate(params, *seen, length=length)
        by = asked.tokenizers["student"]
        assert texts == [text.answer_text(by, row) for row in np.asarray(written.tokens)]
    _exported_and_read_again(moved, asked, texts)
    with pytest.raises(InputError, match="1 questions go with images"):
        student.answer(asked.questions.images[:2], ["what?"])
    (moved / "tokenizer.json").write_text(text.tokenizer("bytes", []).stored)
    with pytest.raises(InputError, match="is not the student's tokenizer"):
        jaxdistill.load_student(moved)
    (moved / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json is no file"):
        jaxdistill.load_student(moved)


def _exported_and_read_again(folder, asked, texts):
    """In the layout of other libraries a student answers the same, whole or not at all."""
    out = folder.parent / "exported"
    jaxdistill.export_student(folder, out)
    # The blind student: what it does not see is in its card.
    questions = asked.questions
    read = jaxdistill.load_student(out)
    assert read.answer(questions.images[:9], questions.questions[:9]) == texts
    before, _ = weights.load(folder, "student")
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "student.json", "tokenizer.json",
        "vision.json", "vision.safetensors",
    }  # fmt: skip
    shape, depth, vocabulary, tied = decoders.decoder_shape(out)
    params, rest = decoders.load_decoder(out, "auto", shape, depth, tied=tied)
    assert not rest and vocabulary == len(before["embedding"]["embedding"])
    for name, own in params.items():
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), own, before[name]))
    jaxdistill.export_student(folder, out)  # again, over its own
    foreign = folder.parent / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"another's")
    with pytest.raises(InputError, match="is another model's; give another folder"):
        jaxdistill.export_student(folder, foreign)
    with pytest.raises(InputError, match="holds a student of a run"):
        jaxdistill.export_student(folder, folder)
    said = json.loads((out / "student.json").read_text())
    (out / "student.json").write_text(json.dumps(said | {"decoder_sha256": "another's"}))
    with pytest.raises(InputError, match="are not of one student"):
        jaxdistill.load_student(out)


def _after(count):
    """A `should_stop` that says yes once it has been asked a number of times."""
    asked = iter(range(10**9))
    return lambda: next(asked) >= count
