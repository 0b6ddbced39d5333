"""Prompt text as the Wan checkpoints were trained to see it."""

from __future__ import annotations

import html


def clean_prompt(text: str) -> str:
    """Return ``text`` with broken encodings mended, HTML entities resolved and white space collapsed.

    Entities are resolved twice, because captions taken from web pages carry ``&amp;quot;``. The steps are those of the
    published Wan pipelines: two prompts that differ only in line breaks give the same tokens.
    """
    import ftfy  # noqa: PLC0415 - only needed once a prompt is encoded

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())
