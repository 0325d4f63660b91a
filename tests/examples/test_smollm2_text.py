"""The laws of the real text: prose only, no leak between the splits, the same every time."""

import json
import re
from pathlib import Path

import click
import pytest
from examples.smollm2 import prepare
from examples.smollm2.text import HELD_OUT, TRAIN, installed_markdown, passages, prose, records, split_of

from logitlake_shared.data_formats import read_llava

MARKDOWN = """
# A heading

[![badge](https://example.org/b.svg)](https://example.org) <img src="x.png">

The *first* paragraph explains, in a sentence of more than twelve words,
what the [package](https://example.org) does and `why` it does it.

```python
print("code is not prose, however many words of it stand in one single line here.")
```

| a | table |
| - | ----- |

- A point of a list that is long enough to be a paragraph of its own, it ends here.
  See https://example.org for a reason why this other sentence must not be kept, ever.
- short
"""


def test_prose_is_what_a_reader_reads() -> None:
    """Marks go, links keep their words; headings, code, tables, badges, addresses and short lines are no prose."""
    assert prose(MARKDOWN) == [
        "The first paragraph explains, in a sentence of more than twelve words, "
        "what the package does and why it does it."
    ]
    without_address = MARKDOWN.replace("https://example.org for", "below for")
    assert prose(without_address)[1].startswith("A point of a list that is long enough")


def test_splits_share_no_package_no_family_and_no_passage() -> None:
    """What is held out was never trained on, whatever is installed here."""
    by_split = passages(installed_markdown())
    families = {split: {passage.package.split("-")[0] for passage in found} for split, found in by_split.items()}
    assert families[TRAIN]
    assert families[HELD_OUT]
    assert not families[TRAIN] & families[HELD_OUT]
    texts = {split: {passage.response for passage in found} for split, found in by_split.items()}
    assert not texts[TRAIN] & texts[HELD_OUT]
    assert split_of("opentelemetry-api") == split_of("opentelemetry-sdk")


def test_a_paragraph_that_packages_repeat_is_kept_once() -> None:
    """The second package with the same README adds nothing."""
    words = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "runs", "away", "again")
    readme = "\n\n".join(" ".join(word + letter for word in words) + "." for letter in "abcdefghijklmnopqrst")
    once, twice = passages({"a-one": readme}), passages({"a-one": readme, "a-two": readme})
    assert sum(map(len, once.values())) > 1
    assert once == twice


def test_passages_are_the_words_of_the_text_in_order() -> None:
    """Prompts and responses, put together again, are the prose from its start."""
    markdown = installed_markdown()
    by_split = passages({"rich": markdown["rich"]})
    found = sorted((passage for split in by_split.values() for passage in split), key=lambda passage: passage.number)
    together = " ".join(f"{passage.prompt} {passage.response}" for passage in found)
    assert found
    assert " ".join(prose(markdown["rich"])).startswith(together)


def test_records_are_llava_json_sorted_by_id(tmp_path: Path) -> None:
    """The teacher service's own reader takes them: text only, an instruction, the continuation."""
    prepare.write_data(tmp_path / "data", 5, 3)
    for split, count in ((TRAIN, 5), (HELD_OUT, 3)):
        conversations = list(read_llava(tmp_path / "data" / f"{split}.json", tmp_path))
        assert len(conversations) == count
        assert [c.sample_id for c in conversations] == sorted({c.sample_id for c in conversations})
        for conversation in conversations:
            (part,) = conversation.messages[0]["content"]
            assert (conversation.split, conversation.task, conversation.images) == (split, "continue", ())
            assert re.match(r"Continue this text:\n\S", part["text"])


def test_the_same_environment_gives_the_same_bytes(tmp_path: Path) -> None:
    """Two makings differ in nothing; the first passages of many packages come before the second ones of any."""
    for name in ("one", "other"):
        prepare.write_data(tmp_path / name, 6, 2)
    for split in (TRAIN, HELD_OUT):
        one, other = ((tmp_path / name / f"{split}.json").read_bytes() for name in ("one", "other"))
        assert one == other
    sources = [record["source"] for record in json.loads((tmp_path / "one" / f"{TRAIN}.json").read_text())]
    assert len(set(sources)) == 6


def test_too_little_text_is_said(tmp_path: Path) -> None:
    """Asked for more than there is, `prepare` names the number it found and what to do."""
    with pytest.raises(click.ClickException, match=r"passages for the split 'train'.*100000.*--train"):
        prepare.write_data(tmp_path / "data", 100_000, 2)


def test_a_passage_is_of_the_stated_length() -> None:
    """Prompts of 32 words, responses of 56 to 72."""
    by_split = passages(installed_markdown())
    for record in records(by_split[TRAIN][:50], TRAIN):
        prompt, response = (turn["value"] for turn in record["conversations"])
        assert len(prompt.split()) == len(["Continue", "this", "text:"]) + 32
        assert 56 <= len(response.split()) <= 72
