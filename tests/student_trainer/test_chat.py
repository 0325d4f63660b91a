"""A student on the command line: the answer is the model's greedy one, streamed whole, and mistakes are sentences."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import save_tiny_qwen_vl, save_tiny_text

from logitlake_shared.data_formats import ImageRef
from logitlake_shared.errors import ConfigError, DataError
from logitlake_student.answers import Examinee, Prompt, greedy_answers, load_examinee, stream_answer
from logitlake_student.chat import Chat, checkpoint_folder
from logitlake_student.export.card import CardFacts
from logitlake_student.export.checkpoint import export_checkpoint

Command = Callable[..., Any]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Models this small are slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def qwen_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-VL-MoE."""
    folder = tmp_path_factory.mktemp("qwen-vl") / "model"
    save_tiny_qwen_vl(folder, "qwen3_vl_moe")
    return folder


@pytest.fixture
def teacher(tiny_teacher: Path) -> Examinee:
    return load_examinee(tiny_teacher, "cpu")


def asked(text: str, *images: bytes) -> Prompt:
    """A question about pictures."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}], tuple(ImageRef(data=image) for image in images)


def png(width: int, height: int, seed: int) -> bytes:
    """A picture of noise of any shape."""
    from PIL import Image

    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=g, dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy(), "RGB").save(buffer, "PNG")
    return buffer.getvalue()


def stream(examinee: Examinee, prompt: Prompt, **options: Any) -> tuple[list[str], Any]:
    """The pieces that were shown, and the whole."""
    pieces: list[str] = []
    answer = stream_answer(examinee, prompt, max_new_tokens=12, show=pieces.append, **options)
    assert "".join(pieces) == answer.text
    return pieces, answer


# ---- answers ----


def test_qwen_vl_answers_in_a_batch_as_alone(qwen_vl: Path) -> None:
    """Pictures of several shapes, two at once, none: batched, one by one and streamed, the same answers."""
    examinee = load_examinee(qwen_vl, "cpu")
    prompts = [
        asked("what is in the picture?", png(24, 16, 0)),
        asked("a red seven?", png(40, 32, 1), png(16, 16, 2)),
        asked("how many digits are there?"),
        asked("no", png(16, 48, 3)),
    ]
    alone = [stream(examinee, prompt)[1].text for prompt in prompts]
    assert len(set(alone)) == len(prompts)
    for batch_size in (1, 4):
        said = greedy_answers(examinee, prompts, max_new_tokens=12, batch_size=batch_size, advance=lambda _: None)
        assert said == alone


def test_qwen_vl_answers_as_its_own_forward_pass(qwen_vl: Path) -> None:
    """The twin: no cache, no generate, the whole sequence again for every token, positions by the model's own rule."""
    examinee = load_examinee(qwen_vl, "cpu")
    prompt = asked("what is in the picture?", png(24, 16, 0))
    given = examinee.model_inputs.batch([examinee.prompt(*prompt)], pad_id=0, model=examinee.model)
    said: list[int] = []
    for _ in range(12):
        ids_1S = torch.cat([given["input_ids"], torch.tensor([said], dtype=torch.long)], dim=1)
        is_image_1S = torch.eq(ids_1S, examinee.renderer.image_token_id or -1).int()
        with torch.no_grad():
            logits_1SV = examinee.model(
                **given | {"input_ids": ids_1S, "mm_token_type_ids": is_image_1S, "attention_mask": None},
                use_cache=False,
            ).logits
        token = int(logits_1SV[0, -1].argmax())
        if token == examinee.renderer.eos_id:
            break
        said.append(token)
    assert stream(examinee, prompt)[1].text == examinee.renderer.decode(said)


def test_a_stream_is_the_answer_in_pieces(teacher: Examinee) -> None:
    """More than one piece, no half character in the middle, and whether it was cut."""
    for number in range(4):
        prompt = asked(f"what is in picture {number}?", png(32, 32, number))
        pieces, answer = stream(teacher, prompt)
        (expected,) = greedy_answers(teacher, [prompt], max_new_tokens=12, batch_size=1, advance=lambda _: None)
        assert answer.text == expected
        assert len(pieces) > 1
        assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])
        assert answer.is_cut == (answer.num_tokens == 12)


def test_a_temperature_draws_by_its_seed(teacher: Examinee) -> None:
    """The same seed, the same words; greedy is another answer."""
    prompt = asked("what is there?", png(32, 32, 0))
    drawn = [stream(teacher, prompt, temperature=1.0, seed=seed)[1].text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert stream(teacher, prompt)[1].text not in drawn


def test_a_prompt_beyond_the_context_is_refused(teacher: Examinee) -> None:
    """256 positions, 16 of them an image's."""
    with pytest.raises(DataError, match=r"the prompt has \d+ tokens .* the model was made for 256; shorten it"):
        stream(teacher, asked("a red seven " * 80, png(32, 32, 0)))


def test_a_conversation_is_sent_whole(teacher: Examinee, tmp_path: Path) -> None:
    """The second answer is that to the whole conversation; a turn that fails was never said."""
    picture = tmp_path / "picture.png"
    picture.write_bytes(png(32, 32, 5))
    chat = Chat(teacher, max_new_tokens=12, temperature=0.0, seed=0, system="be brief")
    said: list[str] = []
    chat.say("what is there?", [picture], said.append)
    first = "".join(said)
    with pytest.raises(DataError, match="2 image placeholders but 1 images"):
        chat.say("<image> and this?", [], said.append)
    said.clear()
    chat.say("how many?", [], said.append)
    question = asked("what is there?", picture.read_bytes())
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        *question[0],
        {"role": "assistant", "content": first},
        {"role": "user", "content": [{"type": "text", "text": "how many?"}]},
    ]
    expected = greedy_answers(
        teacher, [(messages, question[1])], max_new_tokens=12, batch_size=1, advance=lambda _: None
    )
    assert ["".join(said)] == expected
    chat.begin_anew()
    assert (chat.messages, chat.images) == ([], [])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "text"])
@pytest.mark.filterwarnings("default")  # transformers', of processors without torchvision
def test_the_code_on_the_model_card_runs(
    family: str, tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copied from the card of an export and run: it prints what `chat` answers."""
    source = tiny_teacher if family == "llava" else tmp_path / "source"
    if family == "qwen3_vl":
        save_tiny_qwen_vl(source)
    elif family == "text":
        save_tiny_text(source)
    export_checkpoint(source, tmp_path / "release", facts=CardFacts({}))
    code = (tmp_path / "release" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    (tmp_path / "picture.png").write_bytes(png(32, 24, 5))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})  # nothing else makes sure that it can be copied
    images = [] if family == "text" else [(tmp_path / "picture.png").read_bytes()]
    answer = stream_answer(
        load_examinee(source, "cpu"), asked("What do you see?", *images), max_new_tokens=64, show=lambda _: None
    )
    assert capsys.readouterr().out.strip() == answer.text


# ---- the command ----


def test_prompt_prints_the_answer_alone(teacher: Examinee, student_command: Command, tmp_path: Path) -> None:
    """stdout is the answer and a newline; what was loaded is on stderr."""
    picture = tmp_path / "picture.png"
    picture.write_bytes(png(32, 32, 5))
    folder = teacher.renderer.model_dir
    result = student_command("chat", folder, "--prompt", "what is there?", "--image", picture, "--max-new-tokens", 12)
    assert result.code == 0, result.err
    assert result.out == stream(teacher, asked("what is there?", picture.read_bytes()))[1].text + "\n"
    assert "LlavaForConditionalGeneration (qwen3)" in result.err
    assert "(cut after 12 tokens; --max-new-tokens allows more)" in result.err


def test_questions_are_piped_in(
    teacher: Examinee, student_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One a line; a mistake is said and the conversation goes on."""
    picture = tmp_path / "picture.png"
    picture.write_bytes(png(32, 32, 5))
    lines = f"/image {picture}\nwhat is there?\n\n/picture\n/image nowhere.png\n/new\nhow many?\n/exit\nnever asked\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    result = student_command("chat", teacher.renderer.model_dir, "--max-new-tokens", 12)
    assert result.code == 0, result.err
    expected = [asked("what is there?", picture.read_bytes()), asked("how many?")]
    assert result.out == "".join(stream(teacher, prompt)[1].text + "\n" for prompt in expected)
    assert "error: /picture: no such command." in result.err
    assert "error: nowhere.png: no such picture" in result.err


def test_mistakes_are_one_message(student_command: Command, tiny_teacher: Path, tmp_path: Path) -> None:
    """Exit code 2, what is wrong and what to do, no traceback."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model-F32.gguf").write_bytes(b"GGUF")
    save_tiny_text(tmp_path / "text")
    picture = tmp_path / "picture.png"
    picture.write_bytes(png(8, 8, 0))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    mistakes = {
        (tmp_path / "nowhere", "--prompt", "hi"): "no such folder",
        (tmp_path / "empty", "--prompt", "hi"): "no checkpoint there",
        (tmp_path / "gguf", "--prompt", "hi"): "llama-cli -m",
        (tmp_path / "text", "--prompt", "hi", "--image", picture): "without a vision tower; ask it in words alone",
        (tiny_teacher, "--prompt", " "): "there is nothing to answer",
        (tiny_teacher, "--prompt", "hi", "--image", tmp_path / "no.png"): "does not exist",
        (tiny_teacher, "--prompt", "hi", "--image", tmp_path / "broken.png"): "image_format",
    }
    if not torch.cuda.is_available():
        mistakes[(tiny_teacher, "--prompt", "hi", "--device", "cuda")] = "torch sees no CUDA device here; use cpu"
    for arguments, said in mistakes.items():
        result = student_command("chat", *arguments)
        assert result.code == 2, (arguments, result.err)
        assert said in result.err
        assert result.out == ""


def test_a_run_means_its_last_finished_stage(tmp_path: Path) -> None:
    """A checkpoint, a stage's folder, a run's folder."""
    for stage in ("init", "d2s"):
        (tmp_path / "run" / stage / "model").mkdir(parents=True)
        (tmp_path / "run" / stage / "model" / "config.json").write_text("{}")
    (tmp_path / "run" / "preference").mkdir()
    wanted = tmp_path / "run" / "d2s" / "model"
    assert (
        checkpoint_folder(tmp_path / "run") == checkpoint_folder(wanted.parent) == checkpoint_folder(wanted) == wanted
    )
    with pytest.raises(ConfigError, match="no checkpoint there"):
        checkpoint_folder(tmp_path / "run" / "preference")
