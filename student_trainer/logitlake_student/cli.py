"""`logitlake-student`: train, eval, export, report.

Each command takes a TOML file and `section.key=value` overrides. A command can be killed at any time and run again:
it goes on, or says that everything is done. Everything heavy is imported inside the commands.
"""

import os
from pathlib import Path

import click

from logitlake_shared.cli_support import config_command, run_cli

__all__ = ["cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="logitlake")
def cli() -> None:
    """Make a small model from what a teacher said."""


@cli.command()
@config_command
def train(config: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Train the configured stages in order; resumes where it was stopped."""
    from logitlake_shared.config import load_config, to_toml
    from logitlake_student.config import TrainConfig

    resolved = load_config(TrainConfig, config, overrides)
    if dry_run:
        click.echo(to_toml(resolved), nl=False)
        return
    from logitlake_student.run import plan_run, train_stage

    for run in plan_run(resolved):
        if run.is_done():
            click.echo(f"{run.stage.type}: trained already, {run.model}")
            continue
        figures = train_stage(resolved, run)
        click.echo(
            f"{run.stage.type}: {figures['steps']} steps in {figures['seconds']} s, {figures['params_trainable']:,} of "
            f"{figures['params_total']:,} parameters trained, {run.model}"
        )


@cli.command(name="eval")
@config_command
def evaluate(config: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Examine checkpoints on held-out data: accuracy, hallucination, KL to the teacher."""
    from logitlake_shared.config import load_config, to_toml
    from logitlake_student.config import EvalConfig

    resolved = load_config(EvalConfig, config, overrides)
    if dry_run:
        click.echo(to_toml(resolved), nl=False)
        return
    from logitlake_student.evaluate import examine, result_of

    for model in resolved.models:
        result = result_of(resolved, model)
        if result is None:
            result = examine(resolved, model)
        click.echo(
            f"{model.name}: vqa accuracy {_figure(result['vqa_accuracy'])}, "
            f"hallucination F1 {_figure(result['hallucination_f1'])}, "
            f"captions with a hallucination {_figure(result['caption_hallucination_rate'])}, "
            f"KL to teacher {result['kl_to_teacher']:.4f}"
        )


@cli.command()
@config_command
def export(config: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Write a trained stage as a stock checkpoint; kept only if it answers as the trained student does."""
    from logitlake_shared.config import load_config, to_toml
    from logitlake_student.config import ExportConfig

    resolved = load_config(ExportConfig, config, overrides)
    if dry_run:
        click.echo(to_toml(resolved), nl=False)
        return
    if resolved.output.exists():
        click.echo(f"{resolved.output}: exported already")
        return
    from logitlake_student.release import release

    result = release(resolved)
    click.echo(
        f"{result.out_dir}: {result.params_total:,} parameters; compared with the trained student: {result.gate}"
    )


@cli.command()
@config_command
def report(config: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Gather a run's figures into one page, one JSON file and one table."""
    from logitlake_shared.config import load_config, to_toml
    from logitlake_student.config import ReportConfig

    resolved = load_config(ReportConfig, config, overrides)
    if dry_run:
        click.echo(to_toml(resolved), nl=False)
        return
    from logitlake_student.report import write_report

    write_report(resolved)


def _figure(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.3f}"


def main() -> None:
    """The console script."""
    # OpenMP threads that spin while they wait cost several times the CPU on a machine that does anything else.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    run_cli(cli)


if __name__ == "__main__":
    main()
