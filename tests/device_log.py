"""What a driver's log says about the order of a step's tasks."""

from device_double import NOTE

# All that a step may ask of the driver: none of it waits for a device.
WITHIN_A_STEP = {
    "cuCtxPushCurrent",
    "cuCtxPopCurrent",
    "cuEventCreate",
    "cuEventRecordWithFlags",
    "cuStreamWaitEvent",
    "cuMemcpyPeerAsync",
}


class Order:
    """Which steps of a ``StreamPlan`` end before others begin, by the records and waits in the log.

    Attributes:
        streams: by step, the number of its stream.
        before: by step, those that are sure to have ended when it begins.
        at_end: those that what the caller enqueues next is sure to follow.
        calls: the driver's functions that were called in between.
    """

    def __init__(self, log, caller=0):
        self.streams, self.before, self.calls = [], [], set()
        ended = {}  # by stream
        recorded = {}  # by event
        for call in log:
            if call.name.startswith(NOTE):
                stream = int(call.name.split()[1])
                self.streams.append(stream)
                self.before.append(frozenset(ended.get(stream, ())))
                ended[stream] = self.before[-1] | {len(self.before) - 1}
                continue
            self.calls.add(call.name)
            if call.name == "cuEventRecordWithFlags":
                recorded[call.args["event"]] = ended.get(call.args["stream"], frozenset())
            elif call.name == "cuStreamWaitEvent":
                stream, event = call.args["stream"], call.args["event"]
                ended[stream] = ended.get(stream, frozenset()) | recorded.get(event, frozenset())
        self.at_end = ended.get(caller, frozenset())
