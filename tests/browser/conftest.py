"""Debian's Chromium, driven by playwright: pages as people see them."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright
from tests.browser.pages import NewPage, picture


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """Skipped where there is none, unless LOGITLAKE_REQUIRE_CHROMIUM is set."""
    path = shutil.which("chromium")
    if path is None and not os.environ.get("LOGITLAKE_REQUIRE_CHROMIUM"):
        pytest.skip("needs Debian's package chromium")
    assert path is not None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium: Browser) -> Iterator[NewPage]:
    """`new_page(width=320, color_scheme="dark")`: a browser of its own, in which nothing may go wrong: no error in its
    console, no dialog, no request to anywhere else."""
    contexts, wrong = [], list[str]()

    def make(width: int = 1100, **options: Any) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()

        def told(message: ConsoleMessage) -> None:
            # Of an answer that is an error on purpose the browser complains, too.
            if message.type in ("error", "warning") and "the server responded with a status of 4" not in message.text:
                wrong.append(message.text)

        def asked(request: Request) -> None:
            if not request.url.startswith(("http://127.0.0.1:", "data:")):
                wrong.append(f"asked {request.url}")

        page.on("console", told)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", asked)
        return page

    yield make
    for context in contexts:
        for page in context.pages:
            picture(page)
        context.close()
    assert not wrong
