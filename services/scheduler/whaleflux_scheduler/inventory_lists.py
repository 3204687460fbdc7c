"""Listings of inventory that are read whole."""

from __future__ import annotations

from typing import Any

ASK_WITHIN_S = 10.0


async def all_of(call: Any, request: Any, field_name: str) -> tuple[list[Any], list[str]]:
    """All items of a listing, page by page, and the names of those whose records cannot be read."""
    found, unreadable = list[Any](), list[str]()
    while True:
        page = await call(request, timeout=ASK_WITHIN_S)
        found += getattr(page, field_name)
        unreadable += page.unreadable
        if not page.next_page_token:
            return found, unreadable
        request.page_token = page.next_page_token
