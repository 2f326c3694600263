"""A run that diverges goes on from its last good state with lower rates, if it may."""

import shutil

import jax
import numpy as np
import pytest

from jaxdistill import config as configs
from jaxdistill import experiment, runner
from jaxdistill.errors import InputError
from jaxdistill.io import artifact, checkpoint, weights

# The fourth step is the sampler's first, and takes it so far that the fifth is not finite.
SETTINGS = {
    "extractor.depth": "1",
    "method.warmup": "3",
    "method.sampler_learning_rate": "1e30",
    "method.steps": "7",
    "run.chunk": "1",
    "run.checkpoint_every": "3",
    "pool.epochs": "1",
}
CURED = {"run.restarts": "1", "run.restart_factor": "1e-31"}


@pytest.fixture(scope="module")
def extractors(tmp_path_factory):
    """Trained once."""
    return tmp_path_factory.mktemp("extractors")


def distil(workdir, extractors, **settings):
    config = configs.load(
        "ncfm:dataset=digits,ipc=1,sampler=released,baselines=,smoke",
        {**SETTINGS, "pool.dir": str(extractors), **settings},
    )
    config.evals = {}
    experiment.train(config, workdir)
    return artifact.load(workdir / "artifacts")


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.slow
def test_lower_rates_cure_a_run_and_stay_in_force(tmp_path, extractors, capfd):
    whole = distil(tmp_path / "whole", extractors, **CURED)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "restart" in line]
    assert line.startswith("ncfm: step 5: metric ")
    assert "the checkpoint of step 3 is kept" in line
    assert line.endswith("restart 1 of 1 with the rates x 1e-31")
    assert whole.card["rate_factor"] == 1e-31
    told = checkpoint.newest_metadata(tmp_path / "whole" / "checkpoints")
    assert (told["restarts"], told["rate_factor"]) == (1, 1e-31)

    # As if killed before the last checkpoint: the lower rates are found again, whatever the
    # config says by then.
    shutil.rmtree(tmp_path / "whole" / "artifacts")
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "7")
    resumed = distil(tmp_path / "whole", extractors)
    assert steps(tmp_path / "whole") == [6, 7]
    assert resumed.card["rate_factor"] == 1e-31
    np.testing.assert_array_equal(resumed.images, whole.images)


@pytest.mark.slow
def test_restarts_come_to_an_end(tmp_path, extractors, capfd):
    useless = {"run.restarts": "1", "run.restart_factor": "0.9"}
    with pytest.raises(runner.Diverged, match=r"step 5: .*the checkpoint of step 3 is kept"):
        distil(tmp_path, extractors, **useless)
    lines = [line for line in capfd.readouterr().err.splitlines() if "restart" in line]
    assert [line.rpartition("; ")[2] for line in lines] == ["restart 1 of 1 with the rates x 0.9"]
    assert steps(tmp_path) == [3]
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.slow
def test_a_student_of_a_flow_goes_on_with_a_lower_rate_too(tmp_path, capfd):
    changes = {"method.learning_rate": "1e3", "evals.samples.teacher_rows": "()"}
    changes |= {"run.restarts": "1", "run.restart_factor": "1e-6"}
    experiment.train(configs.load("flow:dataset=soft4,baselines=,smoke", changes), tmp_path)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "restart" in line]
    assert line.startswith("arcflow: step ") and line.endswith("with the rates x 1e-06")
    params, card = weights.load(tmp_path / "artifacts", "student")
    assert card["rate_factor"] == 1e-6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("settings", [{"run.restarts": "-1"}, {"run.restart_factor": "1.0"}])
def test_restarts_that_make_no_sense_are_refused(tmp_path, extractors, settings):
    with pytest.raises(
        InputError, match=r"run\.restart.* is .*; it must be a (whole )?number between"
    ):
        distil(tmp_path / "run", extractors, **settings)
    assert not (tmp_path / "run").exists()
