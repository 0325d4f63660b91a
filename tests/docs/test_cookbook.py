"""Every query of the cookbook runs, on a lake that holds something for it to find."""

import re
import shutil
from pathlib import Path

import pytest

from logitlake_shared.catalog import open_catalog

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sql-cookbook.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^### (.+?)$.*?```sql\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
# The page's names and those of the golden lake.
CACHES = {"'main'": "'grid'", "'other'": "'exact'", "'preference'": "'pairs'"}
# The golden lake was not scored without its images.
FINDS_NOTHING = {"Which samples can be answered blind?"}


def test_there_are_enough() -> None:
    assert len(RECIPES) >= 15
    assert len(RECIPES) == PAGE.count("```sql")


@pytest.mark.parametrize(("question", "sql"), RECIPES, ids=[question for question, _ in RECIPES])
def test_it_is_answered(question: str, sql: str, tmp_path: Path) -> None:
    """With named columns, and rows where the lake has any."""
    lake = tmp_path / "lake"
    shutil.copytree(ROOT / "tests" / "golden" / "format-1" / "lake", lake)
    for name, golden in CACHES.items():
        sql = sql.replace(name, golden)
    with open_catalog(lake) as catalog:
        answer = catalog.query(sql)
    assert len(set(answer.column_names)) == len(answer.column_names)
    assert (answer.num_rows == 0) == (question in FINDS_NOTHING)
