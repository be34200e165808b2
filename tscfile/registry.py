"""Ids that are stored in files, and what they stand for (``spec/registry.md``).

An id names one byte format for ever; new bytes take a new id.
"""

from __future__ import annotations

RAW = 0
FIELDS_CLASSED_RANS = 1
BOOK_TRANSFORM = 2
SESSION_TRANSFORM = 3
BOOK_REFINEMENT = 4
BOOK_EXACT = 5
PRODUCT = 6
DIFFERENCE = 7

LOSSY = frozenset({BOOK_TRANSFORM, SESSION_TRANSFORM, BOOK_REFINEMENT, PRODUCT})
"""Codecs that do not give back the very rows."""

WHOLE = LOSSY | {BOOK_EXACT, DIFFERENCE}
"""Codecs whose chunk holds all tensors of its block."""

BOOK_LOSSY = frozenset({BOOK_TRANSFORM, BOOK_REFINEMENT})
OF_BOOK = BOOK_LOSSY | {BOOK_EXACT}
"""Codecs that need a book."""

CODEC_NAMES = {
    RAW: "raw",
    FIELDS_CLASSED_RANS: "fields+classed-rans",
    BOOK_TRANSFORM: "book-transform+segments",
    SESSION_TRANSFORM: "session-transform",
    BOOK_REFINEMENT: "book-refinement",
    BOOK_EXACT: "book-exact",
    PRODUCT: "product",
    DIFFERENCE: "difference",
}
