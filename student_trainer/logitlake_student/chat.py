"""`logitlake-student chat`: talk to a checkpoint, with pictures, on the command line.

Answers go to stdout and appear while they are written; everything else (what was loaded, hints, errors) goes to stderr,
so that `logitlake-student chat MODEL --prompt … > answer.txt` holds the answer alone. A conversation is sent whole at
every turn.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from logitlake_shared.data_formats import ImageRef
from logitlake_shared.data_formats.records import PLACEHOLDER, content_parts
from logitlake_shared.errors import ConfigError, DataError, LogitLakeError

if TYPE_CHECKING:
    from logitlake_student.answers import Examinee

__all__ = ["Chat", "checkpoint_folder", "talk"]

_HELP = "/image FILE shows a picture with your next words, /new begins anew, /exit or Ctrl-D leaves."
_STAGES = ("preference", "d2s", "d2d", "init")


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint that a user means: the folder itself, a stage's, or the last finished stage of a run.

    Raises `ConfigError` saying what is there instead.
    """
    candidates = [path, path / "model", *(path / stage / "model" for stage in _STAGES)]
    found = next((folder for folder in candidates if (folder / "config.json").is_file()), None)
    if found is not None:
        return found
    if not path.exists():
        raise ConfigError(f"{path}: no such folder; name a checkpoint's, a stage's or a run's folder on this machine")
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        raise ConfigError(f"{path}: a GGUF file is for llama.cpp: llama-cli -m FILE.gguf; here, name a checkpoint")
    raise ConfigError(f"{path}: no checkpoint there (config.json is missing)")


@dataclass
class Chat:
    """A conversation with a model."""

    examinee: "Examinee"
    max_new_tokens: int
    temperature: float
    seed: int
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[ImageRef] = field(default_factory=list)

    def say(self, text: str, images: Sequence[Path], show: Callable[[str], None]) -> bool:
        """One turn; the answer is shown while it is written. Returns whether it was cut at `max_new_tokens`.

        A turn that fails is as if it had never been said. Raises `DataError` and `ImageError`.
        """
        from logitlake_student.answers import stream_answer

        placed = text if PLACEHOLDER in text else PLACEHOLDER * len(images) + text
        system = [{"role": "system", "content": self.system}] if self.system and not self.messages else []
        messages = [*self.messages, *system, {"role": "user", "content": content_parts(placed)}]
        refs = [*self.images, *(ImageRef(data=path.read_bytes()) for path in images)]
        answer = stream_answer(
            self.examinee,
            (messages, refs),
            max_new_tokens=self.max_new_tokens,
            show=show,
            temperature=self.temperature,
            seed=self.seed,
        )
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        self.images = refs
        return answer.is_cut

    def begin_anew(self) -> None:
        """Forgets all that was said and shown."""
        self.messages, self.images = [], []


def talk(chat: Chat, images: Sequence[Path]) -> None:
    """Reads lines until they end. Errors of a turn are said and the conversation goes on."""
    shown = list(images)
    if sys.stdin.isatty():
        click.secho(_HELP, err=True, dim=True)
    for line in _lines():
        command, _, rest = line.partition(" ")
        try:
            if command in ("/exit", "/quit"):
                return
            if command == "/new":
                chat.begin_anew()
                shown = []
            elif command == "/image":
                path = Path(rest.strip()).expanduser()
                if not path.is_file():
                    raise DataError(f"{path}: no such picture; /image FILE")
                shown.append(path)
                click.secho(f"({path.name} goes with your next words)", err=True, dim=True)
            elif command == "/help":
                click.secho(_HELP, err=True, dim=True)
            elif command.startswith("/"):
                raise ConfigError(f"{command}: no such command. {_HELP}")
            elif line:
                tell(chat, line, shown)
                shown = []
        except LogitLakeError as error:
            click.secho(f"error: {error}", fg="red", err=True)
        except KeyboardInterrupt:
            click.secho("\n(stopped)", err=True, dim=True)


def tell(chat: Chat, text: str, images: Sequence[Path]) -> None:
    """One turn, its answer on stdout."""
    is_cut = chat.say(text, images, lambda piece: click.echo(piece, nl=False))
    click.echo()
    if is_cut:
        hint = f"(cut after {chat.max_new_tokens} tokens; --max-new-tokens allows more)"
        click.secho(hint, err=True, dim=True)


def _lines() -> Iterator[str]:
    """What the user types, or what is piped in."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and history, where the platform has it
    while True:
        try:
            yield input("> ").strip()
        except KeyboardInterrupt:
            click.echo(err=True)
        except EOFError:
            click.echo(err=True)
            return
