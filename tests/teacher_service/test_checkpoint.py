"""What a checkpoint folder says of its teacher, against the processors that really make the pixels."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from logitlake_shared.errors import EngineError, ImageError
from logitlake_shared.pixels import load_image_processor
from logitlake_teacher.engines.checkpoint import read_checkpoint

# Around every border of the tiny processor's rule (8x8 pixels a token, 4 to 32 tokens), and far beyond both ends.
SIDES = (1, 3, 4, 5, 7, 8, 9, 12, 16, 20, 23, 31, 32, 33, 44, 60, 63, 64, 65, 90, 127, 128, 199)


def test_tokens_of_an_image_are_those_of_the_processors_grid(tiny_qwen_vl: Path) -> None:
    """For hundreds of sizes: patches that the image processor really makes of such an image, four of them a token."""
    count, processor = read_checkpoint(tiny_qwen_vl).num_image_tokens, load_image_processor(tiny_qwen_vl)
    seen = set()
    for width in SIDES:
        for height in SIDES:
            image = Image.new("RGB", (width, height))
            made = processor([image], return_tensors="np")
            expected = int(made["image_grid_thw"].prod()) // 4
            assert len(made["pixel_values"]) == 4 * expected
            assert count(width, height) == expected, (width, height)
            seen.add(expected)
    assert min(seen) >= 4
    assert max(seen) == 32


def test_limits_of_pixels_are_the_checkpoints_own(tiny_qwen_vl: Path, tmp_path: Path) -> None:
    """`min_pixels` and `max_pixels`, as older checkpoints write them, bound the tokens."""
    folder = tmp_path / "bounded"
    shutil.copytree(tiny_qwen_vl, folder)
    path = folder / "preprocessor_config.json"
    document = json.loads(path.read_text())
    del document["size"]
    path.write_text(json.dumps({**document, "min_pixels": 8 * 64, "max_pixels": 9 * 64}))
    count = read_checkpoint(folder).num_image_tokens
    assert {count(side, side) for side in (8, 24, 300)} == {9}


def test_a_picture_too_narrow_for_the_processor_has_a_code(tiny_qwen_vl: Path) -> None:
    """More than 200 to 1: the processor would raise in mid-capture; here the image is refused with its size."""
    with pytest.raises(ImageError, match=r"^image_shape: 1x201 pixels"):
        read_checkpoint(tiny_qwen_vl).num_image_tokens(1, 201)


def test_an_image_of_llava_is_as_many_tokens_whatever_its_size(tiny_teacher: Path) -> None:
    """16 patches of the tower."""
    checkpoint = read_checkpoint(tiny_teacher)
    assert {checkpoint.num_image_tokens(width, height) for width in (1, 32, 5000) for height in (1, 64)} == {16}
    assert checkpoint.context_length == 256


def test_reading_needs_no_torch(tiny_qwen_vl: Path) -> None:
    """A plan of a finished capture reads the folder of its teacher in a moment: no model library is imported."""
    script = (
        "import sys; from pathlib import Path; sys.modules['torch'] = None\n"
        "from logitlake_teacher.engines.checkpoint import read_checkpoint, weights_sha256\n"
        "checkpoint = read_checkpoint(Path(sys.argv[1]))\n"
        "print(checkpoint.sees_images, checkpoint.context_length, len(weights_sha256(Path(sys.argv[1]))))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tiny_qwen_vl)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "256", "64"]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"vision_config": {}, "model_type": "pixtral", "max_position_embeddings": 8}, "'pixtral'"),
        ({"model_type": "llama"}, "max_position_embeddings"),
        (None, "no such file"),
    ],
)
def test_a_folder_that_is_no_known_teacher_is_refused(document: object, message: str, tmp_path: Path) -> None:
    """With what is missing."""
    if document is not None:
        (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(EngineError, match=message):
        read_checkpoint(tmp_path)


def test_pixels_of_several_images_are_those_of_each(tiny_qwen_vl: Path) -> None:
    """Joined along the first axis, the arrays of single images are what the processor makes of all at once."""
    from logitlake_shared.pixels import load_pixels

    draw = np.random.default_rng(0)
    images = [
        Image.fromarray(draw.integers(0, 256, size=(height, width, 3), dtype=np.uint8))
        for width, height in ((9, 14), (90, 20), (32, 32))
    ]
    loader = load_pixels(tiny_qwen_vl)
    single = [loader.model_inputs(image) for image in images]
    together = load_image_processor(tiny_qwen_vl)(images, return_tensors="np")
    assert single[0].keys() == together.keys()
    for name, expected in together.items():
        np.testing.assert_array_equal(np.concatenate([inputs[name] for inputs in single]), expected)
