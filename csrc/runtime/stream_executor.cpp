#include "runtime/stream_executor.hpp"

#include <cxxabi.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <thread>
#include <utility>

#include "cuda/captured_nodes.hpp"
#include "cuda/stream_pool.hpp"

namespace pe {
namespace {

constexpr unsigned kStepsAhead = 2;  // that may be enqueued and unfinished
constexpr auto kLookPeriod = std::chrono::microseconds(50);
constexpr auto kPollPeriod = std::chrono::milliseconds(10);

}  // namespace

// The streams and events of one device.
struct StreamExecutor::OfDevice {
  explicit OfDevice(int ordinal)
      : context(std::make_shared<const cuda::PrimaryContext>(ordinal)),
        greatest_priority(cuda::priority(*context, true)),
        begun(context, cuda::kEventDisableTiming),
        inputs(context, cuda::kEventDisableTiming) {
    for (cuda::Event& event : finished) event = cuda::Event(context, cuda::kEventDisableTiming);
  }

  // The next stream for a program that has `taken` of them so far.
  cuda::StreamHandle stream(bool copies, std::size_t taken) {
    auto& own = copies ? copy_streams : lanes;
    if (taken == own.size()) own.emplace_back(context, copies);
    return own[taken].handle();
  }

  void spoil() {
    for (auto* own : {&lanes, &copy_streams}) {
      for (cuda::PooledStream& stream : *own) stream.spoil();
    }
  }

  const std::shared_ptr<const cuda::PrimaryContext> context;
  const int greatest_priority;
  std::vector<cuda::PooledStream> lanes, copy_streams;
  cuda::Event begun;
  cuda::Event inputs;
  bool reads_inputs = false;  // since the last wait for them
  std::array<cuda::Event, kStepsAhead> finished;
};

class StreamExecutor::Laid {
 public:
  const StreamExecutor* maker = nullptr;
  std::shared_ptr<const Program> program;
  std::shared_ptr<const StreamPlan> plan;
  std::vector<std::size_t> device;  // by stream, as an index
  std::vector<cuda::StreamHandle> streams;
  std::vector<cuda::Event> events;  // by op; set if another stream waits for the op
  std::vector<cuda::Event> tails;   // by stream
  std::vector<std::shared_ptr<DeviceTimes>> times;

  std::shared_ptr<DeviceTimes> unused_times(const StreamExecutor& executor) {
    for (auto& known : times) {
      if (known.use_count() == 1) return known;
    }
    DeviceTimes::Contexts contexts;
    for (const auto& device : executor.devices_) contexts.push_back(device->context);
    return times.emplace_back(std::make_shared<DeviceTimes>(plan->ops().size(), std::move(contexts)));
  }
};

// Enqueues one step.
struct StreamExecutor::Run {
  Run(StreamExecutor& executor, Laid& program, const DeviceRunOptions& how)
      : self(executor), laid(program), options(how), started(program.streams.size(), false) {
    if (options.record) result.times = laid.unused_times(self);
  }

  void make_current(std::size_t device) {
    if (current && device == current_device) return;
    current.reset();
    current.emplace(*self.devices_[device]->context);
    current_device = device;
  }

  unsigned timing_flags() const {
    return options.capturing ? cuda::kEventRecordExternal : cuda::kEventRecordDefault;
  }

  void begin() {
    for (std::size_t device = 0; device < self.devices_.size(); ++device) {
      make_current(device);
      if (result.times) {
        result.times->record_origin(device, options.callers[device], timing_flags());
      }
      self.devices_[device]->begun.record(options.callers[device]);
    }
    if (options.capturing) nodes.emplace(options.callers[0]);
  }

  void enqueue(std::uint32_t number) {
    const StreamPlan& plan = *laid.plan;
    const StreamOp& op = plan.ops()[number];
    const std::size_t device = laid.device[op.stream];
    const cuda::StreamHandle stream = laid.streams[op.stream];
    make_current(device);
    if (!started[op.stream]) {
      cuda::wait(stream, self.devices_[device]->begun);
      started[op.stream] = true;
    }
    for (const std::uint32_t other : plan.waits(op)) cuda::wait(stream, laid.events[other]);
    if (result.times) result.times->record_begin(number, device, stream, timing_flags());
    const bool goes_first = nodes && stream_of(op.action.kind) == Stream::Backward;
    if (goes_first) nodes->take_new();  // skips the nodes that others captured
    laid.program->run(op.action);
    if (goes_first) {
      cuda::set_priority(nodes->take_new(), self.devices_[device]->greatest_priority);
    }
    if (result.times) result.times->record_end(number, stream, timing_flags());
    if (op.awaited) laid.events[number].record(stream);
  }

  // Makes the callers wait for all streams that were started.
  void join() {
    for (std::size_t stream = 0; stream < started.size(); ++stream) {
      if (!started[stream]) continue;
      make_current(laid.device[stream]);
      laid.tails[stream].record(laid.streams[stream]);
      for (std::size_t device = 0; device < self.devices_.size(); ++device) {
        make_current(device);
        cuda::wait(options.callers[device], laid.tails[stream]);
      }
    }
    if (!result.times) return;
    for (std::size_t device = 0; device < self.devices_.size(); ++device) {
      make_current(device);
      result.times->record_finish(device, options.callers[device], timing_flags());
    }
  }

  // Makes the streams wait for the callers: memory freed from now on may have been used on any stream, and the
  // stream it belongs to may reuse it.
  void follow_callers() {
    for (std::size_t stream = 0; stream < started.size(); ++stream) {
      if (!started[stream]) continue;
      make_current(laid.device[stream]);
      cuda::wait(laid.streams[stream], self.last_mark(laid.device[stream]));
    }
  }

  StreamExecutor& self;
  Laid& laid;
  const DeviceRunOptions& options;
  DeviceStepResult result;
  std::vector<bool> started;  // by stream
  std::optional<cuda::CurrentContext> current;
  std::size_t current_device = 0;
  std::optional<cuda::CapturedNodes> nodes;
};

// During a run: close() only requests, and the destructor does what was requested.
class StreamExecutor::Busy {
 public:
  explicit Busy(StreamExecutor& executor) : executor_(executor) {
    executor.check_usable();
    const std::lock_guard lock(executor.closing_);
    if (executor.busy_) throw std::logic_error("it is running a step already");
    executor.busy_ = true;
  }
  ~Busy() {
    const std::lock_guard lock(executor_.closing_);
    executor_.busy_ = false;
    if (executor_.closed_) executor_.devices_.clear();
  }

 private:
  StreamExecutor& executor_;
};

StreamExecutor::StreamExecutor(std::vector<int> device_of_rank) : ordinals_(std::move(device_of_rank)) {
  std::sort(ordinals_.begin(), ordinals_.end());
  ordinals_.erase(std::unique(ordinals_.begin(), ordinals_.end()), ordinals_.end());
  for (const int ordinal : ordinals_) devices_.push_back(std::make_unique<OfDevice>(ordinal));
  for (const auto& device : devices_) {
    for (const auto& peer : devices_) {
      if (device != peer) device->context->reach(*peer->context);
    }
  }
}

StreamExecutor::~StreamExecutor() { close(); }

std::size_t StreamExecutor::index_of(int ordinal) const {
  return std::lower_bound(ordinals_.begin(), ordinals_.end(), ordinal) - ordinals_.begin();
}

void StreamExecutor::check_usable() const {
  if (dead_) throw std::logic_error("it is dead: a device has failed");
  if (closed_) throw std::logic_error("it is closed");
}

void StreamExecutor::check_device(int ordinal) const {
  if (!std::binary_search(ordinals_.begin(), ordinals_.end(), ordinal)) {
    throw std::out_of_range("the executor has no device " + std::to_string(ordinal));
  }
}

void StreamExecutor::check_callers(const std::vector<cuda::StreamHandle>& callers) const {
  if (callers.size() != ordinals_.size()) {
    throw std::invalid_argument(std::to_string(callers.size()) + " callers' streams are given for " +
                                std::to_string(ordinals_.size()) + " devices; give one for each");
  }
}

std::shared_ptr<StreamExecutor::Laid> StreamExecutor::lay_out(std::shared_ptr<const Program> program,
                                                              std::shared_ptr<const StreamPlan> plan) {
  check_usable();
  if (program->shared_plan() != plan->shared_plan()) throw PlanError("the streams are of another plan");
  for (const StreamInfo& stream : plan->streams()) check_device(stream.device);
  auto laid = std::make_shared<Laid>();
  laid->maker = this;
  laid->program = std::move(program);
  laid->plan = std::move(plan);
  std::vector<std::size_t> taken(2 * devices_.size(), 0);
  for (const StreamInfo& stream : laid->plan->streams()) {
    const std::size_t device = index_of(stream.device);
    laid->device.push_back(device);
    laid->streams.push_back(devices_[device]->stream(stream.copies, taken[2 * device + stream.copies]++));
    laid->tails.emplace_back(devices_[device]->context, cuda::kEventDisableTiming);
  }
  for (const StreamOp& op : laid->plan->ops()) {
    laid->events.emplace_back();
    if (!op.awaited) continue;
    const auto& context = devices_[laid->device[op.stream]]->context;
    laid->events.back() = cuda::Event(context, cuda::kEventDisableTiming);
  }
  return laid;
}

DeviceStepResult StreamExecutor::run(Laid& laid, const DeviceRunOptions& options) {
  const Busy busy(*this);
  if (laid.maker != this) throw std::logic_error("the program was laid out by another executor");
  check_callers(options.callers);
  Run run(*this, laid, options);
  DeviceStepResult& result = run.result;
  const auto fail = [&](TaskId task) {
    result.outcome = Outcome::Failed;
    if (result.error) return;
    result.failed_task = task;
    result.error = std::current_exception();
  };
  TaskId task = kNoTask;
  try {
    run.begin();
    const auto& ops = laid.plan->ops();
    for (std::uint32_t number = 0; number < ops.size() && !closed_; ++number) {
      task = ops[number].task;
      run.enqueue(number);
    }
    if (closed_) result.outcome = Outcome::Closed;
    task = kNoTask;
  } catch (const abi::__forced_unwind&) {
    throw;
  } catch (const cuda::CudaError&) {
    for (const auto& device : devices_) device->spoil();
    fail(task);
  } catch (...) {
    fail(task);
  }
  try {
    run.join();
    if (run.nodes) {
      run.nodes->take_new();
      result.num_nodes = run.nodes->count();
    }
    if (!options.capturing) {
      mark(options.callers);
      run.follow_callers();
    }
    run.current.reset();
  } catch (const cuda::CudaError&) {
    dead_ = !options.capturing;
    for (const auto& device : devices_) device->spoil();
    fail(kNoTask);
  }
  return result;
}

void StreamExecutor::mark(const std::vector<cuda::StreamHandle>& callers) {
  check_callers(callers);
  for (std::size_t device = 0; device < devices_.size(); ++device) {
    const cuda::CurrentContext current(*devices_[device]->context);
    devices_[device]->finished[steps_ % kStepsAhead].record(callers[device]);
  }
  ++steps_;
}

const cuda::Event& StreamExecutor::last_mark(std::size_t device) const {
  return devices_[device]->finished[(steps_ + kStepsAhead - 1) % kStepsAhead];
}

bool StreamExecutor::idle() const {
  for (std::size_t device = 0; device < devices_.size(); ++device) {
    if (!last_mark(device).done()) return false;
  }
  return true;
}

Outcome StreamExecutor::wait_for_room(const WaitOptions& options) {
  const Busy busy(*this);
  std::vector<const cuda::Event*> earlier;
  earlier.reserve(devices_.size());
  for (const auto& device : devices_) earlier.push_back(&device->finished[steps_ % kStepsAhead]);
  return wait_for(earlier, options);
}

void StreamExecutor::mark_inputs(int ordinal, cuda::StreamHandle caller) {
  const Busy busy(*this);
  check_device(ordinal);
  OfDevice& device = *devices_[index_of(ordinal)];
  const cuda::CurrentContext current(*device.context);
  device.inputs.record(caller);
  device.reads_inputs = true;
}

Outcome StreamExecutor::wait_for_inputs(const WaitOptions& options) {
  const Busy busy(*this);
  std::vector<const cuda::Event*> reading;
  for (const auto& device : devices_) {
    if (std::exchange(device->reads_inputs, false)) reading.push_back(&device->inputs);
  }
  return wait_for(reading, options);
}

Outcome StreamExecutor::wait_for(const std::vector<const cuda::Event*>& events, const WaitOptions& options) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  auto next_poll = begin + kPollPeriod;
  for (const cuda::Event* const event : events) {
    while (true) {
      try {
        if (event->done()) break;
      } catch (const cuda::CudaError& error) {
        dead_ = dead_ || !error.of_capture();
        throw;
      }
      if (closed_) return Outcome::Closed;
      std::this_thread::sleep_for(kLookPeriod);
      if (Clock::now() < next_poll) continue;
      if (options.poll && options.poll()) return Outcome::Interrupted;
      if (Clock::now() - begin > options.timeout) return Outcome::TimedOut;
      next_poll = Clock::now() + kPollPeriod;
    }
  }
  return Outcome::Done;
}

void StreamExecutor::close() {
  const std::lock_guard lock(closing_);
  closed_ = true;
  if (!busy_) devices_.clear();
}

const std::vector<cuda::StreamHandle>& StreamExecutor::streams_of(const Laid& laid) { return laid.streams; }

void StreamExecutor::copy(cuda::Address to, int to_device, cuda::Address from, int from_device,
                          std::size_t nbytes, cuda::StreamHandle stream) const {
  if (devices_.empty())
    throw std::logic_error("it is closed");  // not if a step is still running: it releases them later
  check_device(to_device);
  check_device(from_device);
  PE_CUDA(cuda::Driver::get(), cuMemcpyPeerAsync, to, devices_[index_of(to_device)]->context->handle(), from,
          devices_[index_of(from_device)]->context->handle(), nbytes, stream);
}

}  // namespace pe
