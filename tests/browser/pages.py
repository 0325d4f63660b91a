"""What every test of a page asks for, and pictures of what it saw.

    LOGITLAKE_PICTURES=runs/pictures make test

keeps a picture of each page that was found whole, and of each page as a test left it, named by the test.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

__all__ = ["HOSTILE", "SCREENS", "NewPage", "is_whole", "picture"]

NewPage = Callable[..., Page]
SCREENS = pytest.mark.parametrize(("width", "scheme"), [(320, "dark"), (1100, "light")])
"""from a telephone by night to a desk by day"""
HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "'-alert(1)-'",
    "javascript:alert(1)",
    "{{ 7*7 }}{% raw %}",
    "</textarea><script>alert(1)</script>",
    "&lt;b&gt;&amp;",
    "a\u202ebc",
    "%00%2f..",
    "x" * 3000,
    "😀\u202e\u202d",
)

_FOLDER = os.environ.get("LOGITLAKE_PICTURES")


def is_whole(page: Page) -> None:
    """Nothing sticks out at the side, and axe finds nothing."""
    picture(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]  # type: ignore[index]
    violations = Axe().run(page).response["violations"]
    assert not violations, [(one["id"], one["nodes"][0]["html"]) for one in violations]


def picture(page: Page) -> None:
    """A picture of the whole page, if pictures are kept."""
    if _FOLDER is None:
        return
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition("::")[2].partition(" ")[0]
    name = re.sub(r"\W+", "-", test).strip("-")
    count = len(list(Path(_FOLDER).glob(f"{name}-*.png")))
    page.screenshot(path=Path(_FOLDER) / f"{name}-{count:02d}.png", full_page=True)
