"""Log probabilities of a prompt's tokens, as vLLM gives them."""

from collections.abc import Sequence

import msgspec

from engine.request import TokenLogprobs
from engine.text.tokenizer import Tokenizer


class PromptLogprob(msgspec.Struct, frozen=True, gc=False):
    """A token that stands in a prompt, or might. There may be a million in one answer.

    Attributes:
        rank: From 1, the likeliest.
    """

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""Of each token of a prompt, by ids: its own first. The prompt's first token has none."""


def spell_prompt_logprobs(
    prompt: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int, tokenizer: Tokenizer
) -> PromptLogprobs:
    """Name each token of a prompt and its alternatives; milliseconds for thousands of tokens.

    Args:
        prompt: Its token ids.
        logprobs: One per token but the first.
        num_top: Alternatives that were asked for; `logprobs` may have more.
        tokenizer: The model's.
    """
    texts: dict[int, str] = {}

    def entry(token_id: int, logprob: float, rank: int) -> PromptLogprob:
        text = texts.get(token_id)
        if text is None:
            text = tokenizer.token_bytes(token_id).decode(errors="replace")
            texts[token_id] = text
        return PromptLogprob(logprob, rank, text)

    spelled: PromptLogprobs = [None]
    for token_id, found in zip(prompt[1:], logprobs, strict=True):
        top = found.top_token_ids[:num_top]
        position = {token_id: entry(token_id, found.logprob, found.rank)}
        for place, (other_id, logprob) in enumerate(zip(top, found.top_logprobs, strict=False)):
            if other_id != token_id:
                position[other_id] = entry(other_id, logprob, place + 1)
        spelled.append(position)
    return spelled
