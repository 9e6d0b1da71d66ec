"""`bitneck-models` from photographs to the report, with the network of three stages."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bitneck.errors import InvalidConfig
from bitneck_models.cli.main import app
from bitneck_models.measure.each import EachPhoto
from bitneck_models.zoo.entry import ZooEntry
from bitneck_testing.networks import keep_every_point, make_home, run
from bitneck_testing.photographs import add_photos

SPACE = """
name = "small"
split = "s1"
stride = [2, 4]
channels = [6]
lambda = [20, 2000]
step = [0.05, 0.3]
[training]
steps = 8
finish_steps = 4
batch = 16
warmup_steps = 3
"""


@pytest.fixture
def home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a search space, and with photographs in folders named by class."""
    (home / "space.toml").write_text(SPACE)
    for k in range(20):
        add_photos(home / f"labelled/{k % 10}", range(k, k + 1))
    monkeypatch.delenv("BITNECK_DATA", raising=False)
    return home


def test_from_photographs_to_the_report(home: Path) -> None:
    run("train", "zoo", "--data", ".")
    assert "every unit" in CliRunner().invoke(app, ["train", "zoo", "--data", "."]).stderr
    keep_every_point(ZooEntry(home / "zoo"))
    told = CliRunner().invoke(app, ["export", "zoo", "--out", "bundle", "--images", "photos"], catch_exceptions=False)
    assert "exporting: segment to-s1\n" in told.stderr
    assert "exporting: proof\n" in told.stderr
    (home / "results").mkdir()
    table = run("evaluate", "--bundle", "bundle", "--data", "labelled", "--record", "zoo")
    assert "s1-r1" in table
    assert set(json.loads((home / "zoo" / "ladder.json").read_text())["points"]) == {"s1-r1", "s1-r2"}
    heading = run("evaluate", "--bundle", "bundle", "--data", "photos", "--no-labels").splitlines()[0]
    assert " agreement, 95 % interval " in heading
    assert heading.rstrip().endswith("on the wire")
    unlabelled = json.loads(run("evaluate", "--bundle", "bundle", "--data", "photos", "--no-labels", "--json"))
    assert unlabelled["uncompressed"] == {"agreement": 1.0}
    with pytest.raises(InvalidConfig, match="ignore-index"):
        run("evaluate", "--bundle", "bundle", "--data", "photos", "--no-labels", "--ignore-index", "1")
    text = run("evaluate", "--bundle", "bundle", "--data", "labelled", "--zoo", "zoo", "--json")
    (home / "results" / "ladder.json").write_text(text)
    assert "each" not in text
    low, high = json.loads(text)["points"]
    assert (low["id"], low["recipe"]["init"], low["recipe"]["task"][0]["kind"]) == ("s1-r1", "s1-r2", "kl")
    assert low["payload_bytes_p5"] <= low["payload_bytes_mean"] <= low["payload_bytes_p95"]
    assert low["top1_interval"][0] <= low["top1"] <= low["top1_interval"][1]
    assert low["complexity"]["head"] == high["complexity"]["head"]
    assert low["complexity"]["head"]["multiply_adds"] == 8 * 8 * 8 * 48 + 4 * 4 * 12 * 32
    arguments = ("--split", "s1", "--zoo", "zoo", "--train-data", ".")
    text = run("baselines", "--data", "labelled", *arguments, "--codec", "jpeg", "--codec", "webp", "--json")
    (home / "results" / "baselines.json").write_text(text)
    with pytest.raises(InvalidConfig, match="leave out --backbone small"):
        run("baselines", "--data", "labelled", *arguments, "--backbone", "small")
    assert {p["codec"] for p in json.loads(text)["baselines"]} == {
        "jpeg", "webp", "raw float16", "raw 8 bit", "training-free",
    }  # fmt: skip
    (home / "results" / "commands.md").write_text("bitneck-models evaluate ...")
    (home / "results" / "ladder.md").write_text("A note.")
    assert "1 studies, 5 baselines, 2 pictures" in run("report", "results", "--out", "page.md")
    page = (home / "page.md").read_text()
    assert "bitneck-models evaluate ..." in page
    assert "A note." in page
    assert (home / "results" / "accuracy.png").is_file()


def test_two_folders_are_measured_together(home: Path) -> None:
    """Means over both are those of the photographs of each, and what each photograph gave is kept in order."""
    run("train", "zoo", "--data", ".")
    keep_every_point(ZooEntry(home / "zoo"))
    run("export", "zoo", "--out", "bundle")
    for k in range(30, 37):
        add_photos(home / f"more/{k % 10}", range(k, k + 1))
    arguments = ("evaluate", "--bundle", "bundle", "--zoo", "zoo", "--each", "--json", "--data")
    first, second = (json.loads(run(*arguments, folder)) for folder in ("labelled", "more"))
    both = json.loads(run(*arguments, "labelled", "--also", "more"))
    assert (both["dataset"], both["images"]) == ("labelled and more", 27)
    assert len({document["photos_crc32c"] for document in (first, second, both)}) == 3
    for point in both["points"]:
        parts = [
            (EachPhoto.from_dict(p["each"], d["images"]), p)
            for d in (first, second)
            for p in d["points"]
            if p["id"] == point["id"]
        ]
        each = EachPhoto.from_dict(point["each"], 27)
        assert each.payload_bytes.tolist() == [v for part, _ in parts for v in part.payload_bytes.tolist()]
        assert each.right.tolist() == [v for part, _ in parts for v in part.right.tolist()]
        assert each.payload_bytes.mean() == pytest.approx(point["payload_bytes_mean"])
        assert each.right.mean() == pytest.approx(point["top1"])
        assert each.agrees.mean() == pytest.approx(point["agreement"])
    with pytest.raises(InvalidConfig, match="nowhere: no such folder"):
        run(*arguments, "labelled", "--also", "nowhere")


def test_search_and_pareto(home: Path) -> None:
    run("search", "zoo", "--space", "space.toml", "--data", ".", "--trials", "4")
    document = json.loads(run("pareto", "zoo", "--space", "space.toml", "--points", "2", "--json"))
    assert not document["written"]
    assert 1 <= len([row for row in document["front"] if row["point"]]) <= 2
    assert "to write with --write" in run("pareto", "zoo", "--space", "space.toml", "--points", "2")
    assert "written to" in run("pareto", "zoo", "--space", "space.toml", "--points", "2", "--prefix", "s1-n", "--write")
    run("export", "zoo", "--out", "bundle")
    points = json.loads((home / "bundle" / "manifest.json").read_text())["points"]
    assert {p["id"] for p in points} <= {"s1-n1", "s1-n2"}
    with pytest.raises(InvalidConfig, match="has no study"):
        run("pareto", "zoo", "--space", "space.toml", "--storage", "sqlite:///none.db")


def test_two_workers_from_one_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers are processes of their own; they learn of the small network as they start."""
    (home / "sitecustomize.py").write_text(
        """
from bitneck_models.networks import registry
from bitneck_testing.networks import SMALL
registry.BACKBONES["small"] = SMALL
"""
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(home), *filter(None, sys.path)]))
    run("search", "zoo", "--space", "space.toml", "--data", ".", "--trials", "6", "--workers", "2")
    from bitneck_models.search.space import load_space
    from bitneck_models.search.study import open_study

    trials = open_study(load_space(home / "space.toml"), f"sqlite:///{home}/runs/search/small.db", create=False).trials
    ended = [t for t in trials if t.state.name in ("COMPLETE", "PRUNED")]
    assert 6 <= len(ended) <= 7
    (home / "space.toml").write_text(SPACE.replace("[20, 2000]", "[20, 3000]"))
    with pytest.raises(InvalidConfig, match="another search space"):
        run("search", "zoo", "--space", "space.toml", "--data", ".", "--trials", "6", "--workers", "2")


def test_a_starter_recipe_is_trained(home: Path) -> None:
    run("new", "starter", "--backbone", "small", "--photos", "photos", "--split", "s1")
    entry = ZooEntry(home / "starter")
    assert [unit.id for unit in entry.recipe.units] == ["s1-r2", "s1-r1"]
    text = (home / "starter" / "recipe.toml").read_text()
    assert "# " in text
    short = text.replace("steps = 600", "steps = 6").replace("steps = 200", "steps = 4").replace("= 128", "= 16")
    short = short.replace("lambda = 1000 ", "lambda = 1e5 ").replace("step = 1.0", "step = 0.1")
    short = short.replace("step = 2.0", "step = 0.2")
    (home / "starter" / "recipe.toml").write_text(short)
    told = CliRunner().invoke(app, ["train", "starter", "--data", ".", "--dry-run"], catch_exceptions=False)
    assert told.exit_code == 0
    assert "trying s1-r2 ..." in told.stderr
    rows = {line.split()[0]: line.split() for line in told.stdout.splitlines() if line.startswith("s1-r")}
    assert rows["s1-r2"][1] == rows["s1-r2"][2] == "146"  # 18 photographs in 8 views, and 2 that were put aside
    assert rows["s1-r1"][2] == "0"  # the same features
    assert not (home / "starter" / "units").exists()
    assert not (home / "runs").exists()
    assert "warmup_steps (100) is not below steps (6)" in told.stderr
    assert "target_bytes has no effect" in told.stderr
    trained = CliRunner().invoke(app, ["train", "starter", "--data", "."], catch_exceptions=False)
    assert trained.exit_code == 0
    assert set(ZooEntry(home / "starter").points()) == {"s1-r1", "s1-r2"}
    again = CliRunner().invoke(app, ["train", "starter", "--data", ".", "--dry-run", "--again"])
    assert {line.split()[2] for line in again.stdout.splitlines() if line.startswith("s1-r")} == {"0"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("zoo", "--backbone", "small", "--photos", "p"), "exists already"),
        (("other", "--backbone", "small", "--photos", "p", "--split", "s9"), "no split point 's9'; it has: s2, s1"),
        (("other", "--backbone", "nothing", "--photos", "p"), "no backbone"),
        (("Other", "--backbone", "small", "--photos", "p"), "malformed"),
    ],
)
def test_starter_recipes_that_are_refused(home: Path, arguments: tuple[str, ...], text: str) -> None:
    with pytest.raises(InvalidConfig, match=text):
        run("new", *arguments)
    assert not (home / "other").exists()


def test_a_starter_recipe_knows_where_its_photographs_are(home: Path) -> None:
    """Absolute paths become paths below --data, and the next command is printed with it."""
    told = CliRunner().invoke(app, ["new", "one", "--backbone", "small", "--photos", str(home / "photos")])
    assert told.exit_code == 0, told.output
    assert f"train one --data {home} --dry-run" in told.stderr
    assert "building small" in told.stderr
    assert [source.folder for source in ZooEntry(home / "one").recipe.data] == ["photos"]
    run("new", "two", "--backbone", "small", "--photos", str(home / "labelled" / "1"), "--data", ".")
    assert [source.folder for source in ZooEntry(home / "two").recipe.data] == ["labelled/1"]
    other = ("new", "other", "--backbone", "small", "--photos")
    assert "photos/photos: no such folder; --photos names folders below --data" in refused(
        *other, "photos", "--data", "photos"
    )
    assert "is not below --data" in refused(*other, str(home / "photos"), "--data", "labelled")
    assert not (home / "other").exists()


@pytest.mark.parametrize("command", [("train", "zoo"), ("search", "zoo", "--space", "x"), ("train-network", "zoo")])
def test_a_command_without_photographs_ends_before_torch_is_loaded(home: Path, command: tuple[str, ...]) -> None:
    text = f"""
import sys
from bitneck.errors import InvalidConfig
from bitneck_models.cli.main import app
try:
    app({command!r}, standalone_mode=False)
except InvalidConfig as exc:
    print(exc, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", text], cwd=home, capture_output=True, text=True, timeout=120)
    assert done.stdout == "no folder of photographs: give --data or set BITNECK_DATA False\n", done.stderr


def refused(*arguments: str) -> str:
    """What a command says that is refused."""
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, InvalidConfig), result.output
    return str(result.exception)


def test_a_checkpoint_of_other_contents_is_refused(home: Path) -> None:
    train = ("train", "zoo", "--data", ".", "--unit", "s1-r2")
    run(*train)
    (path,) = (home / "runs").rglob("s1-r2.pt")
    whole = torch.load(path, weights_only=True)
    (home / "zoo" / "units" / "s1-r2" / "unit.safetensors").unlink()
    for changed in (
        {"done": 10**9}, {"done": "x"}, {"optimizer": {}}, {"unit": {}}, {"mean": {"a": torch.zeros(1)}},
    ):  # fmt: skip
        torch.save(whole | changed, path)
        assert "remove it to train anew" in refused(*train)
    torch.save({name: value for name, value in whole.items() if name != "unit"}, path)
    assert "remove it to train anew" in refused(*train)


def test_files_of_people_that_are_not_what_they_should_be(home: Path) -> None:
    run("train", "zoo", "--data", ".")
    run("export", "zoo", "--out", "bundle")
    labelled = home / "mine"
    labelled.mkdir()
    (labelled / "labels.csv").write_bytes("file,index\n".encode("utf-16"))
    assert "is not UTF-8" in refused("evaluate", "--bundle", "bundle", "--data", "mine")
    assert "no recipe there" in refused("evaluate", "--bundle", "bundle", "--data", "mine", "--record", "mine")
    (home / "other").mkdir()
    make_home(home / "other")
    run("train", "other/zoo", "--data", "other")
    shutil.rmtree(home / "other" / "zoo" / "points" / "s1-r1")
    shutil.copytree(home / "zoo" / "points" / "s1-r2", home / "other" / "zoo" / "points" / "s1-r1")
    for command in (("evaluate", "--record", "other/zoo"), ("quantize", "other/zoo")):
        assert "export the entry again" in refused(*command, "--bundle", "bundle", "--data", ".")
    assert "no such folder of results" in refused("report", "nowhere")
    (home / "results").mkdir()
    (home / "results" / "ladder.json").write_text('{"uncompressed": 3}')
    assert "no results of" in refused("report", "results", "--out", "page.md")
    empty = {"dataset": "mine", "images": 1, "uncompressed": {"top1": 1.0}, "baselines": []}
    (home / "results" / "ladder.json").write_text(json.dumps(empty))
    (home / "results" / "ladder.md").write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in refused("report", "results", "--out", "page.md")


def test_a_starter_recipe_takes_any_name_of_a_folder(home: Path) -> None:
    run("new", "quoted", "--backbone", "small", "--photos", 'a"b\\c', "--photos", "Bäume")
    assert [source.folder for source in ZooEntry(home / "quoted").recipe.data] == ['a"b\\c', "Bäume"]
