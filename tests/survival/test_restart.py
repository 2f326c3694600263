"""A run that diverges goes on from its last good state with lower rates, if it may."""

import numpy as np
import pytest

from jaxdistill import config as configs
from jaxdistill import interrupt, runner, train
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.io import artifact, checkpoint

# The fourth step is the sampler's first, and takes it so far that the fifth is not finite.
SETTINGS = {
    "method.warmup": "3",
    "method.sampler_rate": "1e38",
    "run.steps": "7",
    "run.chunk": "1",
    "run.checkpoint_every": "3",
    "pool.epochs": "1",
}
CURED = {"run.restarts": "1", "run.restart_factor": "1e-39"}


@pytest.fixture(scope="module")
def extractors(tmp_path_factory):
    """Trained once."""
    return tmp_path_factory.mktemp("extractors")


def distil(workdir, extractors, should_stop=interrupt.never, **settings):
    config = configs.load("ncfm:dataset=digits,ipc=1,sampler=learned,smoke")
    for path, value in {**SETTINGS, "pool.dir": str(extractors), **settings}.items():
        configs.override(config, path, value)
    setup = train._set_up(config, workdir)._replace(should_stop=should_stop)
    train._distil(setup, "ncfm")
    return artifact.load(workdir / "artifacts")


def steps(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_lower_rates_cure_a_run_and_stay_in_force(tmp_path, extractors, capfd):
    whole = distil(tmp_path / "whole", extractors, **CURED)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "restart" in line]
    assert line.startswith("ncfm: step 5: metric ")
    assert "the checkpoint of step 3 is kept" in line
    assert line.endswith("restart 1 of 1 with the rates x 1e-39")
    assert whole.card["rate_factor"] == 1e-39
    told = checkpoint.newest_metadata(tmp_path / "whole" / "checkpoints")
    assert (told["restarts"], told["rate_factor"]) == (1, 1e-39)

    # Stopped on the lower rates: they are found again, whatever the config says by then.
    folder = tmp_path / "cut"
    with pytest.raises(Interrupted, match="after step 6 of 7"):
        distil(folder, extractors, lambda: _at(folder, 6), **CURED)
    resumed = distil(folder, extractors)
    assert "restart" not in capfd.readouterr().err.rpartition("of step 3 is kept")[2][60:]
    assert resumed.card["rate_factor"] == 1e-39
    np.testing.assert_array_equal(resumed.images, whole.images)


def _at(folder, step):
    path = folder / "metrics.jsonl"
    return path.exists() and f'"step": {step - 1},' in path.read_text()


def test_without_a_restart_the_last_good_state_is_kept(tmp_path, extractors):
    with pytest.raises(runner.Diverged, match=r"step 5: .*the checkpoint of step 3 is kept"):
        distil(tmp_path, extractors)
    assert steps(tmp_path) == [3]
    assert not (tmp_path / "artifacts").exists()


def test_restarts_come_to_an_end(tmp_path, extractors, capfd):
    useless = {"run.restarts": "2", "run.restart_factor": "0.9"}
    with pytest.raises(runner.Diverged, match="step 5"):
        distil(tmp_path, extractors, **useless)
    lines = [line for line in capfd.readouterr().err.splitlines() if "restart" in line]
    assert [line.rpartition("; ")[2] for line in lines] == [
        "restart 1 of 2 with the rates x 0.9",
        "restart 2 of 2 with the rates x 0.81",
    ]


@pytest.mark.parametrize("settings", [{"run.restarts": "-1"}, {"run.restart_factor": "1.0"}])
def test_restarts_that_make_no_sense_are_refused(tmp_path, extractors, settings):
    with pytest.raises(InputError, match=r"run.restarts is .* between 0 and 1"):
        distil(tmp_path / "run", extractors, **settings)
    assert not (tmp_path / "run").exists()
