"""The commands answer `--help` at once and the base install stays light: nothing heavy is imported on the way."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "ray", "vllm", "duckdb", "pyarrow", "numpy", "rich")


@pytest.mark.parametrize("command", ["logitlake_shared.cli", "logitlake_teacher.cli", "logitlake_student.cli"])
def test_help_imports_nothing_heavy(command: str) -> None:
    """`--help` of each command in a fresh interpreter leaves every heavy module unloaded."""
    script = (
        f"import sys; from {command} import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit: pass\n"
        f"print('loaded:', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Usage:" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_reading_a_lake_needs_no_torch() -> None:
    """The base install reads a lake and answers SQL where torch, transformers, ray and vllm are missing."""
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'ray', 'vllm'): sys.modules[name] = None\n"
        "import logitlake_schemas, logitlake_shared.reader, logitlake_shared.catalog, logitlake_shared.tools.verify\n"
        "import logitlake_shared.images, logitlake_shared.data_formats, logitlake_shared.cli"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
