"""A sample on a terminal: the conversation, then every response token coloured by how much it surprised the teacher."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from logitlake_shared.cli_output import compact_table
from logitlake_shared.tools.inspect_sample import Alternative, Response, SampleView, TokenView
from logitlake_shared.tools.token_text import token_name, visible

__all__ = ["print_sample"]

# Surprise of a token in nats (-logprob) up to which it has a colour: sure, likely, doubtful, not what it expected.
_COLOURS = ((0.1, "green"), (1.0, "yellow"), (3.0, "dark_orange"), (math.inf, "bold red"))
_BAR_WIDTH = 5
# Choices that the teacher all but rules out are left to `--output json`.
_SHOWN_PROBABILITY = 5e-4
# Two tables side by side, each with room for its tokens.
_SIDE_BY_SIDE_WIDTH = 76


def print_sample(view: SampleView, also_in: Sequence[str] = (), console: Console | None = None) -> None:
    """Prints it."""
    console = console or Console()
    console.print(Text(view.id, "bold").append(f"  {view.cache} · {view.fingerprint[:16]}", "not bold dim"))
    console.print(_facts(view, also_in))
    for message in view.messages:
        console.print(_message(message))
    if view.kind == "pairs" and console.width >= _SIDE_BY_SIDE_WIDTH:
        beside = Table.grid(padding=(0, 2), expand=True)
        for _ in view.responses:
            beside.add_column(ratio=1)
        for parts in zip(*(_response(response) for response in view.responses), strict=True):
            beside.add_row(*parts)
        console.print()
        console.print(beside)
    else:
        for response in view.responses:
            console.print()
            console.print(Group(*_response(response)))
    if console.color_system is not None and not console.no_color:
        console.print(_legend())


def _legend() -> Text:
    legend = Text("surprise, nats: ", "dim")
    for bound, colour in _COLOURS:
        legend.append(f"≤ {bound:g}  " if math.isfinite(bound) else "above", colour)
    return legend


def _facts(view: SampleView, also_in: Sequence[str]) -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    length = f", {view.expanded_length:,} with images expanded" if view.expanded_length is not None else ""
    origin = f"{view.source}, task {view.task}, split {view.split}"
    # How the teacher made a pair is a text of its own.
    ended_by = [("made by", view.ended_by)] if view.ended_by.startswith("{") else []
    rows = [
        ("teacher", view.teacher),
        ("from", origin if ended_by else f"{origin}, {view.ended_by}"),
        *ended_by,
        ("prompt", f"{view.prompt_tokens:,} tokens{length}"),
        ("tokens", view.tokenizer),
    ]
    if view.student is not None:
        rows.append(("student", view.student))
    if also_in:
        rows.append(("also in", f"{', '.join(also_in)}; choose with --cache"))
    for name, text in rows:
        facts.add_row(name, Text(text))
    for image in view.images:
        text = f"{image.sha256}  {image.format} {image.width}×{image.height}, {image.bytes:,} bytes"
        facts.add_row("image", Text(text + (f", saved to {image.saved_to}" if image.saved_to else "")))
    return facts


def _message(message: dict[str, Any]) -> Text:
    content = message.get("content", "")
    if not isinstance(content, str):
        content = "".join(part.get("text", f"<{part.get('type', 'part')}>") for part in content)
    return Text(f"{message.get('role', '?')}: ", "bold").append(visible(str(content), newlines=True), "not bold")


def _response(response: Response) -> Iterator[RenderableType]:
    figures = f"  {len(response.tokens)} tokens, logprob {_signed(response.logprob_sum)}"
    if response.rating is not None:
        figures += f", rating {_signed(response.rating)}"
    yield Text(response.name, "bold").append(figures, "not bold dim")
    if all(token.text is not None for token in response.tokens):
        yield _flow(response.tokens, [token.logprob for token in response.tokens])
        if students := [token.student.logprob for token in response.tokens if token.student is not None]:
            yield Text("and by the student's surprise", "dim")
            yield _flow(response.tokens, students)
    yield Text()
    yield _token_table(response.tokens)


def _flow(tokens: Sequence[TokenView], logprobs: Sequence[float]) -> Text:
    """The text of a response, each token coloured by its surprise."""
    flow = Text()
    for token, logprob in zip(tokens, logprobs, strict=True):
        flow.append(visible(token.text or "", newlines=True), _colour(logprob))
    return flow


def _token_table(tokens: Sequence[TokenView]) -> Table:
    has_student = any(token.student is not None for token in tokens)
    is_full = any(token.rank is not None for token in tokens)
    # Beside a student there is room for what the two are compared by, and for no more.
    has_figures = is_full and not has_student
    looked_away = any(token.logprob_no_image is not None for token in tokens) and not has_student
    headings = ["", "token", "logprob"]
    headings += ["image adds"] if looked_away else []
    headings += ["rank", "entropy", "tail"] if has_figures else []
    headings += ["student", "KL"] if has_student else []
    grid = compact_table()
    for heading in headings:
        is_token = heading == "token"
        grid.add_column(heading, justify="left" if is_token else "right", no_wrap=not is_token)
    grid.add_column("the teacher's choices" if is_full else "probability", overflow="fold")
    if has_student:
        grid.add_column("the student's", overflow="fold")
    for token in tokens:
        colour = _colour(token.logprob)
        cells = [Text(str(token.position), "dim"), Text(token_name(token.token_id, token.text), colour)]
        cells.append(Text(_signed(token.logprob), colour))
        if looked_away:
            seen = token.logprob_no_image
            cells.append(Text("" if seen is None else _signed(token.logprob - seen)))
        if has_figures:
            cells += [Text(str(token.rank)), Text(f"{token.entropy:.3f}"), Text(f"{token.tail_mass:.0e}")]
        if token.student is not None:
            cells.append(Text(_signed(token.student.logprob), _colour(token.student.logprob)))
            cells.append(Text(_signed(token.student.forward_kl), _colour(-token.student.forward_kl)))
        if is_full:
            cells.append(_choices(token, token.logprob, token.alternatives))
        else:
            probability = math.exp(token.logprob)
            cells.append(Text(f"{probability:.3f} ").append("█" * round(probability * _BAR_WIDTH), colour))
        if token.student is not None:
            cells.append(_choices(token, token.student.logprob, token.student.alternatives))
        grid.add_row(*cells)
    return grid


def _choices(token: TokenView, logprob: float, alternatives: Sequence[Alternative]) -> Text:
    text = Text()
    for place, choice in enumerate(alternatives):
        is_label = choice.token_id == token.token_id
        if place and not is_label and choice.probability < _SHOWN_PROBABILITY:
            continue
        text.append("  " if place else "")
        text.append(token_name(choice.token_id, choice.text), _colour(logprob) if is_label else "")
        text.append(f" {choice.probability:.3f}", "dim")
    return text


def _signed(logprob: float) -> str:
    """Three decimals, and zero without a sign."""
    return f"{round(logprob, 3) + 0.0:.3f}"


def _colour(logprob: float) -> str:
    return next(colour for bound, colour in _COLOURS if -logprob <= bound)
