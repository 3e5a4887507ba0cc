// NCCL for the software GPU: operations run on the threads of streams and move bytes between processes over
// sockets. It is strict where the real one may be lenient: a send ends once it has been received, and the host
// waits at the first operation of two ranks until both have come to it.
//
// SOFTGPU_NCCL_TIMEOUT: seconds after which a wait says on stderr what it waits for; it goes on waiting.

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "machine/kernels.hpp"

extern "C" {  // of CUDA's runtime
int cudaGetDevice(int* device);
int cudaSetDevice(int device);
int cudaMalloc(void** pointer, std::size_t nbytes);
int cudaFree(void* pointer);
}

namespace {

using Guard = std::unique_lock<std::mutex>;
using Bytes = std::vector<char>;

enum Result {
  success,
  cuda_error,
  system_error,
  internal_error,
  invalid_argument,
  invalid_usage,
  remote_error,
  in_progress
};
enum Type {
  int8,
  uint8,
  int32,
  uint32,
  int64,
  uint64,
  float16,
  float32,
  float64,
  bfloat16,
  e4m3,
  e5m2,
  num_types
};
enum Reduction { sum, product, maximum, minimum, average, num_reductions };

constexpr std::size_t kSize[num_types] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

struct UniqueId {
  char bytes[128];
};

// The beginning of the caller's configuration, which is all that matters here.
struct Config {
  std::size_t size;
  unsigned magic, version;
  int blocking;
};

struct AtEnd {
  explicit AtEnd(std::function<void()> body) : body(std::move(body)) {}
  ~AtEnd() { body(); }
  std::function<void()> body;
};

struct Aborted {};  // thrown where a wait ends because the communicator was aborted

struct Failed {  // thrown where a call has to end with this result
  Result result;
  std::string why;
};

// --- Numbers
// --------------------------------------------------------------------------------------------------

float of_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct BFloat16 {
  std::uint16_t bits;
  operator float() const { return of_bits(std::uint32_t{bits} << 16); }
  static BFloat16 of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return {static_cast<std::uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};

struct Float16 {
  _Float16 value;
  operator float() const { return value; }
  static Float16 of(float value) { return {static_cast<_Float16>(value)}; }
};

// Eight bits, of which `mantissa` are the mantissa's. Values too large become the largest, as CUDA's types do.
template <int mantissa>
struct Float8 {
  std::uint8_t bits;
  static constexpr int kBias = mantissa == 3 ? 7 : 15;
  static constexpr int kLargest = mantissa == 3 ? 0x7e : 0x7b;
  operator float() const {
    const int rest = bits & 0x7f, exponent = rest >> mantissa, low = rest & ((1 << mantissa) - 1);
    float value = exponent == 0 ? std::ldexp(float(low), 1 - kBias - mantissa)
                                : std::ldexp(float(low + (1 << mantissa)), exponent - kBias - mantissa);
    if (rest > kLargest) value = mantissa == 2 && low == 0 ? INFINITY : NAN;
    return bits & 0x80 ? -value : value;
  }
  static Float8 of(float value) {
    const std::uint8_t sign = std::signbit(value) ? 0x80 : 0;
    if (std::isnan(value)) return {static_cast<std::uint8_t>(sign | 0x7f)};
    const float size = std::fabs(value);
    int low = 0, high = kLargest;  // of the largest value that is not larger
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (float(Float8{std::uint8_t(middle)}) <= size)
        low = middle;
      else
        high = middle - 1;
    }
    if (low < kLargest) {
      const float below = size - float(Float8{std::uint8_t(low)});
      const float above = float(Float8{std::uint8_t(low + 1)}) - size;
      if (above < below || (above == below && low % 2)) ++low;
    }
    return {static_cast<std::uint8_t>(sign | low)};
  }
};

// What sums of a type are taken in, and the way back.
template <class T>
struct Sums {
  using Wide = T;
  static T narrow(Wide value) { return value; }
};
template <class T>
struct WideSums {
  using Wide = float;
  static T narrow(Wide value) { return T::of(value); }
};
template <>
struct Sums<Float16> : WideSums<Float16> {};
template <>
struct Sums<BFloat16> : WideSums<BFloat16> {};
template <int mantissa>
struct Sums<Float8<mantissa>> : WideSums<Float8<mantissa>> {};
template <>
struct Sums<std::int8_t> {
  using Wide = std::int64_t;
  static std::int8_t narrow(Wide v) { return v; }
};
template <>
struct Sums<std::uint8_t> {
  using Wide = std::uint64_t;
  static std::uint8_t narrow(Wide v) { return v; }
};
template <>
struct Sums<std::int32_t> {
  using Wide = std::int64_t;
  static std::int32_t narrow(Wide v) { return v; }
};

// How values are joined; `scale` is multiplied to each first, if it is given.
struct Joining {
  int how;
  const void* scale = nullptr;
};

// In the order of the ranks.
template <class T>
void join(const std::vector<const char*>& inputs, char* output, std::size_t count, Joining joining) {
  using Wide = typename Sums<T>::Wide;
  const auto at = [](const char* from, std::size_t i) {
    T value;
    std::memcpy(&value, from + i * sizeof(T), sizeof(T));
    return static_cast<Wide>(value);
  };
  const Wide scale = joining.scale ? at(static_cast<const char*>(joining.scale), 0) : Wide(1);
  for (std::size_t i = 0; i < count; ++i) {
    Wide total = at(inputs[0], i) * scale;
    for (std::size_t r = 1; r < inputs.size(); ++r) {
      const Wide value = at(inputs[r], i) * scale;
      if (joining.how == product)
        total = total * value;
      else if (joining.how == maximum)
        total = value > total || value != value ? value : total;
      else if (joining.how == minimum)
        total = value < total || value != value ? value : total;
      else
        total = total + value;
    }
    if (joining.how == average) total = total / static_cast<Wide>(inputs.size());
    const T result = Sums<T>::narrow(total);
    std::memcpy(output + i * sizeof(T), &result, sizeof(T));
  }
}

using Join = void (*)(const std::vector<const char*>&, char*, std::size_t, Joining);
constexpr Join kJoin[num_types] = {join<std::int8_t>,   join<std::uint8_t>, join<std::int32_t>,
                                   join<std::uint32_t>, join<std::int64_t>, join<std::uint64_t>,
                                   join<Float16>,       join<float>,        join<double>,
                                   join<BFloat16>,      join<Float8<3>>,    join<Float8<2>>};

// --- Communicators
// ----------------------------------------------------------------------------------------------

enum Call {
  kReceive = -1,
  kSend,
  kAllReduce,
  kReduce,
  kBroadcast,
  kAllGather,
  kReduceScatter,
  kAllToAll,
  kGather,
  kScatter
};
constexpr const char* kName[] = {"ncclSend",      "ncclAllReduce", "ncclReduce",
                                 "ncclBroadcast", "ncclAllGather", "ncclReduceScatter",
                                 "ncclAlltoAll",  "ncclGather",    "ncclScatter"};

enum Kind { hello, data, ack, host, bye };
enum Way { sends, receives, collects, num_ways };  // of a connection that is set up at its first operation

struct Header {
  int kind;
  int call;  // of a hello: the way
  int type, reduction, root;
  std::size_t nbytes;
};

struct Message {
  Header header;
  Bytes bytes;
};

struct Peer {
  int socket = -1;
  bool open = false;
  std::mutex writing;
  bool closed = false;                 // under `writing`
  std::deque<Message> inbox, letters;  // letters: from host to host
  std::size_t sent = 0, acked = 0;
  bool told[num_ways] = {}, heard[num_ways] = {};
  bool gone = false, parted = false;  // without and with a goodbye
};

struct Op {
  int call;
  const void* from;
  void* to;
  std::size_t count;
  int type;
  Joining joining;
  int reduction, root;  // root: also the peer
  void* stream;
};

void write_all(int socket, const void* from, std::size_t nbytes) {
  const char* at = static_cast<const char*>(from);
  while (nbytes > 0) {
    const ssize_t n = ::send(socket, at, nbytes, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) throw Aborted{};
    at += n;
    nbytes -= n;
  }
}

bool read_all(int socket, void* to, std::size_t nbytes) {
  char* at = static_cast<char*>(to);
  while (nbytes > 0) {
    const ssize_t n = ::recv(socket, at, nbytes, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    at += n;
    nbytes -= n;
  }
  return true;
}

}  // namespace

struct ncclComm {
  const std::string id;
  const int rank, size;
  int device = 0;
  bool blocking = true;

  std::mutex mutex;  // of all below
  std::condition_variable changed;
  std::vector<std::unique_ptr<Peer>> peers;
  bool aborted = false, ended = false;
  Result state = success;
  std::string error;
  std::size_t enqueued = 0, begun = 0;      // operations outside of graphs: they run in this order
  bool running = false;                     // an operation
  std::vector<std::vector<double>> scales;  // of PreMulSum; of doubles, as each type fits in
  std::vector<const void*> scale_at;
  int splits = 0;

  ncclComm(std::string id, int rank, int size) : id(std::move(id)), rank(rank), size(size) {
    for (int r = 0; r < size; ++r) peers.push_back(std::make_unique<Peer>());
  }

  std::string who() const { return "rank " + std::to_string(rank) + " of communicator " + id.substr(0, 8); }

  // Returns once `done()`; throws Aborted if that comes first.
  template <class Done>
  void wait(Guard& lock, const std::string& what, Done done) {
    static const char* const text = std::getenv("SOFTGPU_NCCL_TIMEOUT");
    static const double limit = text ? std::atof(text) : 0;
    const auto over = [&] { return aborted || done(); };
    if (limit > 0 && !changed.wait_for(lock, std::chrono::duration<double>(limit), over)) {
      std::fprintf(stderr, "softgpu: %s has waited %g seconds for %s\n", who().c_str(), limit, what.c_str());
    }
    changed.wait(lock, over);
    if (aborted) throw Aborted{};
  }

  // --- Messages; none of these is called with the mutex held.

  void post(int to, Header header, const void* bytes) {
    Peer& peer = *peers[to];
    const Guard lock(peer.writing);
    if (peer.closed) return;  // whoever needs an answer waits for it
    try {
      write_all(peer.socket, &header, sizeof header);
      write_all(peer.socket, bytes, header.nbytes);
    } catch (const Aborted&) {
      // The reader notices too.
    }
  }

  // Reads what a peer sends, until it has gone.
  void read(int from) {
    Peer& peer = *peers[from];
    Message message;
    while (read_all(peer.socket, &message.header, sizeof message.header)) {
      message.bytes.resize(message.header.nbytes);
      if (!read_all(peer.socket, message.bytes.data(), message.bytes.size())) break;
      const Guard lock(mutex);
      switch (message.header.kind) {
        case hello:
          peer.heard[message.header.call] = true;
          break;
        case ack:
          ++peer.acked;
          break;
        case bye:
          peer.parted = true;
          break;
        case host:
          peer.letters.push_back(std::move(message));
          break;
        default:
          peer.inbox.push_back(std::move(message));
      }
      message = {};
      changed.notify_all();
    }
    {
      const Guard lock(mutex);
      peer.open = false;
      peer.gone = !peer.parted;
      if (peer.gone && !aborted && !ended) {
        state = remote_error;
        error = "rank " + std::to_string(from) + " of this communicator has gone";
      }
      changed.notify_all();
    }
    const Guard lock(peer.writing);
    peer.closed = true;
    ::close(peer.socket);
  }

  // Ends the connections.
  void part(bool goodbye) {
    if (goodbye) {
      for (int r = 0; r < size; ++r) {
        if (r != rank) post(r, {bye, 0, 0, 0, 0, 0}, nullptr);
      }
    }
    const Guard lock(mutex);
    ended = true;
    if (!goodbye) aborted = true;
    for (auto& peer : peers) {
      if (peer->open) ::shutdown(peer->socket, SHUT_RDWR);
    }
    changed.notify_all();
  }

  // --- Set-up

  sockaddr_un address(int of, socklen_t* length) const {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    const std::string name = "softgpu-nccl/" + id + "/" + std::to_string(of);
    std::memcpy(address.sun_path + 1, name.data(), name.size());
    *length = offsetof(sockaddr_un, sun_path) + 1 + name.size();
    return address;
  }

  void check_aborted() {
    const Guard lock(mutex);
    if (aborted) throw Aborted{};
  }

  // Returns when all ranks have come.
  void meet() {
    socklen_t length;
    sockaddr_un mine = address(rank, &length);
    const int listener = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const AtEnd closing([&] { ::close(listener); });
    if (::bind(listener, reinterpret_cast<sockaddr*>(&mine), length) || ::listen(listener, size)) {
      throw Failed{invalid_usage, "two processes say that they are " + who()};
    }
    for (int other = 0; other < rank; ++other) {
      sockaddr_un theirs = address(other, &length);
      const int socket = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
      while (::connect(socket, reinterpret_cast<sockaddr*>(&theirs), length)) {
        check_aborted();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      const int said[] = {rank, size};
      write_all(socket, said, sizeof said);
      peers[other]->socket = socket;
    }
    for (int missing = size - 1 - rank; missing > 0; --missing) {
      pollfd waiting{listener, POLLIN, 0};
      while (::poll(&waiting, 1, 100) <= 0) check_aborted();
      const int socket = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
      int said[2];
      if (!read_all(socket, said, sizeof said)) throw Failed{remote_error, "a rank has gone"};
      if (said[1] != size) throw Failed{invalid_usage, "ranks differ in how many they are"};
      peers[said[0]]->socket = socket;
    }
    for (int r = 0; r < size; ++r) {
      if (r == rank) continue;
      peers[r]->open = true;
      std::thread([this, r] { read(r); }).detach();
    }
  }

  // As `meet`; the state says how it went.
  void start() {
    Failed ended{success, ""};
    try {
      meet();
    } catch (const Failed& failed) {
      ended = failed;
    } catch (const Aborted&) {
      ended = {internal_error, "it was aborted"};
    }
    const Guard lock(mutex);
    if (state == in_progress) {
      state = ended.result;
      error = ended.why;
    }
  }

  void check_state() {
    const Guard lock(mutex);
    if (state != success) throw Failed{state, error};
  }

  // The host's values of all ranks.
  std::vector<Bytes> tell_all(const Bytes& mine) {
    std::vector<Bytes> found(size, mine);
    for (int r = 0; r < size; ++r) {
      if (r != rank) post(r, {host, 0, 0, 0, 0, mine.size()}, mine.data());
    }
    Guard lock(mutex);
    for (int r = 0; r < size; ++r) {
      if (r == rank) continue;
      auto& letters = peers[r]->letters;
      wait(lock, "rank " + std::to_string(r) + " to split it",
           [&] { return !letters.empty() || peers[r]->gone; });
      if (letters.empty()) throw Failed{remote_error, error};
      found[r] = std::move(letters.front().bytes);
      letters.pop_front();
    }
    return found;
  }

  static int opposite(int way) { return way == collects ? collects : way == sends ? receives : sends; }

  std::set<std::pair<int, int>> ways(const std::vector<Op>& ops) const {
    std::set<std::pair<int, int>> found;
    for (const Op& op : ops) {
      if (op.call == kSend || op.call == kReceive) {
        if (op.root != rank) found.insert({op.root, op.call == kSend ? sends : receives});
      } else {
        for (int r = 0; r < size; ++r) {
          if (r != rank) found.insert({r, collects});
        }
      }
    }
    return found;
  }

  void say_hello(const std::vector<Op>& ops) {
    for (const auto& [r, way] : ways(ops)) {
      if (std::exchange(peers[r]->told[way], true)) continue;
      post(r, {hello, way, 0, 0, 0, 0}, nullptr);
    }
  }

  // The host waits here until the peers have come to their first such operation too.
  void await_hello(const std::vector<Op>& ops) {
    Guard lock(mutex);
    for (const auto& [r, way] : ways(ops)) {
      Peer& peer = *peers[r];
      wait(lock, "rank " + std::to_string(r) + " to come to its first operation with it",
           [&] { return peer.heard[opposite(way)] || peer.gone || peer.parted; });
      if (!peer.heard[opposite(way)]) throw Failed{remote_error, "rank " + std::to_string(r) + " has gone"};
    }
  }

  // --- Operations, on a stream's thread

  Header header(const Op& op, std::size_t nbytes) const {
    return {data, std::max<int>(op.call, kSend), op.type, op.reduction, op.call > kSend ? op.root : 0, nbytes};
  }

  void give(int to, const Op& op, const void* from, std::size_t count) {
    const std::size_t nbytes = count * kSize[op.type];
    {
      const Guard lock(mutex);
      ++peers[to]->sent;
    }
    post(to, header(op, nbytes), from);
  }

  Bytes take(int from, const Op& op, std::size_t count) {
    Header expected = header(op, count * kSize[op.type]);
    Message message;
    {
      Guard lock(mutex);
      auto& inbox = peers[from]->inbox;
      const std::string what = std::string(kName[expected.call]) + " of rank " + std::to_string(from);
      wait(lock, what, [&] { return !inbox.empty(); });  // also if it has gone: until it is aborted
      message = std::move(inbox.front());
      inbox.pop_front();
    }
    post(from, {ack, 0, 0, 0, 0, 0}, nullptr);
    const Header& found = message.header;
    if (expected.call == kSend) expected.type = found.type;  // only bytes count
    if (found.call != expected.call || found.nbytes != expected.nbytes || found.type != expected.type ||
        found.reduction != expected.reduction || found.root != expected.root) {
      throw std::runtime_error(
          who() + " expects " + kName[expected.call] + " of " + std::to_string(expected.nbytes) +
          " bytes from rank " + std::to_string(from) + ", which has enqueued " + kName[found.call] + " of " +
          std::to_string(found.nbytes) +
          (found.nbytes == expected.nbytes ? " bytes, of another type, reduction or root" : " bytes"));
    }
    return std::move(message.bytes);
  }

  void collect(const Op& op) {
    const std::size_t nbytes = op.count * kSize[op.type];
    const char* const from = static_cast<const char*>(op.from);
    char* const to = static_cast<char*>(op.to);
    const bool is_root = op.root == rank;
    const bool slices = op.call == kReduceScatter || op.call == kAllToAll || op.call == kScatter;
    const bool gives = op.call == kBroadcast || op.call == kScatter ? is_root : true;
    const bool takes = op.call == kReduce || op.call == kGather ? is_root : true;
    const bool all_give = op.call != kBroadcast && op.call != kScatter;
    const bool all_take = op.call != kReduce && op.call != kGather;
    std::vector<Bytes> found(size);
    if (gives) {
      const char* const own = from + (slices ? rank * nbytes : 0);
      found[rank].assign(own, own + nbytes);  // `to` may be the same memory
      for (int r = 0; r < size; ++r) {
        if (r != rank && (all_take || r == op.root)) give(r, op, from + (slices ? r * nbytes : 0), op.count);
      }
    }
    if (takes) {
      for (int r = 0; r < size; ++r) {
        if (r != rank && (all_give || r == op.root)) found[r] = take(r, op, op.count);
      }
      if (op.call == kAllReduce || op.call == kReduce || op.call == kReduceScatter) {
        std::vector<const char*> inputs;
        for (const Bytes& bytes : found) inputs.push_back(bytes.data());
        kJoin[op.type](inputs, to, op.count, op.joining);
      } else if (all_give) {
        for (int r = 0; r < size; ++r) std::memcpy(to + r * nbytes, found[r].data(), nbytes);
      } else {
        std::memcpy(to, found[op.root].data(), nbytes);
      }
    }
    await_acks();
  }

  void await_acks() {
    Guard lock(mutex);
    for (int r = 0; r < size; ++r) {
      wait(lock, "rank " + std::to_string(r) + " to receive",
           [&] { return peers[r]->acked >= peers[r]->sent; });
    }
  }

  // Collectives one after another; then all messages together.
  void perform(const std::vector<Op>& ops) {
    std::deque<const Op*> to_self;
    for (const Op& op : ops) {
      if (op.call > kSend) collect(op);
    }
    for (const Op& op : ops) {
      if (op.call != kSend) continue;
      if (op.root == rank)
        to_self.push_back(&op);
      else
        give(op.root, op, op.from, op.count);
    }
    for (const Op& op : ops) {
      if (op.call != kReceive) continue;
      const std::size_t nbytes = op.count * kSize[op.type];
      if (op.root != rank) {
        std::memcpy(op.to, take(op.root, op, op.count).data(), nbytes);
        continue;
      }
      if (to_self.empty() || to_self.front()->count * kSize[to_self.front()->type] != nbytes) {
        throw std::runtime_error(who() + " receives from itself what it does not send");
      }
      std::memcpy(op.to, to_self.front()->from, nbytes);
      to_self.pop_front();
    }
    await_acks();
  }

  // ``turn``: of an operation outside of graphs; 0 within one.
  void run(const std::vector<Op>& ops, std::size_t turn) {
    try {
      {
        Guard lock(mutex);
        wait(lock, "an earlier operation", [&] { return !running && (turn == 0 || begun + 1 == turn); });
        running = true;
        if (turn) begun = turn;
      }
      const AtEnd ended([&] {
        const Guard lock(mutex);
        running = false;
        changed.notify_all();
      });
      perform(ops);
    } catch (const Aborted&) {
      // The kernel ends; what it should have written is not there.
    }
  }

  // On one stream all operations of a group run; the others wait for that.
  void launch(std::vector<Op> ops) {
    int before = 0;  // the default stream is that of the current device
    cudaGetDevice(&before);
    cudaSetDevice(device);
    const AtEnd restored([before] { cudaSetDevice(before); });
    std::vector<void*> streams;
    for (const Op& op : ops) {
      if (std::find(streams.begin(), streams.end(), op.stream) == streams.end()) streams.push_back(op.stream);
    }
    std::size_t turn = 0;
    if (!softgpu::is_capturing(streams[0])) {
      const Guard lock(mutex);
      turn = ++enqueued;
    }
    struct Meeting {
      std::size_t arrived = 0;
      std::size_t over = 0;
    };
    const auto meeting = std::make_shared<Meeting>();
    const std::size_t others = streams.size() - 1;
    const char* const name = ops[0].call == kReceive ? "ncclRecv" : kName[ops[0].call];
    for (std::size_t i = 1; i <= others; ++i) {
      const auto wait_there = [this, meeting] {
        try {
          Guard lock(mutex);
          const std::size_t round = meeting->over;
          ++meeting->arrived;
          changed.notify_all();
          wait(lock, "an operation of another stream", [&] { return meeting->over > round; });
        } catch (const Aborted&) {
        }
      };
      softgpu::submit_kernel(streams[i], name, wait_there, true);
    }
    const auto run_here = [this, meeting, others, turn, ops = std::move(ops)] {
      const AtEnd over([&] {
        const Guard lock(mutex);
        ++meeting->over;
        changed.notify_all();
      });
      try {
        Guard lock(mutex);
        wait(lock, "other streams of a group", [&] { return meeting->arrived == others; });
        meeting->arrived = 0;
      } catch (const Aborted&) {
      }
      run(ops, turn);
    };
    softgpu::submit_kernel(streams[0], name, run_here, true);
  }

  // Returns once all that was enqueued outside of graphs has run.
  void finish() {
    Guard lock(mutex);
    try {
      wait(lock, "its operations to end", [&] { return begun == enqueued && !running; });
    } catch (const Aborted&) {
    }
  }
};

namespace {

// --- Calls
// ------------------------------------------------------------------------------------------------------

// Those that are there. A communicator's memory stays: kernels and threads may still refer to it.
struct Register {
  std::mutex mutex;
  std::set<ncclComm*> comms;
  ~Register() {
    const Guard lock(mutex);
    for (ncclComm* comm : comms) comm->part(false);  // or threads of streams would wait for ever
  }
};
Register& all() {
  static Register found;
  return found;
}

thread_local std::string last_error;

ncclComm& check(ncclComm* comm) {
  const Guard lock(all().mutex);
  if (!all().comms.contains(comm)) throw Failed{invalid_argument, "there is no such communicator"};
  return *comm;
}

bool forget(ncclComm* comm) {
  const Guard lock(all().mutex);
  return all().comms.erase(comm) > 0;
}

template <class Body>
int call(Body body) {
  try {
    body();
    return success;
  } catch (const Failed& failed) {
    last_error = failed.why;
    return failed.result;
  } catch (const Aborted&) {
    last_error = "the communicator was aborted";
    return internal_error;
  } catch (const std::exception& error) {
    last_error = error.what();
    return cuda_error;
  }
}

// What this thread's group holds.
struct Group {
  int depth = 0;
  std::vector<ncclComm*> starts;
  std::vector<std::pair<ncclComm*, std::vector<Op>>> ops;
};
thread_local Group group;

void end_group() {
  if (group.depth == 0) throw Failed{invalid_usage, "ncclGroupEnd without ncclGroupStart"};
  if (--group.depth > 0) return;
  const Group ended = std::exchange(group, {});
  std::vector<std::thread> threads;
  for (ncclComm* comm : ended.starts) threads.emplace_back([comm] { comm->start(); });
  for (std::thread& thread : threads) thread.join();
  for (ncclComm* comm : ended.starts) comm->check_state();
  for (const auto& [comm, ops] : ended.ops) comm->say_hello(ops);
  for (const auto& [comm, ops] : ended.ops) comm->await_hello(ops);
  for (const auto& [comm, ops] : ended.ops) comm->launch(ops);
}

int enqueue(ncclComm* handle, Op op) {
  return call([&] {
    ncclComm& comm = check(handle);
    if (op.type < 0 || op.type >= num_types) throw Failed{invalid_argument, "no such type"};
    if (op.root < 0 || op.root >= comm.size) throw Failed{invalid_argument, "no such rank"};
    op.reduction = op.joining.how;
    if (op.joining.how >= num_reductions) {
      const Guard lock(comm.mutex);
      const std::size_t index = op.joining.how - num_reductions;
      if (index >= comm.scale_at.size()) throw Failed{invalid_argument, "no such reduction"};
      op.joining = {sum, comm.scale_at[index]};
      op.reduction = num_reductions;  // which of its own it is each rank says for itself
    }
    ++group.depth;
    auto found = std::find_if(group.ops.begin(), group.ops.end(), [&](auto& of) { return of.first == &comm; });
    if (found == group.ops.end()) found = group.ops.insert(found, {&comm, {}});
    found->second.push_back(op);
    end_group();
  });
}

int start(ncclComm** made, std::string id, int size, int rank, const Config* config) {
  return call([&] {
    if (size < 1 || rank < 0 || rank >= size) throw Failed{invalid_argument, "no such rank"};
    auto* const comm = new ncclComm(std::move(id), rank, size);
    cudaGetDevice(&comm->device);
    comm->blocking = !config || config->blocking == INT_MIN || config->blocking != 0;
    comm->state = in_progress;
    {
      const Guard lock(all().mutex);
      all().comms.insert(comm);
    }
    *made = comm;
    if (group.depth > 0) {
      group.starts.push_back(comm);
    } else if (comm->blocking) {
      comm->start();
      comm->check_state();
    } else {
      std::thread([comm] { comm->start(); }).detach();
      throw Failed{in_progress, ""};
    }
  });
}

std::string name_of(const UniqueId& id) {
  std::string name;
  for (int i = 0; i < 16; ++i) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(id.bytes[i]));
    name += digits;
  }
  return name;
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))
using Comm = ncclComm*;
using Stream = void*;

#ifndef SOFTGPU_NCCL_VERSION
#define SOFTGPU_NCCL_VERSION 23007  // 2.30.7
#endif
API int ncclGetVersion(int* version) { return *version = SOFTGPU_NCCL_VERSION, success; }

API const char* ncclGetErrorString(int result) {
  static const char* const names[] = {"no error",
                                      "unhandled cuda error",
                                      "unhandled system error",
                                      "internal error",
                                      "invalid argument",
                                      "invalid usage",
                                      "remote process exited or there was a "
                                      "network error",
                                      "NCCL operation in progress"};
  return result >= 0 && result < 8 ? names[result] : "unknown result code";
}

API const char* ncclGetLastError(Comm comm) {
  if (comm) {
    const Guard lock(comm->mutex);
    if (!comm->error.empty()) last_error = comm->error;
  }
  return last_error.c_str();
}

API int ncclGetUniqueId(UniqueId* id) {
  *id = {};
  return getrandom(id->bytes, sizeof id->bytes, 0) == sizeof id->bytes ? success : system_error;
}

API int ncclCommInitRankConfig(Comm* made, int size, UniqueId id, int rank, const Config* config) {
  return start(made, name_of(id), size, rank, config);
}
API int ncclCommInitRank(Comm* made, int size, UniqueId id, int rank) {
  return start(made, name_of(id), size, rank, nullptr);
}
API int ncclCommInitRankScalable(Comm* made, int size, int rank, int, UniqueId* ids, const Config* config) {
  return start(made, name_of(ids[0]), size, rank, config);
}
API int ncclCommInitAll(Comm* made, int size, const int* devices) {
  return call([&] {
    UniqueId id;
    ncclGetUniqueId(&id);
    int before;
    cudaGetDevice(&before);
    ++group.depth;
    for (int rank = 0; rank < size; ++rank) {
      cudaSetDevice(devices ? devices[rank] : rank);
      start(&made[rank], name_of(id), size, rank, nullptr);
    }
    cudaSetDevice(before);
    end_group();
  });
}

API int ncclCommSplit(Comm handle, int color, int key, Comm* made, const Config* config) {
  return call([&] {
    ncclComm& comm = check(handle);
    const int mine[] = {color, key};
    const char* const bytes = reinterpret_cast<const char*>(mine);
    const std::vector<Bytes> told = comm.tell_all(Bytes(bytes, bytes + sizeof mine));
    const std::string name = comm.id + "-" + std::to_string(comm.splits++) + "-" + std::to_string(color);
    std::vector<std::pair<int, int>> members;  // by key, then by rank
    for (int r = 0; r < comm.size; ++r) {
      int theirs[2];
      std::memcpy(theirs, told[r].data(), sizeof theirs);
      if (theirs[0] == color) members.push_back({theirs[1], r});
    }
    *made = nullptr;
    if (color < 0) return;
    std::sort(members.begin(), members.end());
    const auto found = std::find(members.begin(), members.end(), std::pair{key, comm.rank});
    const int result = start(made, name, members.size(), found - members.begin(), config);
    if (result != success) throw Failed{static_cast<Result>(result), last_error};
  });
}

API int ncclCommFinalize(Comm comm) {
  return call([&] { check(comm).finish(); });
}
API int ncclCommDestroy(Comm comm) {
  return call([&] {
    if (!comm) return;
    check(comm).finish();
    if (forget(comm)) comm->part(true);
  });
}
API int ncclCommAbort(Comm comm) {
  return call([&] {
    check(comm);
    if (forget(comm)) comm->part(false);
  });
}

API int ncclCommGetAsyncError(Comm handle, int* result) {
  return call([&] {
    ncclComm& comm = check(handle);
    const Guard lock(comm.mutex);
    *result = comm.state;
  });
}
API int ncclCommCount(Comm comm, int* count) {
  return call([&] { *count = check(comm).size; });
}
API int ncclCommUserRank(Comm comm, int* rank) {
  return call([&] { *rank = check(comm).rank; });
}
API int ncclCommCuDevice(Comm comm, int* device) {
  return call([&] { *device = check(comm).device; });
}

API int ncclGroupStart() { return ++group.depth, success; }
API int ncclGroupEnd() { return call(end_group); }

API int ncclSend(const void* from, std::size_t count, int type, int peer, Comm comm, Stream stream) {
  return enqueue(comm, {kSend, from, nullptr, count, type, {sum}, 0, peer, stream});
}
API int ncclRecv(void* to, std::size_t count, int type, int peer, Comm comm, Stream stream) {
  return enqueue(comm, {kReceive, nullptr, to, count, type, {sum}, 0, peer, stream});
}
API int ncclAllReduce(const void* from, void* to, std::size_t count, int type, int how, Comm comm,
                      Stream stream) {
  return enqueue(comm, {kAllReduce, from, to, count, type, {how}, 0, 0, stream});
}
API int ncclReduce(const void* from, void* to, std::size_t count, int type, int how, int root, Comm comm,
                   Stream stream) {
  return enqueue(comm, {kReduce, from, to, count, type, {how}, 0, root, stream});
}
API int ncclBroadcast(const void* from, void* to, std::size_t count, int type, int root, Comm comm,
                      Stream stream) {
  return enqueue(comm, {kBroadcast, from, to, count, type, {sum}, 0, root, stream});
}
API int ncclBcast(void* at, std::size_t count, int type, int root, Comm comm, Stream stream) {
  return ncclBroadcast(at, at, count, type, root, comm, stream);
}
API int ncclAllGather(const void* from, void* to, std::size_t count, int type, Comm comm, Stream stream) {
  return enqueue(comm, {kAllGather, from, to, count, type, {sum}, 0, 0, stream});
}
API int ncclReduceScatter(const void* from, void* to, std::size_t count, int type, int how, Comm comm,
                          Stream stream) {
  return enqueue(comm, {kReduceScatter, from, to, count, type, {how}, 0, 0, stream});
}
API int ncclAlltoAll(const void* from, void* to, std::size_t count, int type, Comm comm, Stream stream) {
  return enqueue(comm, {kAllToAll, from, to, count, type, {sum}, 0, 0, stream});
}
API int ncclGather(const void* from, void* to, std::size_t count, int type, int root, Comm comm,
                   Stream stream) {
  return enqueue(comm, {kGather, from, to, count, type, {sum}, 0, root, stream});
}
API int ncclScatter(const void* from, void* to, std::size_t count, int type, int root, Comm comm,
                    Stream stream) {
  return enqueue(comm, {kScatter, from, to, count, type, {sum}, 0, root, stream});
}

// `residence`: 0 if the scalar is the device's, to be read when the operation runs; 1 if it is read now.
API int ncclRedOpCreatePreMulSum(int* op, void* scalar, int type, int residence, Comm handle) {
  return call([&] {
    ncclComm& comm = check(handle);
    if (type < 0 || type >= num_types) throw Failed{invalid_argument, "no such type"};
    const Guard lock(comm.mutex);
    comm.scales.push_back({0});
    if (residence == 1) std::memcpy(comm.scales.back().data(), scalar, kSize[type]);
    comm.scale_at.push_back(residence == 1 ? comm.scales.back().data() : scalar);
    *op = num_reductions + comm.scale_at.size() - 1;
  });
}
API int ncclRedOpDestroy(int, Comm) { return success; }

API int ncclMemAlloc(void** at, std::size_t nbytes) { return cudaMalloc(at, nbytes) ? cuda_error : success; }
API int ncclMemFree(void* at) { return cudaFree(at) ? cuda_error : success; }
API int ncclCommRegister(Comm comm, void* at, std::size_t, void** handle) {
  return call([&] { check(comm), *handle = at; });
}
API int ncclCommDeregister(Comm comm, void*) {
  return call([&] { check(comm); });
}

// What callers link with and the software GPU has not: memory that peers map, and communicators that change.
#define WITHOUT(name) \
  API int name() { return last_error = #name " is not there on the software GPU", int{invalid_usage}; }
WITHOUT(ncclCommGetUniqueId)
WITHOUT(ncclCommGrow)
WITHOUT(ncclCommMemStats)
WITHOUT(ncclCommResume)
WITHOUT(ncclCommRevoke)
WITHOUT(ncclCommShrink)
WITHOUT(ncclCommSuspend)
WITHOUT(ncclCommWindowDeregister)
WITHOUT(ncclCommWindowRegister)
WITHOUT(ncclDevCommCreate)
WITHOUT(ncclDevCommDestroy)
WITHOUT(ncclGetLsaMultimemDevicePointer)
WITHOUT(ncclGetPeerDevicePointer)
WITHOUT(ncclGroupSimulateEnd)
WITHOUT(ncclPutSignal)
WITHOUT(ncclSignal)
WITHOUT(ncclWaitSignal)
WITHOUT(ncclWinGetUserPtr)
