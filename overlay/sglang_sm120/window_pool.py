"""Which prefill chunk and how many running requests a window pool of a given size can serve without waiting for ever.

SGLang admits a prompt only when `min(prompt, chunk) + 1 page` of the window pool is free, and a decoding request
holds up to two pages of it (its 128-token window may straddle a page boundary). When the pool is smaller than that,
the scheduler waits without a word. So: window tokens >= chunk + 2 pages per running request, always.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

PAGES_PER_REQUEST = 2


def admissible(
    window_tokens: int, page_size: int, chunked_prefill_size: int | None, max_running_requests: int
) -> tuple[int, int]:
    """Return `(chunked_prefill_size, max_running_requests)` that the window pool can always serve.

    Values that already fit are returned unchanged. Otherwise the chunk is cut to at most half of the pool (whole
    pages), then the running requests to what the rest holds; both are logged.

    Args:
        window_tokens: tokens in the window pool.
        page_size: tokens per page.
        chunked_prefill_size: tokens per prefill chunk; None or <= 0 means a prompt is prefilled at once, which only
            works up to the pool's size, so chunking is then switched on.
        max_running_requests: requests decoding at the same time.

    Raises:
        ValueError: the pool holds less than one page of prefill beside one request.
    """
    reserve = PAGES_PER_REQUEST * page_size
    smallest = page_size + reserve
    if window_tokens < smallest:
        raise ValueError(
            f"The window pool holds {window_tokens} tokens but DeepSeek-V4 needs at least {smallest} to make progress: "
            f"raise --max-total-tokens, --mem-fraction-static or --swa-full-tokens-ratio."
        )
    asked = chunked_prefill_size if chunked_prefill_size is not None and chunked_prefill_size > 0 else window_tokens
    chunk = asked
    if _whole_pages(asked, page_size) + reserve * max_running_requests > window_tokens:
        chunk = min(asked, max(window_tokens // 2 // page_size, 1) * page_size)
    requests = min(max_running_requests, (window_tokens - _whole_pages(chunk, page_size)) // reserve)
    if chunk != chunked_prefill_size:
        logger.warning(
            "chunked_prefill_size %s -> %d: the window pool holds %d tokens.",
            chunked_prefill_size, chunk, window_tokens,
        )
    if requests != max_running_requests:
        logger.warning(
            "max_running_requests %d -> %d: the window pool holds %d tokens.",
            max_running_requests, requests, window_tokens,
        )
    return chunk, requests


def _whole_pages(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size) * page_size
