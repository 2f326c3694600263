"""Programs of runs for other machines."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import compile as programs
from jaxdistill import config as configs
from jaxdistill import main
from jaxdistill.errors import InputError

SMOKE = "ncfm:dataset=digits,ipc=2,smoke"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode=compile"], "go together"),
        (["--topology=v5e:2x4", "--workdir=x"], "go together"),
        (["--mode=export"], "give --workdir"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(InputError, match=message):
        main.run([f"--config={SMOKE}", *flags])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method.batch_real": "147"}, "has 146 training images, but batch_real=147"),
        (
            {"method.batch_real": "127", "data.holdout_per_class": "20"},
            "has 126 training images, but batch_real=127",
        ),
        ({"parallel.backend": "pmap"}, "use parallel.backend=jit"),
        ({"parallel.class_devices": "4"}, "split evenly over 4 devices"),
    ],
)
def test_configs_that_cannot_be_compiled(overrides, message):
    with pytest.raises(InputError, match=message):
        programs.chunk(configs.load(SMOKE, overrides))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A workdir with the program for this machine, and for TPU and GPU."""
    workdir = tmp_path_factory.mktemp("export")
    config = configs.load(SMOKE)
    config.parallel.class_devices = 2
    programs.export(config, workdir, platforms=(*programs.PLATFORMS, "cpu"))
    return workdir, config


def test_the_flag_writes_what_the_function_does(tmp_path, capsys):
    main.run([f"--config={SMOKE}", "--mode=export", f"--workdir={tmp_path}"])
    written = {path.name for path in (tmp_path / "artifacts").iterdir()}
    assert written == {"chunk_tpu.stablehlo", "chunk_cuda.stablehlo", "chunk.json"}
    assert "chunk_tpu.stablehlo" in capsys.readouterr().out


@pytest.mark.slow
def test_streamed_data_are_compiled_as_a_window_of_batches():
    spec = "ncfm:dataset=digits,ipc=1,baselines=,smoke"
    config = configs.load(spec, {"data.placement": "streamed", "run.chunk": "3"})
    made = programs.chunk(config)
    images = made.arguments[-1].batches["images"]
    assert images.shape == (3, 10, config.method.batch_real, 8, 8, 1)
    assert images.dtype == np.uint8
    made.function.lower(*made.arguments)  # they fit the program


def test_an_exported_program_is_the_chunk_of_the_run(exported):
    """Read back and run on arguments that the card alone describes."""
    workdir, config = exported
    folder = workdir / "artifacts"
    card = json.loads((folder / "chunk.json").read_text())
    for platform in ("tpu", "cuda", "cpu"):
        data = bytearray((folder / f"chunk_{platform}.stablehlo").read_bytes())
        program = jax.export.deserialize(data)
        assert (program.platforms, program.nr_devices) == ((platform,), 8)
    assert card["mesh"] == {"class": 2, "data": 4} and len(card["config_hash"]) == 16

    made = programs.chunk(config)
    key = jax.random.key(0)
    arguments = jax.tree.map(
        lambda x: jax.device_put(key if programs._is_key(x) else _numbers(x), x.sharding),
        made.arguments,
    )
    state, _, frozen, data = arguments
    arguments = state, jax.device_put(jnp.int32(2), made.arguments[1].sharding), frozen, data
    leaves = [
        jax.random.key_data(x) if programs._is_key(x) else x for x in jax.tree.leaves(arguments)
    ]
    assert [list(x.shape) for x in leaves] == [entry["shape"] for entry in card["arguments"]]
    assert [x.dtype.name for x in leaves] == [entry["dtype"] for entry in card["arguments"]]
    names = [entry["name"] for entry in card["results"]]
    before = np.asarray(state.method.pixels)
    results = jax.jit(program.call)(*leaves)
    assert [list(x.shape) for x in results] == [entry["shape"] for entry in card["results"]]
    expected = jax.tree.leaves(made.function(*arguments))
    for name, ours, theirs in zip(card["results"], results, expected, strict=True):
        if not programs._is_key(theirs):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=str(name))
    assert int(results[names.index("state/step")]) == 2
    assert np.abs(results[names.index("state/method/pixels")] - before).max() > 1e-3


def _numbers(x):
    """Small positive numbers."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        values = np.random.default_rng(math.prod(x.shape)).uniform(0, 0.5, x.shape)
        return jnp.asarray(values, x.dtype)
    if x.dtype == jnp.uint8:
        return jnp.asarray(np.random.default_rng(1).integers(0, 255, x.shape), x.dtype)
    if x.shape == (10,):
        return jnp.full(x.shape, 140, x.dtype)
    return jnp.zeros(x.shape, x.dtype)


@pytest.mark.tpu_compiler
@pytest.mark.slow
def test_the_chunk_of_a_config_fits(tpu, tmp_path, capsys):
    flags = [f"--config={SMOKE}", "--mode=compile", "--topology=v5e:2x4", f"--workdir={tmp_path}"]
    main.run(flags)
    printed = capsys.readouterr().out
    assert "8 TPU v5 lite, 2 class x 4 data" in printed and "fits in 15.75 GiB" in printed
    record = json.loads((tmp_path / "compile.json").read_text())
    assert record["fits"] and record["cost"]["flops"] > 0
    assert set(record["cost"]["collectives"]) == {"all-reduce"}
