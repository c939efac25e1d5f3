"""The service's page in a headless browser."""

from __future__ import annotations

import pytest

from tests.report.browser import opened
from tests.serve.serving import known, running

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
TOKEN = "a-token-of-some-length"


def test_the_page_searches_and_shows_what_it_finds():
    expect = pytest.importorskip("playwright.sync_api").expect
    with running(known(token=TOKEN)) as service, opened() as browser:
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(service.url)
        page.fill("#token", TOKEN)
        page.click("#enter button")
        page.wait_for_selector("#query img")
        page.fill("#index", "7")
        page.select_option("#measurement", "contrast")
        page.fill("#foil", "class 3")
        page.click("#asking .main")
        page.wait_for_selector("#opponents li")
        assert page.locator("#proponents li").count() == 10
        about = "of query 7, asked about the probability of the label minus that of class 3"
        assert page.inner_text("#asked") == about
        found = page.locator("#proponents li").all_inner_texts()
        page.click("#own summary")
        page.click("#copy")
        expect(page.locator("#example")).not_to_have_value("")
        page.click("#ask-own")
        expect(page.locator("#asked")).to_contain_text("your own example")
        assert page.locator("#proponents li").all_inner_texts() == found
        page.fill("#example", "[1]")
        page.click("#ask-own")
        page.wait_for_selector("#message.failed")
        assert "query.example must be a list" in page.inner_text("#message")
        page.evaluate("begin()")  # as when a token is entered again
        assert page.locator("#measurement option[value=contrast]").count() == 1
        assert not errors
