"""The search: its space, several workers on one storage, pruning, the front, and the way into a zoo entry."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from bitneck.errors import InvalidConfig, ModelFailure
from bitneck_models.search.adopt import adopt
from bitneck_models.search.front import front, pick_ladder
from bitneck_models.search.space import load_space
from bitneck_models.search.study import describe, open_study
from bitneck_models.search.worker import is_hopeless, prepare, work
from bitneck_models.training.photo_sets import photo_sets
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.recipe import UnitKind
from bitneck_testing.networks import small_backbone
from bitneck_testing.photographs import photo

SPACE = """
name = "s1-search"
split = "s1"
stride = [2, 4]
channels = [3, 6]
lambda = [20, 2000]
step = [0.05, 0.3]
prune_after = 0.5
[training]
steps = 12
finish_steps = 6
batch = 16
precision = "float32"
warmup_steps = 3
ema = 0.9
"""
RECIPE = """
name = "small"
backbone = "small"
[[data]]
folder = "photos"
views = 4
validate_every = 4
[[units]]
id = "s1-r1"
split = "s1"
stride = 2
channels = 6
step = 0.2
lambda = 300
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A zoo entry, photographs and a search space."""
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "recipe.toml").write_text(RECIPE)
    (tmp_path / "photos").mkdir()
    for k in range(24):
        photo(k, (60, 50)).save(tmp_path / "photos" / f"{k:02d}.png")
    (tmp_path / "space.toml").write_text(SPACE)
    return tmp_path


def searched(home: Path, trials: int, text: str = SPACE) -> tuple[ZooEntry, list[object]]:
    (home / "space.toml").write_text(text)
    space, entry, backbone = load_space(home / "space.toml"), ZooEntry(home / "zoo"), small_backbone()
    study = open_study(space, f"sqlite:///{home}/trials.db")
    seen: list[object] = []
    sets = photo_sets(entry.recipe, home, backbone)
    work(study, space, entry, backbone, sets, home / "runs", trials=trials, on_trial=seen.append)
    return entry, seen


def test_two_workers_share_one_storage(home: Path) -> None:
    storage = f"sqlite:///{home}/trials.db"
    searched(home, 1)  # fills the feature cache
    command = [
        sys.executable, str(Path(__file__).parent / "search_worker.py"), storage, str(home / "space.toml"),
        str(home / "zoo"), str(home), str(home / "runs"), "9",
    ]  # fmt: skip
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = [int(worker.communicate(timeout=120)[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    trials = open_study(load_space(home / "space.toml"), storage).trials
    ended = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    assert 9 <= len(ended) <= 10  # both may have begun the last one
    assert [t.number for t in trials] == list(range(len(trials)))
    assert sum(counts) == len(trials) - 1
    assert min(counts) >= 1


def test_a_search_that_streams_caches_a_sample_and_the_photographs_put_aside(home: Path) -> None:
    (home / "space.toml").write_text(SPACE.replace("[training]", "[training]\nstream = true"))
    space, entry, backbone = load_space(home / "space.toml"), ZooEntry(home / "zoo"), small_backbone()
    held, given = prepare(space, backbone, photo_sets(entry.recipe, home, backbone), home / "runs")
    views = [json.loads(path.read_text())["views"] for path in (home / "runs").rglob("key.json")]
    assert sorted(views) == [len(held), len(given.sample)] == [6, 18]  # not 18 photographs with 4 views each


def test_a_search_goes_on_where_it_stopped(home: Path) -> None:
    assert [len(searched(home, trials)[1]) for trials in (2, 2, 5)] == [2, 0, 3]


def test_the_front_becomes_a_zoo_entrys_ladder(home: Path) -> None:
    entry, _ = searched(home, 8)
    space = load_space(home / "space.toml")
    found = front(open_study(space, f"sqlite:///{home}/trials.db", create=False))
    assert found
    assert [f.bpp for f in found] == sorted(f.bpp for f in found)
    assert [f.agreement for f in found] == sorted(f.agreement for f in found)
    names = [f"s1-p{k}" for k in range(len(found))]
    adopt(entry, found, names)
    again = ZooEntry(home / "zoo")
    assert [p.id for p in again.recipe.units] == ["s1-r1", *names]
    assert [p.id for p in again.trained()] == names
    for f, name in zip(found, names, strict=True):
        point = again.recipe.unit(name)
        assert (point.stride, point.step) == (f.recipe["stride"], f.recipe["step"])
        assert again.unit(small_backbone(), point).latent_shape[0] == again.tables(point.id).channels
        assert again.recipe.training_of(point).steps == 12
        assert again.recipe.training_of(point).ema == 0.9
        assert again.recipe.training_of(point) == space.training  # every key of the schedule is adopted
        assert again.edited(point) == []
    with pytest.raises(InvalidConfig, match="has s1-p0 already"):
        adopt(again, found[:1], names[:1])
    (found[0].folder / "unit.safetensors").unlink()
    with pytest.raises(InvalidConfig, match="copy that folder here"):
        adopt(again, found[:1], ["s1-q"])


def test_a_search_in_which_every_trial_fails_ends(home: Path) -> None:
    (home / "space.toml").write_text(SPACE.replace("step = [0.05, 0.3]", "step = [1e6, 1e7]"))
    space, entry, backbone = load_space(home / "space.toml"), ZooEntry(home / "zoo"), small_backbone()
    study = open_study(space, f"sqlite:///{home}/trials.db")
    seen: list[str] = []
    sets = photo_sets(entry.recipe, home, backbone)
    with pytest.raises(ModelFailure, match="8 trials in a row failed, the last because: every latent channel"):
        work(study, space, entry, backbone, sets, home / "runs", trials=50, on_trial=lambda t: seen.append(describe(t)))
    assert len(seen) == 8
    assert seen[0].startswith("trial 0: fail every latent channel would be pruned")
    assert front(study) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('split = "s1"', 'split = "s1"\nsurprise = 1', "surprise"),
        ("lambda = [20, 2000]", "lambda = [20, 2]", "smallest value 20.0 is above"),
        ("step = [0.05, 0.3]", "step = [0, 0.6]", "step"),
        ("stride = [2, 4]", "stride = []", "stride"),
        ('split = "s1"', 'split = "s1"\ninit = "s1-r1"', "is no method"),
        ('split = "s1"', 'split = "s1"\ninit = "next"\ntopology = "nested"', "a nested unit starts as"),
        ("name", "= name", "not TOML"),
    ],
)
def test_spaces_that_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / "space.toml").write_text(SPACE.replace(old, new, 1))
    with pytest.raises(InvalidConfig, match=message):
        load_space(tmp_path / "space.toml")


def test_spaces_and_storages_that_do_not_fit(home: Path) -> None:
    (home / "space.toml").write_text(SPACE.replace("stride = [2, 4]", "stride = [2, 5]"))
    with pytest.raises(InvalidConfig, match="use 1 to 4"):
        load_space(home / "space.toml").check(small_backbone())
    with pytest.raises(InvalidConfig, match="no search space"):
        load_space(home / "none.toml")
    (home / "space.toml").write_text(SPACE)
    space = load_space(home / "space.toml")
    for storage in ("nonsense", f"sqlite:////{home}/no/such/folder/x.db", "postgresql://nobody@127.0.0.1:1/x"):
        with pytest.raises(InvalidConfig, match="cannot be used"):
            open_study(space, storage)
    storage = f"sqlite:///{home}/trials.db"
    with pytest.raises(InvalidConfig, match="has no study"):
        open_study(space, storage, create=False)
    open_study(space, storage)
    with pytest.raises(InvalidConfig, match="another search space"):
        open_study(space.model_copy(update={"stride": (2,)}), storage)


def test_a_trial_is_a_point_of_the_spaces_unit(tmp_path: Path) -> None:
    """Whatever a space says of the unit and its loss goes into every trial."""
    text = """
split = "s1"
topology = "nested"
filters = 4
hidden = 5
group = [1, 2]
pool = 2
decoder_blocks = [1, 0]
freeze = true
rate = "factorized"
task = [{ kind = "kl", weight = 2.0 }, { kind = "mse", layer = "body" }]
init = "random"
"""
    (tmp_path / "space.toml").write_text(text + SPACE.replace('split = "s1"', ""))
    space = load_space(tmp_path / "space.toml")
    trial = optuna.trial.FixedTrial({"stride": 4, "channels": 3, "lambda": 50.0, "step": 0.1}, number=7)
    point = space.point(trial)  # type: ignore[arg-type]
    assert (point.id, point.stride, point.channels, point.lambda_, point.step) == ("s1-t0007", 4, 3, 50.0, 0.1)
    fields = UnitKind.model_fields
    assert set(fields) <= set(tomllib.loads(text))
    for name, field in fields.items():
        assert getattr(point, name) == getattr(space, name) != field.default, name


def test_hopeless_is_clearly_worse_at_no_fewer_bytes() -> None:
    assert is_hopeless((100.0, 0.5), [(90.0, 0.7)], 100)
    assert not is_hopeless((100.0, 0.5), [(90.0, 0.55)], 100)  # within two standard errors
    assert not is_hopeless((100.0, 0.5), [(110.0, 0.9)], 100)
    assert not is_hopeless((100.0, 0.5), [], 100)


@given(st.lists(st.floats(1, 1e5), min_size=1, max_size=40, unique=True), st.integers(1, 12))
def test_a_ladder_has_both_ends_and_rises(rates: list[float], count: int) -> None:
    points = [(rate, float(k)) for k, rate in enumerate(sorted(rates))]
    picked = pick_ladder(points, count)
    assert len(picked) == min(count, len(points))
    assert picked == sorted(set(picked))
    assert picked[-1] == len(points) - 1
    if count > 1:
        assert picked[0] == 0
    with pytest.raises(InvalidConfig):
        pick_ladder([], count)
