"""The rule by which the pipeline skips a stage, continues one, or runs it again; and the settings that it passes on."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import qwen3_finetune.config
from contracts.errors import EXIT_INTERRUPTED, InputError
from contracts.files import read_json, sidecar_of, write_json
from contracts.tables import read_any
from data import prepare
from pipeline import run
from pipeline.resume import UNFINISHED, contents
from pipeline.run import run_stages
from pipeline.stage_settings import resolved_settings
from pipeline.stages import PICTURES, PipelineSettings, Stage, pipeline_stages
from training.run_folder import MARKER
from training.weights import weights_hash


class FakeStages:
    """Instead of the stages' processes: data.prepare really runs, the others write what they would have computed from.

    So every file that a stage declares depends on every file that it reads and on its settings, as in real life.
    """

    def __init__(self, workspace: Path):
        self.workspace = workspace
        self.plan: list[Stage] = []
        self.ran: list[str] = []
        """names of the stages that ran, with --resume if they were asked to continue"""
        self.interrupted_at = ""
        """name of a stage that is interrupted in the middle"""

    def run(self, plan: list[Stage], *, resume: bool = False) -> list[str]:
        self.plan = plan
        self.ran = []
        run_stages(plan, self.workspace, resume=resume)
        return self.ran

    def __call__(self, command: list[str]) -> tuple[float, int, int]:
        resumed = command[-1] == "--resume"
        stage = next(stage for stage in self.plan if stage.command(self.workspace, resume=resumed) == command)
        self.ran.append(stage.name + (" --resume" if resumed else ""))
        settings = resolved_settings(stage)
        if stage.name == self.interrupted_at:
            write_json(self.workspace / "checkpoints" / settings["run"] / "settings.json", settings)
            raise KeyboardInterrupt
        if stage.module == "data.prepare":
            prepare.main([*stage.arguments, "--workspace", str(self.workspace)])
            return 0.1, 1, 0
        made_from = f"{settings} {contents(self.workspace, stage.reads)}"
        for pattern in stage.writes:
            path = self.workspace / pattern.replace("**/*", "part").replace("*", "part")
            sidecar = sidecar_of(path)
            is_up_to_date = path.suffix == ".pkl" and sidecar.is_file() and sidecar.read_text() == made_from
            # like an extraction, which trusts the json beside its file
            if not pattern.startswith(PICTURES) and not is_up_to_date:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(made_from)
        return 0.1, 1, 0


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = FakeStages(tmp_path / "out")
    monkeypatch.setattr(run, "_run", fake)
    return fake


@pytest.fixture
def source(tmp_path, sample_workspace):
    """A catalogue of its own with train, test and pictures."""
    return shutil.copytree(sample_workspace / "catalogue", tmp_path / "source")


def plan_of(source: Path, preset: str = "tiny", **settings) -> list[Stage]:
    return pipeline_stages(PipelineSettings(data=source, preset=preset, **settings))


def change_first_row(table: Path, **values: str) -> None:
    rows = read_any(table)
    for column, value in values.items():
        rows.loc[0, column] = value
    rows.to_csv(table, index=False)


def picture_of(workspace: Path, source: Path, table: str) -> Path:
    """The picture of the first row that has one."""
    images = read_any(workspace / f"data/prepared_{table}.csv")["image"]
    return next(source / "images" / name for name in images if (source / "images" / name).is_file())


def modules_of(names: list[str]) -> list[str]:
    return [name.split()[0] for name in names]


def test_nothing_changed_nothing_runs(fake, source):
    plan = plan_of(source)
    assert fake.run(plan) == [stage.name for stage in plan]
    assert fake.run(plan, resume=True) == []
    assert [entry["stage"] for entry in read_json(fake.workspace / "pipeline.json")] == [
        stage.name for stage in plan
    ]
    assert not (fake.workspace / UNFINISHED).exists()
    assert len(fake.run(plan)) == len(plan), "without --resume everything runs"


def test_a_changed_training_table_runs_everything_again(fake, source):
    plan = plan_of(source)
    fake.run(plan)
    change_first_row(source / "train.csv", price="77.5")
    assert fake.run(plan, resume=True) == [stage.name for stage in plan]


def test_a_changed_test_table_trains_no_encoder_and_no_fusion_again(fake, source):
    plan = plan_of(source)
    fake.run(plan)
    change_first_row(source / "test.csv", catalog_content="Item Name: a new product")
    assert fake.run(plan, resume=True) == [
        plan[0].name,
        "clip_finetune.extract_embeddings test",
        "siglip_extract.extract_embeddings test --preset tiny",
        "qwen3_finetune.extract_embeddings test",
        "fusion.all_embeddings.predict test --run fusion_all_embeddings",
        # word models learn their vocabulary from the texts of both tables
        "word_models.train --model ridge",
        "word_models.train --model mlp --seeds 1",
        plan[-1].name,
    ]
    assert fake.run(plan, resume=True) == []


def test_a_changed_picture_runs_the_stages_that_look_at_it(fake, source):
    plan = plan_of(source)
    fake.run(plan)
    picture = picture_of(fake.workspace, source, "test")
    picture.write_bytes(picture.read_bytes() + b" ")
    assert fake.run(plan, resume=True) == [
        "clip_finetune.extract_embeddings test",
        "siglip_extract.extract_embeddings test --preset tiny",
        "fusion.all_embeddings.predict test --run fusion_all_embeddings",
        plan[-1].name,
    ]
    picture_of(fake.workspace, source, "train").unlink()
    ran = fake.run(plan, resume=True)
    assert ran[0] == "clip_finetune.train --preset tiny"
    assert not {"data.prepare", "qwen3_finetune.train", "word_models.train"} & set(modules_of(ran))


def test_a_changed_setting_runs_its_stage_and_what_depends_on_it(fake, source):
    fake.run(plan_of(source))
    ran = fake.run(plan_of(source, set=("fusion.loss=huber",)), resume=True)
    assert modules_of(ran) == [
        "fusion.all_embeddings.train",
        "fusion.all_embeddings.predict",
        "ensemble.train",
    ]


def test_a_default_that_was_edited_in_a_config_is_a_changed_setting(fake, source, monkeypatch):
    plan = plan_of(source)
    fake.run(plan)
    monkeypatch.setitem(qwen3_finetune.config.PRESETS["tiny"], "epochs", 9)
    assert fake.run(plan, resume=True)[0] == "qwen3_finetune.train --preset tiny"


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ("data/embeddings/qwen_text_train.pkl", "qwen3_finetune.extract_embeddings train"),
        (
            "data/embeddings/siglip_image_test.pkl.json",
            "siglip_extract.extract_embeddings test --preset tiny",
        ),
        ("checkpoints/clip_finetune/part.safetensors", "clip_finetune.train --preset tiny"),
        ("checkpoints/words_ridge/part.npz", "word_models.train --model ridge"),
        ("predictions/fusion_all_embeddings_train.csv", "fusion.all_embeddings.train --preset tiny --refit"),
    ],
)
@pytest.mark.parametrize("how", ["edited", "removed"])
def test_a_file_that_is_not_as_it_was_written_is_made_again(fake, source, changed, again, how):
    """Made from the same inputs, it is the same as before, and nothing that depends on it runs again."""
    plan = plan_of(source)
    fake.run(plan)
    file = fake.workspace / changed
    written = file.read_text()
    if how == "edited":
        file.write_text("edited")
    else:
        file.unlink()
    assert fake.run(plan, resume=True) == [again]
    assert file.read_text() == written
    assert fake.run(plan, resume=True) == []


def test_an_edited_submission_is_made_again_by_the_ensemble(fake, source):
    plan = plan_of(source)
    fake.run(plan)
    (fake.workspace / "test_out.csv").write_text("sample_id,price\n1,2\n")
    assert fake.run(plan, resume=True) == [plan[-1].name]


def test_what_came_later_into_a_run_folder_does_not_matter(fake, source):
    plan = plan_of(source)
    fake.run(plan)
    (fake.workspace / "checkpoints/fusion_all_embeddings/explanation.json").write_text("{}")
    assert fake.run(plan, resume=True) == []


def test_another_pretrained_model_in_the_same_folder_is_a_changed_input(fake, source, tmp_path):
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "model.safetensors").write_text("one")
    plan = plan_of(source, "cpu", encoder=str(encoder))
    fake.run(plan)
    (encoder / "model.safetensors").write_text("another")
    assert fake.run(plan, resume=True)[0].startswith("qwen3_finetune.train --run frozen")


def test_a_workspace_that_was_moved_is_still_current(fake, source, tmp_path):
    plan = plan_of(source)
    fake.run(plan)
    fake.workspace = fake.workspace.rename(tmp_path / "elsewhere")
    assert fake.run(plan, resume=True) == []


QWEN = "qwen3_finetune.train --preset tiny"


def interrupt(fake: FakeStages, plan: list[Stage]) -> None:
    fake.interrupted_at = QWEN
    with pytest.raises(KeyboardInterrupt):
        fake.run(plan)
    fake.interrupted_at = ""


def test_an_interrupted_training_is_continued(fake, source, capsys):
    plan = plan_of(source)
    interrupt(fake, plan)
    ran = fake.run(plan, resume=True)
    assert ran[0] == f"{QWEN} --resume"
    assert "continues where it stopped" in capsys.readouterr().out
    assert fake.run(plan, resume=True) == []


def test_an_interrupted_training_starts_anew_when_something_changed(fake, source):
    plan = plan_of(source)
    interrupt(fake, plan)
    changed_setting = plan_of(source, set=("qwen3_finetune.lr=0.001",))
    assert fake.run(changed_setting, resume=True)[0] == f"{QWEN} --lr=0.001"

    interrupt(fake, plan)
    change_first_row(source / "train.csv", price="77.5")
    assert QWEN in fake.run(plan, resume=True)

    interrupt(fake, plan)
    marker = fake.workspace / "checkpoints/qwen3_finetune" / MARKER
    marker.touch()
    assert fake.run(plan, resume=True)[0] == QWEN, "it had finished, but what follows in the stage had not"

    marker.unlink()
    interrupt(fake, plan)
    by_hand = fake.workspace / "checkpoints/qwen3_finetune/settings.json"
    write_json(by_hand, read_json(by_hand) | {"epochs": 1})
    assert fake.run(plan, resume=True)[0] == QWEN, "the run in the folder is another one"


@pytest.mark.slow
def test_killed_in_the_middle_of_a_training_the_pipeline_continues_it(source, tmp_path):
    """The weights are those of a training that was not interrupted, and the stage does not outlive the pipeline."""
    program = (
        "import sys; from pathlib import Path; from pipeline import run, stages\n"
        "plan = stages.pipeline_stages(stages.PipelineSettings(data=Path(sys.argv[1]), preset='tiny',"
        " set=('qwen3_finetune.epochs=6',)))\n"
        "plan = [stage for stage in plan if stage.module in ('data.prepare', 'qwen3_finetune.train')]\n"
        "run.run_stages(plan, Path(sys.argv[2]), resume='--resume' in sys.argv)\n"
    )
    command = [sys.executable, "-c", program, str(source)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, str(whole)], check=True, capture_output=True)

    process = subprocess.Popen([*command, str(killed)], stderr=subprocess.PIPE)
    folder = killed / "checkpoints" / "qwen3_finetune"
    while not list(folder.glob(f"step_*/{MARKER}")):
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    stopped_at = (folder / "metrics.jsonl").read_text()
    assert not (folder / MARKER).exists()
    time.sleep(1)
    assert (folder / "metrics.jsonl").read_text() == stopped_at, "the stage still trains"

    again = subprocess.run([*command, str(killed), "--resume"], check=True, capture_output=True, text=True)
    assert "data.prepare" in again.stdout and "nothing has changed" in again.stdout
    assert "--resume" in again.stdout
    assert (folder / "metrics.jsonl").read_text().startswith(stopped_at.splitlines()[0])
    assert weights_hash(folder) == weights_hash(whole / "checkpoints" / "qwen3_finetune")


def test_ctrl_c_ends_in_one_line(source, tmp_path, monkeypatch, capsys):
    def interrupted(command):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_run", interrupted)
    with pytest.raises(SystemExit, match=str(EXIT_INTERRUPTED)):
        run.main(["--data", str(source), "--workspace", str(tmp_path / "out"), "--preset", "tiny"])
    assert "--resume (RESUME=1 with make) continues from here" in capsys.readouterr().err


def test_a_failing_stage_is_named_and_what_was_done_is_kept(tmp_path, capsys):
    stages = [Stage("contracts.workspace"), Stage("data.prepare", ("--data", str(tmp_path / "absent")))]
    with pytest.raises(InputError, match="stage data.prepare failed .exit code 2.*--resume"):
        run_stages(stages, tmp_path)
    assert [entry["stage"] for entry in json.loads((tmp_path / "pipeline.json").read_text())] == [
        "contracts.workspace"
    ]
    capsys.readouterr()
    with pytest.raises(InputError):
        run_stages(stages, tmp_path, resume=True)
    assert "contracts.workspace: nothing has changed" in capsys.readouterr().out


def test_another_number_of_processes_trains_again(fake, source):
    fake.run(plan_of(source))
    assert fake.run(plan_of(source, processes=2), resume=True)[0] == "clip_finetune.train --preset tiny"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("fusoin.loss=huber", "no stage fusoin; it has clip_finetune, data, ensemble, fusion"),
        ("fusion.los=huber", "fusion has no setting los; did you mean loss?"),
        ("fusion.loss=hubert", "fusion.all_embeddings.train: .*loss.*hubert"),
        ("qwen3_finetune.epochs=0", "qwen3_finetune.train: --epochs 0: must be at least 1"),
        ("qwen3_finetune.epochs=two", "qwen3_finetune.train: .*epochs.*two"),
        ("fusion.compile=yes", "compile is true or false"),
        ("fusion.run=mine", "the pipeline sets run itself"),
        ("word_models.model=ridge", "the pipeline sets model itself"),
        ("loss=huber", "write <stage>.<setting>=<value>"),
        ("fusion.loss", "write <stage>.<setting>=<value>"),
    ],
)
def test_a_wrong_setting_is_one_line_before_the_first_stage_runs(source, tmp_path, entry, reason):
    arguments = [
        "--data",
        str(source),
        "--workspace",
        str(tmp_path / "out"),
        "--preset",
        "tiny",
        "--set",
        entry,
    ]
    with pytest.raises(InputError, match=reason) as refused:
        run.main(arguments)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_the_processes_of_a_stage_are_counted_in_its_memory():
    seconds, peak_mb, exit_code = run._run([sys.executable, "-c", "x = bytearray(200_000_000)"])
    assert exit_code == 0 and seconds > 0
    assert peak_mb > 190
