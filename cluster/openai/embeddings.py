"""/v1/embeddings: texts or token ids to the hidden states of their last tokens.

As Qwen3-Embedding and the embedding models made of Qwen2 have it: the last layer's hidden state of
the last token, divided by its length. Any other model gives one as well, worth what it is worth.
"""

import base64
from collections.abc import Sequence
from contextlib import aclosing

import numpy as np

from cluster.openai.engine_client import ChoiceRequest, EngineInfo
from cluster.openai.generation import Generation
from cluster.openai.heading import Heading
from cluster.openai.schema import (
    CompletionRequest,
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    EmbeddingUsage,
)
from engine.errors import RequestError
from engine.request import SamplingParams

MAX_INPUTS = 2048
"""OpenAI's."""

# The engine makes a token with each prompt; nobody sees this one.
_SAMPLING = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, seed=0, embedding=True)


def as_completion(body: EmbeddingRequest) -> CompletionRequest:
    """The completion of one token that computes the same prompts."""
    return CompletionRequest(
        model=body.model, prompt=body.input, max_tokens=1, cache_salt=body.cache_salt
    )


def embedding_choices(
    prompts: Sequence[Sequence[int]], info: EngineInfo
) -> tuple[ChoiceRequest, ...]:
    """Ask for each prompt's embedding.

    Raises:
        RequestError: One is too long, or there are too many.
    """
    if len(prompts) > MAX_INPUTS:
        raise RequestError(
            f"input has {len(prompts)} entries; at most {MAX_INPUTS} may be.", param="input"
        )
    for index, prompt in enumerate(prompts):
        if len(prompt) >= info.context_length:
            raise RequestError(
                f"input[{index}] has {len(prompt)} tokens; at most {info.context_length - 1} fit "
                "into the context.",
                param="input",
                code="context_length_exceeded",
            )
    return tuple(
        ChoiceRequest(prompt_token_ids=tuple(prompt), sampling=_SAMPLING) for prompt in prompts
    )


async def collect_embeddings(
    body: EmbeddingRequest, generation: Generation, heading: Heading
) -> EmbeddingList:
    """Wait for all embeddings.

    Raises:
        RequestError: `dimensions` is more than the model has.
    """
    vectors: dict[int, np.ndarray] = {}
    async with aclosing(generation.updates()) as updates:
        async for update in updates:
            if update.embedding:
                vectors[update.index] = np.frombuffer(update.embedding, "<f4")
    num_prompt_tokens = generation.usage().prompt_tokens
    return EmbeddingList(
        data=[
            Embedding(index=index, embedding=_spell(body, vectors[index]))
            for index in range(len(generation.request.choices))
        ],
        model=heading.model,
        usage=EmbeddingUsage(prompt_tokens=num_prompt_tokens, total_tokens=num_prompt_tokens),
    )


def _spell(body: EmbeddingRequest, vector: np.ndarray) -> list[float] | str:
    if body.dimensions is not None:
        if body.dimensions > len(vector):
            raise RequestError(
                f"dimensions is {body.dimensions}; this model's embeddings have {len(vector)}.",
                param="dimensions",
            )
        vector = vector[: body.dimensions]
    # A prompt whose hidden state is nought has no direction.
    unit = vector / max(float(np.linalg.norm(vector)), 1e-12)
    if body.encoding_format == "base64":
        return base64.b64encode(unit.astype("<f4").tobytes()).decode()
    return unit.tolist()
