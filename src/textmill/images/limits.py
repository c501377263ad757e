"""What one picture and one request may cost, whoever sends them."""

from __future__ import annotations

MOST_IMAGES = 32  # of one request
MOST_BYTES = 20 << 20  # of one picture as it comes, unless more may be fetched; a request's body has its own limit
MOST_PIXELS = 32 << 20
MOST_PREPARED_BYTES = 32 << 20  # of one request's tiles, on their way to the engine
MEMORY_BYTES = 2 << 30  # of the decoding process
CPU_SECONDS = 10  # of the decoding process, a picture
SECONDS = 15.0  # to decode a picture, by the clock
REQUEST_SECONDS = 60.0  # to fetch and decode all pictures of a request
FETCH_SECONDS = 10.0  # to fetch a picture, from the first packet to the last
