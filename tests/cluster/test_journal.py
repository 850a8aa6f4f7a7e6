"""What a router knows of a request, and hands on when its engine dies."""

from cluster.journal import Journal
from cluster.openai.engine_client import ChoiceRequest, GenerateRequest
from cluster.token_socket import ChoiceTokens
from engine.request import SamplingParams


def journal(num_choices: int) -> Journal:
    choices = tuple(
        ChoiceRequest(
            prompt_token_ids=(1, 2, 3), sampling=SamplingParams(seed=index), sample_index=index
        )
        for index in range(num_choices)
    )
    return Journal(GenerateRequest(request_id="r", choices=choices))


def tokens(choice: int, *ids: int, is_end: bool = False) -> ChoiceTokens:
    return ChoiceTokens("r", 0, choice, 0, ids, "length" if is_end else None)


def test_the_rest_of_a_request_begins_with_what_has_come() -> None:
    record = journal(3)
    record.take(tokens(0, 10, 11))
    record.take(tokens(2, 20))
    record.take(tokens(0, 12))
    record.take(tokens(1, 30, is_end=True))
    assert record.num_tokens == [3, 1, 1]
    assert [(call.index, call.output_token_ids) for call in record.rest()] == [
        (0, [10, 11, 12]),
        (2, [20]),
    ]
    for call in record.rest():
        assert call.prompt_token_ids == [1, 2, 3]
        assert call.sampling.seed == call.sample_index == call.index


def test_choices_that_ended_or_were_closed_are_not_asked_for_again() -> None:
    record = journal(2)
    record.take(tokens(0, 10, is_end=True))
    record.close(1)
    assert not record.unfinished
    assert record.rest() == []
