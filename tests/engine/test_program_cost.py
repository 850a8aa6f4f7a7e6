"""Cost read out of a program's text, here one short enough to be added up by hand."""

from engine.program_cost import program_cost

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%p), backend_config={"estimated_cycles":"999"}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  %r = f32[8]{0} all-reduce(%x), channel_id=2
}

%nothing (p: f32[8]) -> f32[8] {
  %y = f32[8] copy(%p), metadata={op_name="/jit(_attend)/"}, backend_config={"estimated_cycles":"3"}
}

%feature (p: f32[8]) -> f32[8] {
  %z = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"5000"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %a = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100"}
  %c = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%p)
  %b = bf16[4,8]{1,0} all-reduce(%a), channel_id=1
  %d = f32[8]{0} copy-done(%c)
  %e = (f32[2]{0}, f32[8]{0}) all-gather-start(%a), dimensions={0}
  %f = f32[8]{0} all-gather-done(%e)
  %g = f32[8]{0} all-gather(%a), dimensions={0}
  %k = f32[8]{0} custom-call(%g), custom_call_target="tpu_custom_call"
  %w = (s32[], f32[8]) while(%k), body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %h = f32[8]{0} conditional(%s, %k, %k), branch_computations={%nothing, %feature}
  ROOT %l = f32[8]{0} copy(%h), backend_config={"estimated_cycles":"9223372036854775807"}
}
"""


def test_a_programs_cost_is_that_of_what_runs_when_no_feature_is_asked_for() -> None:
    cost = program_cost(PROGRAM)
    assert cost.cycles == 100 + 4 * 10 + 3
    assert cost.attention_cycles == 3
    assert cost.num_kernels == 1
    assert cost.collectives == {"all-reduce": 1 + 4, "all-gather": 2}
    # What runs beside the computation is not waited for.
    assert cost.collective_bytes == 4 * 8 * 2 + 4 * 32 + 32
    assert cost.sent_bytes == 2 * (4 * 8 * 2 + 4 * 32) + 32
    # Beside the first all-reduce a copy is in flight.
    assert cost.idle_bytes == 4 * 32 + 32
