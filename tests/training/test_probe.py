"""Probes at the end of a run: on another store, of labels in members of their own, on folders with a class map."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import read_tests, right_guesses
from PIL import Image, ImageOps
from train import main

from graphbuild.demo.scenes import encode_jpeg, make_scenes, render
from graphbuild.errors import ConfigError
from graphbuild.job.verbs import run_verb
from graphbuild.recipe import Embed, Index, Recipe
from graphbuild.runner.runner import Runner
from graphbuild.store.store import Store

pytestmark = pytest.mark.usefixtures("one_thread")
BACKGROUNDS = sorted({scene.background for scene in make_scenes(480)})


@pytest.fixture(scope="module")
def labelled_store(make_once: Callable[[str, Callable[[Path], object]], Path]) -> str:
    """Three tars of 80 scenes without json: .cls is the number of the scene's background. Nodes are the classes."""
    return str(make_once("labelled", make_labelled_store))


def make_labelled_store(folder: Path) -> None:
    (folder / "shards").mkdir()
    for number, scene in enumerate(make_scenes(240)):
        with tarfile.open(folder / "shards" / f"{number // 80:05d}.tar", "a") as archive:
            label = f"{BACKGROUNDS.index(scene.background)}\n".encode()
            for extension, content in {"jpg": encode_jpeg(render(scene, 48)), "cls": label}.items():
                info = tarfile.TarInfo(f"{number:05d}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    names = folder / "names.txt"
    names.write_text("".join(f"{name}\n" for name in BACKGROUNDS))
    embed = Embed(shards=f"{folder}/shards/*.tar", caption_member="cls", class_names=str(names))
    with Runner(workers=0) as runner:
        for verb in ("embed", "index", "export"):
            run_verb(verb, Recipe(embed=embed, index=Index(k=0)), Store(str(folder)), runner)


def rows_of(run_dir: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["label"]: line for line in lines if "label" in line}


def command(store: str, run_dir: Path, *more: object) -> list[str]:
    sizes = ["--epochs", 1, "--pixels", 32, "--batch-size", 60, "--run-dir", run_dir]
    return [store, *map(str, [*sizes, *more])]


def test_a_run_is_probed_on_another_store_and_on_folders_with_class_maps(
    scenes_store: str, labelled_store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is trained on a store without .cls; the folders hold scenes of the backgrounds, under other names."""
    count = dict.fromkeys(BACKGROUNDS, 0)
    for number, scene in enumerate(make_scenes(400)[300:]):
        folder = tmp_path / "images" / f"{BACKGROUNDS.index(scene.background):02d}_{scene.background}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.JPEG").write_bytes(encode_jpeg(render(scene, 48)))
        count[scene.background] += 1
    last = len(BACKGROUNDS) - 1
    to_test = {str(number): number for number in range(last)} | {str(last): -1}
    (tmp_path / "in_to_in9.json").write_text(json.dumps(to_test))
    (tmp_path / "tests.yaml").write_text("original:\n  folder: images\n  train_to_test: in_to_in9.json\n")
    options = ["--probe", labelled_store, "--labels", ".cls", "--tests", tmp_path / "tests.yaml"]
    main(command(scenes_store, tmp_path / "run", *options))
    rows = rows_of(tmp_path / "run")
    assert set(rows) == {".cls", ".cls on original"}
    assert rows[".cls"]["classes"] == len(BACKGROUNDS)
    for row in rows.values():
        assert row["linear untrained"] > row["chance"] + 0.3
        assert set(row) == {"label", "classes", "chance"} | {
            f"{probe} {encoder}" for probe in ("knn", "linear") for encoder in ("trained", "untrained")
        }
    kept = [count[name] for name in BACKGROUNDS[:last]]  # the last class has no place in the map
    assert any(rows[".cls on original"]["chance"] == pytest.approx(one / sum(kept)) for one in [0, *kept])
    printed = capsys.readouterr().out
    assert f"1 held-out shard(s) of {labelled_store}" in printed
    assert f"original: 1 class folders have no class here, as {last:02d}_{BACKGROUNDS[last]}" in printed
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "metrics.jsonl",
    ]
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["store"] == scenes_store
    main(command(scenes_store, tmp_path / "run", "--labels", "kind"))  # the finished run, probed on its own store
    assert "kind" in rows_of(tmp_path / "run")


def test_mistakes_of_probes_are_explained_before_the_training(
    scenes_store: str, labelled_store: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "images/a").mkdir(parents=True)
    files = {
        "none.yaml": "[]",
        "typo.yaml": "a: {folder: empty, map: x}",
        "gone.yaml": "a: {folder: gone}",
        "empty.yaml": "a: {folder: empty}",
        "list.yaml": "a: {folder: images, train_to_test: list.json}",
        "list.json": "[1, 2]",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for arguments, message in (
        (["--labels", ".cls"], r"no member.*\['cls'\]|cls.*members of their own, as .cls"),
        (["--labels", "kind", "--probe", labelled_store], "json.*fields of the samples' json members"),
        (["--labels", ".cls", "--probe", labelled_store, "--probe-held-out", 3], "left to train on"),
        (["--labels", ".cls", "--probe", labelled_store, "--probe-held-out", 0], "set --probe-held-out to 1"),
        (["--labels", ".cls", "--probe", tmp_path / "nowhere"], "nowhere"),
        (["--probe", labelled_store], "without --labels"),
        *(
            (["--labels", "kind", "--tests", tmp_path / name], message)
            for name, message in (
                ("missing.yaml", "No such file.*missing.yaml"),
                ("none.yaml", "none.yaml: .*valid dict"),
                ("typo.yaml", r"'a', 'map'.*not permitted"),
                ("gone.yaml", "No such file.*gone"),
                ("empty.yaml", "holds no image in a class folder"),
                ("list.yaml", "list.yaml: AttributeError.*docs/how-to/train.md"),
            )
        ),
    ):
        with pytest.raises(SystemExit, match=f"(?s){message}"):
            main(command(scenes_store, tmp_path / "run", *arguments))
    assert not (tmp_path / "run").exists()


def test_class_maps_of_imagenet_9_and_objectnet_say_which_guesses_are_right() -> None:
    assert right_guesses(["cat", "dog"]) == {"cat": {"cat"}, "dog": {"dog"}}
    folders = ["00_dog", "01_bird"]
    of_nine = right_guesses(folders, train_to_test={"0": -1, "1": 1, "2": 1, "151": 0})
    assert of_nine == {"00_dog": {"151"}, "01_bird": {"1", "2"}}
    labels = {"alarm_clock": "Alarm clock", "backpack": "Backpack", "air_freshener": "Air freshener"}
    to_train = {"Alarm clock": "analog clock; digital clock", "Backpack": "backpack, back pack"}
    names = ["tench, Tinca tinca", "digital clock", "backpack, back pack", "analog clock"]
    found = right_guesses(sorted(labels), None, to_train, labels, names)
    assert found == {"air_freshener": set(), "alarm_clock": {"3", "1"}, "backpack": {"2"}}
    assert right_guesses(["a"], test_to_train={"a": [3, 5]}) == {"a": {"3", "5"}}
    with pytest.raises(ValueError, match="'analog clock' is not in list"):
        right_guesses(["alarm_clock"], None, to_train, labels, names[:3])


def test_images_of_folders_lose_their_border_and_are_then_cut_as_others(tmp_path: Path) -> None:
    (tmp_path / "images/a/deep").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (42, 62, 3), np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "images/a/deep/1.PNG")
    (tmp_path / "images/a/notes.txt").write_text("no image")
    for border in (0, 2):
        (tmp_path / "tests.yaml").write_text(f"one: {{folder: images, border: {border}}}")
        (test,) = read_tests(str(tmp_path / "tests.yaml"), 20)
        assert (len(test), test.asked.truths) == (1, ["a"])
        inner = Image.fromarray(pixels[border : 42 - border, border : 62 - border])
        wanted = np.asarray(ImageOps.fit(inner, (20, 20), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        assert torch.equal(test.__getitems__([0])["image"][0], torch.from_numpy(wanted.copy()))
    (tmp_path / "tests.yaml").write_text("one: {folder: images, border: x}")
    with pytest.raises(ConfigError, match="border"):
        read_tests(str(tmp_path / "tests.yaml"), 20)
