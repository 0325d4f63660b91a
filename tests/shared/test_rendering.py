"""How a conversation becomes ids, on a tokenizer small enough to read."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from logitlake_shared.errors import ConfigError, DataError
from logitlake_shared.rendering import Rendered, Renderer

WORDS = ["<unk>", "<end>", "<image>", "user:", "bot:", "what", "is", "it", "a", "seven", "sure", "yes"]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}user: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '<image> ' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
    "{% else %} bot: {{ m.content }}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} bot: {% endif %}"
)


def _save(folder: Path, template: str | None = TEMPLATE, eos: str | None = "<end>") -> Path:
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=eos, unk_token="<unk>", additional_special_tokens=["<image>"]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"image_token_id": 2}')
    return folder


@pytest.fixture
def renderer(tmp_path: Path) -> Renderer:
    """A renderer over twelve words."""
    return Renderer(_save(tmp_path / "model"))


IMAGE_TURN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}


def test_two_turns_by_hand(renderer: Renderer) -> None:
    """user: <image> what is it bot: | a seven <end> | user: sure bot: | yes <end>"""
    rendered = renderer.render(
        [
            IMAGE_TURN,
            {"role": "assistant", "content": "a seven"},
            {"role": "user", "content": "sure"},
            {"role": "assistant", "content": "yes"},
        ]
    )
    assert rendered.prompt_ids.tolist() == [3, 2, 5, 6, 7, 4, 3, 10, 4]
    assert rendered.prompt_lengths.tolist() == [6, 3]
    assert rendered.response_ids.tolist() == [8, 9, 1, 11, 1]
    assert rendered.response_lengths.tolist() == [3, 2]


def test_the_generation_prompt_is_the_first_segment(renderer: Renderer) -> None:
    """What a student is asked at evaluation is what it was trained to follow."""
    asked = renderer.render_prompt([IMAGE_TURN])
    learned = renderer.render([IMAGE_TURN, {"role": "assistant", "content": "yes"}])
    np.testing.assert_array_equal(asked, learned.prompt_ids)
    np.testing.assert_array_equal(renderer.render_response("yes"), learned.response_ids)
    assert renderer.decode(learned.response_ids) == "yes"


def test_identity_follows_map_and_template(tmp_path: Path, renderer: Renderer) -> None:
    """The same files, the same identity; another template, another one in that field alone."""
    identity = renderer.identity()
    assert (identity.vocab_size, identity.eos_id, identity.image_token_id) == (12, 1, 2)
    again = Renderer(_save(tmp_path / "again")).identity()
    assert again == identity
    other = Renderer(_save(tmp_path / "other", TEMPLATE.replace("user:", "seven"))).identity()
    assert other.model_copy(update={"chat_template_sha256": identity.chat_template_sha256}) == identity
    assert other != identity


def test_what_cannot_be_rendered_is_refused(tmp_path: Path, renderer: Renderer) -> None:
    """No answer, no user turn, no template, no EOS, no folder: each has its sentence."""
    with pytest.raises(DataError, match="does not end with an assistant turn"):
        renderer.render([IMAGE_TURN])
    with pytest.raises(DataError, match="must follow a user turn"):
        renderer.render([{"role": "assistant", "content": "yes"}])
    with pytest.raises(ConfigError, match="no chat template"):
        Renderer(_save(tmp_path / "bare", template=None))
    with pytest.raises(ConfigError, match="no EOS"):
        Renderer(_save(tmp_path / "endless", eos=None))
    with pytest.raises(ConfigError, match="no such model folder"):
        Renderer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no tokenizer there"):
        Renderer(tmp_path)


def test_a_template_that_hides_the_end_of_a_turn_is_refused(tmp_path: Path) -> None:
    """A second turn cannot follow when the template writes something else than response and EOS."""
    renderer = Renderer(_save(tmp_path / "odd", TEMPLATE.replace("{{ m.content }}<end>", "{{ m.content }} yes")))
    turns = [IMAGE_TURN, {"role": "assistant", "content": "a"}, IMAGE_TURN, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match="does not write a finished assistant turn"):
        renderer.render(turns)


def test_a_refusal_of_the_template_is_that_of_one_conversation(tmp_path: Path) -> None:
    """Whatever a template raises is said of the conversation that it raised for; the others are rendered."""
    refusing = TEMPLATE.replace(
        "{% for m", "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}{% for m", 1
    )
    renderer = Renderer(_save(tmp_path / "strict", refusing))
    answer = {"role": "assistant", "content": "yes"}
    first, refused, last = renderer.render_batch(
        [[IMAGE_TURN, answer], [IMAGE_TURN, answer, IMAGE_TURN, answer], [IMAGE_TURN, answer]]
    )
    assert isinstance(refused, DataError)
    assert "refuses the conversation: one turn only" in str(refused)
    assert isinstance(first, Rendered)
    assert isinstance(last, Rendered)
    assert first.prompt_ids.tolist() == last.prompt_ids.tolist() == [3, 2, 5, 6, 7, 4]


def test_many_at_once_are_what_each_is_alone(renderer: Renderer) -> None:
    """A batch of sound, open, multi-turn and refused conversations; and the ids are the tokenizer's own."""
    answer = {"role": "assistant", "content": "a seven"}
    conversations = [
        [IMAGE_TURN, answer],
        [answer],
        [IMAGE_TURN, answer, {"role": "user", "content": "sure"}, {"role": "assistant", "content": ""}],
        [],
        [IMAGE_TURN],
    ]
    together = renderer.render_batch(conversations, open_end=True)
    for messages, one in zip(conversations, together, strict=True):
        (alone,) = renderer.render_batch([messages], open_end=True)
        assert repr(alone) == repr(one)
    texts = ["what is it", "", "<image> a seven"]
    assert renderer._ids(texts) == renderer._tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_a_text_only_template_gets_text(tmp_path: Path) -> None:
    """Templates of text-only models add the content to a string; parts of text reach them as one string."""
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %} bot: "
    folder = _save(tmp_path / "model", template)
    (folder / "config.json").write_text("{}")
    parts = [{"role": "user", "content": [{"type": "text", "text": "what is it"}]}]
    assert Renderer(folder).render_prompt(parts).tolist() == [3, 5, 6, 7, 4]
