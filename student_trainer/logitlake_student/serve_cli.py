"""`logitlake-student serve`: runs over HTTP, and training as jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from logitlake_shared.cli_support import config_command
from logitlake_shared.errors import ConfigError

if TYPE_CHECKING:
    from logitlake_student.config.serve import StudentServeConfig

__all__ = ["serve"]


@click.command()
@config_command("logitlake_student.config.serve:StudentServeConfig")
def serve(config: StudentServeConfig) -> None:
    """Serve a folder of runs over HTTP until SIGTERM: metrics, checkpoints, pages; and train what is submitted."""
    try:
        from logitlake_shared.web.serving import serve as serve_app
        from logitlake_student.api.app import student_app
    except ModuleNotFoundError as error:
        raise ConfigError(f"serve: {error.name} is not installed; pip install 'logitlake[serve]'") from None
    serve_app(student_app(config))
