"""`logitlake-student`: train, eval, export, report; the other commands have files of their own.

Each of the first four takes a TOML file and `section.key=value` overrides. A command can be killed at any time and run
again: it goes on, or says that everything is done. Everything heavy is imported inside the commands.
"""

import os
import sys
from typing import TYPE_CHECKING

import click

from logitlake_shared.cli_jobs import service_jobs
from logitlake_shared.cli_support import config_command, run_cli
from logitlake_shared.errors import ConfigError
from logitlake_shared.jobs.progress import say
from logitlake_shared.stopped import RunStopped
from logitlake_student.answer_commands import chat, pope, predict
from logitlake_student.score_command import score
from logitlake_student.serve_cli import serve

if TYPE_CHECKING:
    from logitlake_student.config import EvalConfig, ExportConfig, ReportConfig, TrainConfig

__all__ = ["cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logitlake")
def cli() -> None:
    """Make a small model from what a teacher said."""


@cli.command()
@config_command("logitlake_student.config:TrainConfig", foresee="logitlake_student.sizes:foreseen_sizes")
@click.option("--ray-workers", type=click.IntRange(min=1), help="Train with so many Ray Train workers.")
@click.option(
    "--max-failures",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="With --ray-workers: how often ranks that die are started again.",
)
def train(config: "TrainConfig", ray_workers: int | None, max_failures: int) -> None:
    """Train the configured stages in order; resumes where it was stopped."""
    from logitlake_student.ranks import is_first_rank, leave_ranks
    from logitlake_student.run import plan_run, train_run

    tell = click.echo if is_first_rank() else lambda _: None
    is_done = all(run.is_done() for run in plan_run(config))
    if not is_done:
        from logitlake_student.sizes import planned_parameters, size_table

        tell(size_table(planned_parameters(config)))
    say(phase="validating")
    result = {}
    try:
        if ray_workers is not None and not is_done:
            _on_ray(config, ray_workers, max_failures)
        for run, figures in train_run(config):
            if figures is None:
                tell(f"{run.stage.type}: trained already, {run.model}")
                continue
            result[run.stage.type] = f"{figures['steps']} steps in {figures['seconds']} s"
            tell(
                f"{run.stage.type}: {result[run.stage.type]}, {figures['params_trainable']:,} of "
                f"{figures['params_total']:,} parameters trained, {run.model}"
            )
    except RunStopped as stopped:
        if is_first_rank():
            click.echo(f"{config.output}: stopped by {stopped}; run the same command to go on", err=True)
        leave_ranks()
        sys.exit(stopped.exit_code)
    say(result=result)
    leave_ranks()


def _on_ray(config: "TrainConfig", num_workers: int, max_failures: int) -> None:
    try:
        from logitlake_student.on_ray import train_on_ray
    except ModuleNotFoundError as error:
        raise ConfigError(f"--ray-workers: {error.name} is not installed; pip install 'logitlake[ray-train]'") from None
    train_on_ray(config, num_workers, max_failures)


@cli.command(name="eval")
@config_command("logitlake_student.config:EvalConfig")
def evaluate(config: "EvalConfig") -> None:
    """Examine checkpoints on held-out data: accuracy, hallucination, KL to the teacher."""
    from logitlake_student.evaluate import examine, result_of

    for model in config.models:
        result = result_of(config, model)
        if result is None:
            result = examine(config, model)
        click.echo(
            f"{model.name}: vqa accuracy {_figure(result['vqa_accuracy'])}, "
            f"hallucination F1 {_figure(result['hallucination_f1'])}, "
            f"captions with a hallucination {_figure(result['caption_hallucination_rate'])}, "
            f"KL to teacher {result['kl_to_teacher']:.4f}"
        )


@cli.command()
@config_command(
    "logitlake_student.config:ExportConfig",
    {"--to": ("to", "hf (default): a stock checkpoint; vllm: the same, and vLLM must load it; gguf: for llama.cpp.")},
)
def export(config: "ExportConfig") -> None:
    """Write a trained stage as others load it; kept only if, loaded again, it answers as the trained student does."""
    from logitlake_student.export import is_released, release

    if is_released(config):
        click.echo(f"{config.output}: exported already")
        return
    result = release(config, lambda text: click.secho(f"{text} …", err=True, dim=True))
    click.echo(f"{result.out_dir}: {result.parameters.total:,} parameters, {result.parameters.active:,} a token")
    for said in result.checks():
        click.echo(f"  {said}")


@cli.command()
@config_command("logitlake_student.config:ReportConfig")
def report(config: "ReportConfig") -> None:
    """Gather a run's figures into one page, one JSON file and one table."""
    from logitlake_student.report import write_report

    write_report(config)


cli.add_command(chat)
cli.add_command(predict)
cli.add_command(pope)
cli.add_command(score)
cli.add_command(serve)
cli.add_command(service_jobs("train"))


def _figure(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.3f}"


def main() -> None:
    """The console script."""
    # OpenMP threads that spin while they wait cost several times the CPU on a machine that does anything else.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_cli(cli)


if __name__ == "__main__":
    main()
