"""A custom function for pairs of a forward and a backward, as scripts for torch have it."""

from torch.distributed.pipelining import schedules as torch_schedules


def run_pair(seen, action, ctx):
    """Runs both, one after the other, with the stages' own methods; notes the pair in ``seen``."""
    schedule = ctx.schedule_ref
    assert isinstance(schedule, torch_schedules._PipelineScheduleRuntime)
    stages = {s.stage_index: s for s in schedule._stages}
    forward, backward = action.sub_actions
    f, b = stages[forward.stage_index], stages[backward.stage_index]
    for part, neighbour, recvs in (
        (forward, forward.stage_index - 1, schedule.fwd_recv_ops),
        (backward, backward.stage_index + 1, schedule.bwd_recv_ops),
    ):
        if 0 <= neighbour < f.num_stages and neighbour not in stages:
            torch_schedules._wait_batch_p2p(recvs.pop((part.stage_index, part.microbatch_index)))
    m = forward.microbatch_index
    args = ctx.arg_mbs[m] if f.is_first else ()
    out = f.forward_one_chunk(m, args, ctx.kwarg_mbs[m])
    schedule._maybe_compute_loss(f, out, ctx.target_mbs, m)
    if f.stage_index + 1 in stages:
        stages[f.stage_index + 1].set_local_fwd_input(out, m)
    m = backward.microbatch_index
    loss = schedule._maybe_get_loss(b, m)
    schedule.backward_counter[b.stage_index] += 1
    last = schedule.backward_counter[b.stage_index] == schedule._n_microbatches
    b.backward_one_chunk(m, loss=loss, full_backward=True, last_backward=last)
    if b.stage_index - 1 in stages:
        stages[b.stage_index - 1].set_local_bwd_input(b.get_local_bwd_output(m), m)
    seen.append(str(action))
