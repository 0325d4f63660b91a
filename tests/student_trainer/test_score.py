"""What a student is said to make of a lake's samples is what it makes: by a slow twin, and on the command line."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from logitlake_shared.reader import LakeDataset
from logitlake_shared.student_scores import Scores
from logitlake_student.answers import kl_to_teacher, load_examinee
from logitlake_student.losses.distillation import TeacherBatch
from logitlake_student.losses.reference import distillation_loss_reference
from logitlake_student.score_command import stage_of
from logitlake_student.score_figures import summarised
from logitlake_student.scores import row_scores

Command = Callable[..., Any]

R, H, V, K, TOP = 40, 16, 50, 6, 5
# float32 against float64: 3e-6 was measured on these logits.
FIGURE_TOLERANCE = 2e-5


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, TeacherBatch]:
    """Hidden states, a head, and a teacher with a tail; the student is sure of some rows and of nothing in others."""
    generator = torch.Generator().manual_seed(3)
    hidden_RH = torch.randn(R, H, generator=generator) * torch.logspace(-2, 1, R)[:, None]
    weight_VH = torch.randn(V, H, generator=generator)
    logprobs_RV = torch.log_softmax(3 * torch.randn(R, V, generator=generator), dim=-1)
    topk = logprobs_RV.topk(K)
    return (
        hidden_RH,
        weight_VH,
        TeacherBatch(
            topk_ids_RK=topk.indices,
            topk_logprobs_RK=topk.values,
            log_tail_mass_R=torch.log1p(-topk.values.exp().sum(1)),
            label_ids_R=torch.randint(0, V, (R,), generator=generator),
        ),
    )


def test_every_figure_is_that_of_its_slow_twin(
    rows: tuple[Tensor, Tensor, TeacherBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row, in float64, by full softmax and by sorting; whatever the chunks are."""
    monkeypatch.setattr("logitlake_student.scores._CHUNK_ROWS", 7)
    hidden_RH, weight_VH, teacher = rows
    got = row_scores(hidden_RH, weight_VH, teacher, top=TOP)
    for r, hidden_H in enumerate(hidden_RH):
        probabilities_V = torch.softmax(weight_VH.double() @ hidden_H.double(), dim=-1)
        label = int(teacher.label_ids_R[r])
        order = sorted(range(V), key=lambda v: -float(probabilities_V[v]))
        assert float(got.label_logprob_R[r]) == pytest.approx(
            float(probabilities_V[label].log()), abs=FIGURE_TOLERANCE, rel=FIGURE_TOLERANCE
        )
        assert int(got.label_rank_R[r]) == 1 + order.index(label)
        assert got.topk_ids_RK[r].tolist() == order[:TOP]
        entropy = -sum(float(p * p.log()) for p in probabilities_V)
        assert float(got.entropy_R[r]) == pytest.approx(entropy, abs=FIGURE_TOLERANCE)
        one = TeacherBatch(
            **{
                field.name: values[r : r + 1]
                for field in fields(teacher)
                if (values := getattr(teacher, field.name)) is not None
            }
        )
        loss, _ = distillation_loss_reference(
            hidden_RH[r : r + 1], weight_VH, one, divergence_weight=1.0, ce_weight=0.0
        )
        assert float(got.forward_kl_R[r]) == pytest.approx(float(loss), rel=FIGURE_TOLERANCE, abs=FIGURE_TOLERANCE)


def test_the_mean_is_what_an_evaluation_says(
    student_checkpoint: Path, student_lake: Path, student_command: Command, tmp_path: Path
) -> None:
    """One definition of the KL to the teacher, in whatever batches; and figures that come from the stored scores."""
    out = tmp_path / "scores.parquet"
    for batch_size in (1, 5):
        done = student_command(
            "score", student_checkpoint, student_lake, "--cache", "main", "--out", out, "-o", "json",
            "--batch-size", batch_size, "--top", batch_size,
        )  # fmt: skip
        assert done.code == 0, done.err
        told = json.loads(done.out)
        dataset = LakeDataset(student_lake, "main")
        expected = kl_to_teacher(
            load_examinee(student_checkpoint, "cpu"), dataset, batch_size=3, advance=lambda _: None
        )
        assert told["total"]["forward_kl"] == pytest.approx(expected, rel=1e-5)
        assert told["total"]["samples"] == len(dataset)
        scored = list(Scores(out))
        assert [sample.sample_id for sample in scored] == dataset.ids()
        for sample, known in zip(scored, dataset.__getitems__(range(len(dataset))), strict=True):
            assert len(sample.label_logprob_T) == len(known.response_ids)
            assert sample.task == known.task
            assert sample.topk_ids_TK.shape[1] == batch_size
        logprobs = np.concatenate([sample.label_logprob_T for sample in scored])
        assert told["total"]["perplexity"] == pytest.approx(float(np.exp(-logprobs.mean(dtype=np.float64))))
        worst = max(scored, key=lambda sample: float(sample.forward_kl_T.mean()))
        assert told["worst"][0]["sample_id"] == worst.sample_id


def test_a_run_is_scored_once_where_a_viewer_looks(
    student_world: Any, student_command: Command, student_lake: Path
) -> None:
    """In the stage's folder, by its name; again it is there; of a model that has changed it is made anew."""
    stage = student_world.output / "d2d"
    assert student_command("train", student_world.file({"type": "d2d", "steps": 1})).code == 0
    command = ("score", student_world.output, student_lake, "--cache", "main", "--split", "test")
    first = student_command(*command)
    assert first.code == 0, first.err
    path = stage / "scores" / "main@test.parquet"
    assert str(path) in first.out
    assert Scores(path).record.student == f"{student_world.output.name}/d2d"
    assert summarised(Scores(path)).total.num_samples == len(LakeDataset(student_lake, "main", split="test"))
    written = path.stat()
    again = student_command(*command)
    assert (again.out, path.stat().st_ino) == (first.out, written.st_ino)
    config = stage / "model" / "generation_config.json"
    config.write_text(config.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert student_command(*command).code == 0
    assert path.stat().st_ino != written.st_ino


def test_the_documented_question_is_answered(
    student_checkpoint: Path, student_lake: Path, student_command: Command, run_command: Command, tmp_path: Path
) -> None:
    """In a plain DuckDB that is told what `logitlake attach` prints: the figures of the summary, task by task."""
    import duckdb

    lake, out = tmp_path / "lake", tmp_path / "scores.parquet"
    shutil.copytree(student_lake, lake)
    done = student_command("score", student_checkpoint, lake, "--cache", "main", "--out", out, "-o", "json")
    told = json.loads(done.out)["tasks"]
    assert run_command("logitlake", "rebuild", lake).code == 0
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (question,) = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)
    question, num_named = re.subn(r"'runs/[^']*'", f"'{out}'", question)
    assert num_named == 1
    with duckdb.connect() as connection:
        connection.execute(run_command("logitlake", "attach", lake).out)
        rows = connection.execute(question).fetchall()
    assert {task: tokens for task, tokens, _, _ in rows} == {task: means["tokens"] for task, means in told.items()}
    for task, _, forward_kl, not_learned in rows:
        assert forward_kl == pytest.approx(told[task]["forward_kl"])
        assert 0 <= not_learned <= told[task]["tokens"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "name a file with --out"),
        (("--out", "{taken}"), "is there, and no file of scores"),
        (("--out", "{taken}/x.parquet"), "cannot be looked at: Not a directory; choose another --out"),
        (("--out", "{new}", "--split", "nope"), "holds no samples with split='nope'"),
        (("--out", "{new}", "--cache", "preference"), "holds pairs, expected samples"),
    ],
)
def test_what_cannot_be_scored_is_said_first(
    student_checkpoint: Path,
    student_lake: Path,
    student_command: Command,
    tmp_path: Path,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    """Before a model is loaded, and what is there stays."""
    taken = tmp_path / "notes.txt"
    taken.write_text("mine")
    given = [argument.format(taken=taken, new=tmp_path / "new.parquet") for argument in arguments]
    done = student_command("score", student_checkpoint, student_lake, "--cache", "main", *given)
    assert done.code != 0
    assert says in done.err
    assert taken.read_text() == "mine"
    assert not (tmp_path / "new.parquet").exists()


def test_a_student_of_which_nothing_is_known_has_no_scores(
    student_checkpoint: Path, student_lake: Path, student_command: Command, tmp_path: Path
) -> None:
    """NaN, as float16 gives where logits overflow, is an error that names the sample, and not a first choice."""
    broken, out = tmp_path / "broken", tmp_path / "scores.parquet"
    shutil.copytree(student_checkpoint, broken)
    weights = load_file(broken / "model.safetensors")
    (norm,) = (
        name for name in weights if name.endswith("language_model.model.norm.weight") or name == "model.norm.weight"
    )
    save_file(
        weights | {norm: torch.full_like(weights[norm], torch.nan)}, broken / "model.safetensors", {"format": "pt"}
    )
    done = student_command("score", broken, student_lake, "--cache", "main", "--out", out)
    assert done.code != 0
    first = LakeDataset(student_lake, "main")[0].sample_id
    assert f"sample {first}: the logits of broken are not finite in float32" in done.err
    assert not list(tmp_path.glob("*.parquet*"))


def test_damaged_scores_say_how_to_have_new_ones(
    student_checkpoint: Path, student_lake: Path, student_command: Command, tmp_path: Path
) -> None:
    """A footer that is whole says that they are there already: what to do must get past it."""
    out = tmp_path / "scores.parquet"
    command = ("score", student_checkpoint, student_lake, "--cache", "main", "--out", out)
    assert student_command(*command).code == 0
    data = out.read_bytes()
    out.write_bytes(data[:100] + bytes([data[100] ^ 16]) + data[101:])
    assert f"{out}: cannot be read as scores" in (said := student_command(*command).err)
    assert "remove it, and score again" in said
    out.unlink()
    assert student_command(*command).code == 0
    assert out.read_bytes() == data


@pytest.mark.parametrize(
    ("checkpoint", "stage"),
    [
        ("/runs/demo/d2s/model", "demo/d2s"),
        ("/demo/d2s/model", "demo/d2s"),
        ("/d2s/model", None),
        ("/model", None),
        ("/runs/demo/d2s/export", None),
    ],
)
def test_the_stage_of_a_checkpoint(checkpoint: str, stage: str | None) -> None:
    """Where a container has its model at `/model`, it is no stage's."""
    assert stage_of(Path(checkpoint)) == stage
