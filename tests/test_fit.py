"""The search for settings with which a run fits: on a model of a compiler, and with a real one."""

import itertools
import json
import math

import jax
import numpy as np
import pytest

from jaxdistill import config as configs
from jaxdistill import fit, main, settings
from jaxdistill.errors import InputError, Interrupted
from jaxdistill.fit import Knob, Tried, knobs, search
from jaxdistill.parallel.hlo import Cost, Traffic
from jaxdistill.parallel.topology import Report

SMOKE = "ncfm:dataset=digits,ipc=2,baselines=,smoke"


class Model:
    """Programs whose memory falls with every level and whose time rises, but for some per cent."""

    def __init__(self, seed, limit, wobble=0.02):
        numbers = np.random.default_rng(seed)
        self.levels = tuple(numbers.integers(2, 5, size=4).tolist())
        self.limit, self.asked = limit, []
        off = lambda: 1 + wobble * numbers.uniform(-1, 1, self.levels)  # noqa: E731
        saved = [numbers.uniform(0.4, 0.9) for _ in self.levels]
        dearer = [numbers.uniform(1.05, 1.6) for _ in self.levels]
        grid = np.stack(np.meshgrid(*map(np.arange, self.levels), indexing="ij"))
        weigh = lambda rates: np.prod([r**g for r, g in zip(rates, grid, strict=True)], 0)  # noqa: E731
        self.memory, self.seconds = weigh(saved) * off(), weigh(dearer) * off()

    def attempt(self, point):
        self.asked.append(point)
        peak = int(1e6 * self.memory[point])
        seconds = float(self.seconds[point])
        return Tried({}, peak <= self.limit, "", seconds, {}, Report(1, "", peak=peak), "")

    def best(self):
        fitting = self.memory <= self.limit / 1e6
        return self.seconds[fitting].min() if fitting.any() else None


def test_the_search_finds_what_trying_all_would():
    gaps, parts = [], []
    for seed, limit in itertools.product(range(30), (2e5, 4e5, 7e5, 2e6)):
        model = Model(seed, limit)
        found = search(model.levels, (0,) * 4, model.attempt, lambda: False)
        if found is None:
            assert not model.memory[tuple(n - 1 for n in model.levels)] <= limit / 1e6
            continue
        assert found.fits and len(set(model.asked)) == len(model.asked)
        gaps.append(found.seconds / model.best())
        parts.append(len(model.asked) / math.prod(model.levels))
    assert len(gaps) > 60
    assert np.mean(np.array(gaps) < 1.001) > 0.9 and max(gaps) < 1.1
    assert np.mean(parts) < 0.4


def test_where_more_memory_does_not_save_time_the_search_goes_down():
    """A pass of more images may take longer: from where it starts it follows what is better."""
    model = Model(0, 1e9)
    model.seconds = 1 / model.seconds
    found = search(model.levels, (0,) * 4, model.attempt, lambda: False)
    assert found.seconds == model.best()


def test_a_search_that_is_stopped_gives_what_it_has():
    model = Model(3, 3e5)
    found = search(model.levels, (0,) * 4, model.attempt, lambda: len(model.asked) >= 2)
    assert found.fits and len(model.asked) == 2  # the first and the last
    model = Model(3, 1)
    assert search(model.levels, (0,) * 4, model.attempt, lambda: False) is None


def test_the_knobs_are_settings_that_there_are():
    stated = settings.resolve(configs.load(SMOKE)).stated()
    found = {knob.path: knob for knob in knobs(stated)}
    assert found["data.placement"] == Knob("data.placement", ("resident", "streamed"))
    assert {"run.microbatch", "run.chunk", "parallel.fully_sharded"} < found.keys()
    size = stated["run"]["microbatch"]
    assert found["run.microbatch"].levels == (16 * size, 4 * size, size, max(size // 4, 1))
    both = settings.resolve(configs.load("genrecal:baselines=,smoke")).stated()
    assert any(knob.path.endswith(".remat") for knob in knobs(both))
    for config in (stated, both):  # every level is one that the config may have
        for knob in knobs(config):
            for level in knob.levels:
                settings.resolve(fit._with(config, {knob.path: level}))


@pytest.fixture(scope="module")
def here():
    """Eight devices of this machine in the place of every slice, with as much memory as is said."""
    memory = {"limit": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "topology_devices", lambda name: jax.devices())
        patch.setattr(fit, "memory_of", lambda devices: memory["limit"])
        patch.setattr(fit.importlib.metadata, "version", lambda name: "1")
        patch.setattr(fit, "quiet", lambda: None)
        yield memory


@pytest.fixture(scope="module")
def searched(here, tmp_path_factory):
    """A workdir, and what a search with memory for everything says."""
    workdir = tmp_path_factory.mktemp("fit")
    return workdir, fit.fit(configs.load(SMOKE), "any", workdir, most=1)


def test_a_run_is_made_to_fit(here, searched, capsys):
    """With the compiler of this machine: as it is, with less memory, and with too little."""
    workdir, free = searched
    first, config = free["slices"][0]["best"], configs.load(SMOKE)
    assert first["changed"] == {} and first["fits"]
    peak = free["compiled"]["any"][first["program"]]["peak"]

    here["limit"] = int((peak - 1) / (1 - fit.MARGIN))
    found = fit.fit(config, "any", workdir, most=2)["slices"][0]
    best = found["best"]
    assert best["changed"] and best["fits"] and not found["tried"][0]["fits"]
    assert found["tried"][0]["why"] == f"{peak / 1e9:.2f} GB, 0.00 GB too many"
    written = json.loads((workdir / "fit.json").read_text())
    assert written["slices"][0]["best"] == best
    assert written["compiled"]["any"][best["program"]]["peak"] < peak
    assert first["program"] in written["compiled"]["any"]  # of the search before
    # What it prints is what is to be typed.
    said = capsys.readouterr().out.split("fits any with ")[1].splitlines()[0]
    flags = dict(flag.removeprefix("--config.").split("=") for flag in said.split())
    again = settings.resolve(configs.load(SMOKE, flags)).stated()
    assert {path: fit._at(again, path) for path in best["changed"]} == best["changed"]

    here["limit"] = 20_000
    with pytest.raises(InputError, match=r"the arguments alone are 0\.00 GB") as error:
        fit.fit(config, "any")
    assert "does not fit any" in str(error.value) and "try a larger slice" in str(error.value)
    here["limit"] = None


def test_programs_that_are_known_are_not_compiled_again(here, searched, monkeypatch):
    config, (workdir, _) = configs.load(SMOKE), searched
    monkeypatch.setattr(fit, "report", lambda *_: pytest.fail("it was compiled again"))
    with pytest.raises(Interrupted, match="1 programs for any are tried"):
        fit.fit(config, "any", workdir, should_stop=lambda: True)
    text = (workdir / "fit.json").read_text()
    (workdir / "fit.json").write_text(text.replace('"jaxlib": "1"', '"jaxlib": "2"'))
    with pytest.raises(pytest.fail.Exception):  # another compiler
        fit.fit(config, "any", workdir)
    (workdir / "fit.json").write_text("[]")
    with pytest.raises(InputError, match="no record of a search"):
        fit.fit(config, "any", workdir)


def test_seconds_have_what_collectives_take_in_them():
    moved = {"all-reduce": Traffic(2, int(1e9)), "all-gather": Traffic(1, int(1e9))}
    made = Report(8, "TPU v5 lite", seconds=0.5, cost=Cost(collectives=moved))
    assert fit._seconds(made) == pytest.approx(0.5 + 2e9 / 200e9)
    assert fit._seconds(made._replace(kind="another")) == 0.5
    assert fit._seconds(made._replace(seconds=None)) is None


@pytest.mark.tpu_compiler
def test_the_smallest_slice_is_found(tpu, tmp_path, capsys):
    command = [f"--config={SMOKE}", "--mode=fit", "--topology=v5e", f"--workdir={tmp_path}"]
    main.run(command)
    assert "fits v5e:1x1" in capsys.readouterr().out
    record = json.loads((tmp_path / "fit.json").read_text())
    assert record["slices"][0]["best"]["seconds"] > 0
