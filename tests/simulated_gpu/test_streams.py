"""Copies beside the computation show what they would on a device that is late."""

PINNED = "pinned memory was changed before the copy out of it was done"
UNORDERED = "memory is used on a stream that has not waited for the stream that it was last used on"
FREED = "memory was freed while another stream may use it, without record_stream"


def broken(found):
    assert found.code == 0, found.stderr
    return [rule for _, rule, _ in found.broken]


def test_a_copy_to_pinned_memory_is_there_when_it_was_waited_for(simulated):
    text = """
x, buffer = torch.arange(3.0, device='cuda'), torch.zeros(3).pin_memory()
done = torch.cuda.Event()
buffer.copy_(x, non_blocking=True)
early = buffer.clone()
done.record()
later = x + 1
done.synchronize()
assert early.isnan().all() and buffer.tolist() == [0, 1, 2]
whole = x.to('cpu', non_blocking=True)
assert whole.is_pinned() and whole.isnan().all()
x.sum().item()
assert whole.tolist() == [0, 1, 2]
"""
    assert broken(simulated.python(text)) == []


def test_an_event_waits_for_what_was_before_it_alone(simulated):
    text = """
x, buffer = torch.arange(3.0, device='cuda'), torch.zeros(3).pin_memory()
done = torch.cuda.Event()
done.record()
buffer.copy_(x, non_blocking=True)
done.synchronize()
assert buffer.isnan().all()
torch.cuda.synchronize()
assert buffer.tolist() == [0, 1, 2]
"""
    assert broken(simulated.python(text)) == []


UPLOAD = """
up, main = torch.cuda.Stream(), torch.cuda.current_stream()
buffer, done = torch.ones(3).pin_memory(), torch.cuda.Event()
with torch.cuda.stream(up):
    x = torch.empty(3, device='cuda')
    x.copy_(buffer, non_blocking=True)
    done.record(up)
"""


def test_a_staging_buffer_stays_as_it_is_until_its_copy_is_done(simulated):
    wait = "main.wait_event(done)\nx.record_stream(main)\n"
    assert broken(simulated.python(f"{UPLOAD}{wait}done.synchronize()\nbuffer.zero_()\nassert x.sum() == 3")) == []
    assert broken(simulated.python(f"{UPLOAD}{wait}buffer.zero_()\ndone.synchronize()")) == [PINNED]


def test_streams_wait_for_each_other(simulated):
    assert broken(simulated.python(f"{UPLOAD}y = x + 1\nx.record_stream(main)\ntorch.cuda.synchronize()")) == [UNORDERED]
    assert broken(simulated.python(f"{UPLOAD}main.wait_stream(up)\ny = x + 1\nx.record_stream(main)")) == []


def test_memory_of_one_stream_is_kept_for_another(simulated):
    use = f"{UPLOAD}main.wait_event(done)\ny = x + 1\n"
    assert broken(simulated.python(f"{use}del x")) == [FREED]
    assert broken(simulated.python(f"{use}x.record_stream(main)\ndel x")) == []
    assert broken(simulated.python(f"{use}torch.cuda.synchronize()\ndel x")) == []


def test_a_graph_is_refused(simulated):
    found = simulated.python("torch.cuda.CUDAGraph()")
    assert "the simulated device captures no graphs" in found.stderr
