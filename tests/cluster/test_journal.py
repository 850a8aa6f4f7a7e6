"""What a router knows of a request, and hands on when its engine dies."""

import pytest

from cluster.journal import Journal, Journals
from cluster.openai.engine_client import ChoiceRequest, GenerateRequest
from cluster.token_socket import ChoiceTokens
from engine.request import FinishReason, SamplingParams


def journal(num_choices: int) -> Journal:
    choices = tuple(
        ChoiceRequest(
            prompt_token_ids=(1, 2, 3), sampling=SamplingParams(seed=index), sample_index=index
        )
        for index in range(num_choices)
    )
    return Journal.of(GenerateRequest(request_id="r", choices=choices))


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
        assert call.prompt_token_ids == (1, 2, 3)
        assert call.sampling.seed == call.sample_index == call.index


def test_choices_that_ended_or_were_closed_are_not_asked_for_again() -> None:
    record = journal(2)
    record.take(tokens(0, 10, is_end=True))
    record.close(1)
    assert not record.unfinished
    assert record.rest() == []


def ended(number: int, num_tokens: int, journals: Journals) -> Journal:
    record = Journal.of(
        GenerateRequest(
            request_id=str(number),
            choices=(ChoiceRequest(prompt_token_ids=(1, 2), sampling=SamplingParams(seed=0)),),
            tenant=b"ours",
        )
    )
    journals.open(record)
    record.take(tokens(0, *range(num_tokens), is_end=True))
    journals.end(record)
    return record


def test_what_ended_first_is_forgotten_first() -> None:
    journals = Journals(max_kept_tokens=30)
    kept = [ended(number, 8, journals) for number in range(5)]
    found = [journals.find(str(number), b"ours") for number in range(5)]
    assert found == [None, None, *kept[2:]]


def test_what_ended_long_ago_is_not_given_out() -> None:
    journals = Journals(keep_s=-1.0)
    ended(0, 1, journals)
    assert journals.find("0", b"ours") is None


def test_a_journal_is_its_tenants_alone_and_the_latest_of_its_request() -> None:
    journals = Journals()
    first = ended(0, 1, journals)
    assert journals.find("0", b"ours") is first
    assert journals.find("0", b"") is None
    again = Journal(first.record())
    journals.open(again)
    journals.end(first)
    assert journals.find("0", b"ours") is again


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_what_an_engine_gave_up_has_not_come_to_its_end(reason: FinishReason) -> None:
    record = journal(1)
    record.take(ChoiceTokens("r", 0, 0, 0, (10,), reason))
    assert Journal(record.record()).unfinished == {0}
