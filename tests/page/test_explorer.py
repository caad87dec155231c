"""The API's document in a browser: it is drawn, and a request is sent from it."""

from __future__ import annotations

from tests.page.browser import Browser
from tests.support.live_server import LiveServer


def test_a_route_is_tried_on_the_page(chromium: Browser, server: LiveServer) -> None:
    chromium.resize(1280, 900)
    chromium.driver.get(f"{server.url}/schema")
    health = "#operations-system-HealthHealth"
    chromium.click(f"{health} .opblock-summary-control")
    chromium.click(f"{health} .execute")
    chromium.until(lambda: '"status"' in chromium.text(f"{health} .live-responses-table .response"))
    assert "200" in chromium.text(f"{health} .live-responses-table tbody .response-col_status")
    sources = "return performance.getEntriesByType('resource').map(each => new URL(each.name).origin)"
    assert set(chromium.run(sources)) <= {server.url, "null"}, "something came from another host"
    assert chromium.complaints() == []
