import pytest

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.scheduling.buckets import bucket_table, choose_bucket
from engine.step import Bucket


def make_config(**changes) -> EngineConfig:
    return EngineConfig(model_path="model", **changes)


@pytest.mark.parametrize("max_running_requests", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("chunk", [1, 7, 32, 512, 2048])
def test_every_step_within_the_limits_has_a_bucket(max_running_requests, chunk):
    config = make_config(max_running_requests=max_running_requests, chunked_prefill_size=chunk)
    buckets = bucket_table(config, context_length=4096, platform="cpu")
    for num_decodes in {0, 1, max_running_requests // 2, max_running_requests - 1}:
        for tokens in {1, chunk // 2, chunk}:
            if num_decodes < max_running_requests and tokens > 0:
                chosen = choose_bucket(buckets, num_decodes, tokens, 1)
                assert chosen.num_seqs >= num_decodes
                assert chosen.num_chunk_tokens >= tokens
    assert choose_bucket(buckets, max_running_requests, 0, 0).num_chunk_tokens == 0


def test_every_dot_has_two_rows_or_more():
    for bucket in bucket_table(
        make_config(max_running_requests=1), context_length=64, platform="cpu"
    ):
        assert bucket.num_seqs >= 2


def test_tpus_have_few_programs_which_hold_every_step():
    config = make_config(max_running_requests=64, max_prefill_tokens=8192)
    buckets = bucket_table(config, context_length=8192, platform="tpu")
    assert [bucket.num_seqs for bucket in buckets if not bucket.num_chunks] == [8, 64]
    mixed = [bucket for bucket in buckets if bucket.num_chunks]
    assert [bucket.num_chunk_tokens for bucket in mixed] == [256, 512, 1024, 2048]
    assert {bucket.num_seqs for bucket in mixed} == {64}
    assert choose_bucket(buckets, 9, 0, 0) == Bucket(64)
    assert choose_bucket(buckets, 0, 1, 1).num_chunk_tokens == 256


def test_the_cheapest_bucket_that_fits_is_taken():
    buckets = bucket_table(make_config(max_running_requests=8), context_length=4096, platform="cpu")
    assert choose_bucket(buckets, 3, 0, 0) == Bucket(4)
    assert choose_bucket(buckets, 3, 33, 1).num_chunk_tokens == 64
    assert choose_bucket(buckets, 3, 65, 1).num_chunk_tokens == 128
    assert choose_bucket(buckets, 3, 8, 8).num_chunks >= 8


def test_a_step_that_no_program_holds_is_an_error():
    buckets = bucket_table(make_config(max_running_requests=4), context_length=64, platform="cpu")
    with pytest.raises(EngineError, match="9 decodes"):
        choose_bucket(buckets, 9, 0, 0)


def test_extra_paddings_become_buckets_and_those_above_the_step_limit_are_named(caplog):
    config = make_config(
        max_running_requests=4,
        chunked_prefill_size=512,
        jax_precompile_prefill_token_paddings=(200, 16384),
    )
    sizes = {
        bucket.num_chunk_tokens
        for bucket in bucket_table(config, context_length=4096, platform="cpu")
    }
    assert 200 in sizes
    assert max(sizes) == 512
    assert "--jax-precompile-prefill-token-paddings=16384" in caplog.text
    assert "512" in caplog.text


def test_a_short_context_needs_no_large_bucket():
    config = make_config(max_running_requests=2)
    sizes = {
        bucket.num_chunk_tokens
        for bucket in bucket_table(config, context_length=100, platform="cpu")
    }
    assert max(sizes) == 200


def test_more_tokens_never_allow_fewer_chunks():
    buckets = bucket_table(
        make_config(max_running_requests=64), context_length=4096, platform="cpu"
    )
    chunks = [bucket.num_chunks for bucket in buckets if bucket.num_chunk_tokens]
    assert chunks == sorted(chunks)
