"""The demo model's prompts and answers, text and ids, as transformers made them."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.text.chat_template import load_chat_template
from engine.text.detokenizer import Detokenizer
from engine.text.tokenizer import load_tokenizer

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "smollm2_golden.json").read_text())


@pytest.mark.parametrize("item", GOLDEN["items"], ids=lambda item: item["prompt_text"][-30:])
def test_prompts_and_answers_are_those_of_transformers(
    item: dict[str, Any], demo_checkpoint: Path
) -> None:
    tokenizer = load_tokenizer(demo_checkpoint)
    if item["kind"] == "chat":
        template = load_chat_template(demo_checkpoint, tokenizer)
        assert template is not None
        prompt = template.render(item["messages"], add_generation_prompt=True, kwargs={})
        assert prompt == item["prompt_text"]
    assert tokenizer.encode(item["prompt_text"]) == item["prompt_ids"]
    assert tokenizer.encode(item["prompt_text"], add_special_tokens=True) == item["prompt_ids"]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token_id).text for token_id in item["output_ids"]]
    assert "".join(pieces) + detokenizer.finish().text == item["text"]
