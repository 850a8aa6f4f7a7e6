"""What of one client request has come so far: enough for another engine to go on with it.

A sequence is a function of its prompt, its parameters with their seed, and the tokens so far; so an
engine that gets these continues it as the one that died would have done. Knows token ids, neither
text nor sockets.
"""

from cluster.openai.engine_client import GenerateRequest
from cluster.token_socket import ChoiceCall, ChoiceTokens


class Journal:
    """The record of one request. Invariant: a choice is unfinished until its last token is here.

    Args:
        request: Each choice's seed is set.

    Attributes:
        unfinished: Indices of the choices whose end is still to come.
    """

    def __init__(self, request: GenerateRequest) -> None:
        self._choices = request.choices
        self._token_ids: list[list[int]] = [[] for _ in request.choices]
        self.unfinished = set(range(len(request.choices)))

    @property
    def num_tokens(self) -> list[int]:
        """Tokens so far, per choice."""
        return [len(token_ids) for token_ids in self._token_ids]

    def take(self, tokens: ChoiceTokens) -> None:
        """Record what came for a choice."""
        self._token_ids[tokens.choice].extend(tokens.token_ids)
        if tokens.finish_reason is not None:
            self.unfinished.discard(tokens.choice)

    def close(self, choice: int) -> None:
        """Nobody wants more of this choice."""
        self.unfinished.discard(choice)

    def rest(self) -> list[ChoiceCall]:
        """What is still to be generated."""
        return [self._call(index) for index in sorted(self.unfinished)]

    def _call(self, index: int) -> ChoiceCall:
        choice = self._choices[index]
        return ChoiceCall(
            index=index,
            prompt_token_ids=list(choice.prompt_token_ids),
            sampling=choice.sampling,
            sample_index=choice.sample_index,
            output_token_ids=list(self._token_ids[index]),
        )
