from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramkit.pipelines.calling.prompts import clean_prompt


def test_mends_encoding_entities_and_white_space() -> None:
    assert clean_prompt("\n  A \u00e2\u20ac\u0153cat\u00e2\u20ac\x9d &amp;amp; a\tdog \u3000 ") == 'A "cat" & a dog'


@pytest.mark.parametrize("text", ["", " \n\t", "plain", "猫と犬 — très &lt;bien&gt;", "tabs\tand\u00a0spaces\x85here"])
def test_equals_the_published_cleaning(text: str) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean_prompt(text) == prompt_clean(text)


@given(st.text(max_size=60))
def test_equals_the_published_cleaning_on_any_text(text: str) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean_prompt(text) == prompt_clean(text)
