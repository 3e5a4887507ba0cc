// What happens to one microbatch at one stage, and its text form.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace pe {

enum class Kind : std::uint8_t {
  F,  // forward
  B,  // full backward
  I,  // input-gradient part of the backward
  W,  // weight-gradient part of the backward
  SendF,
  RecvF,
  SendB,
  RecvB,
  ReduceGrad,
  Unshard,
  Reshard,
};
inline constexpr int kNumKinds = 11;

// A rank's two ordered queues of work.
enum class Stream : std::uint8_t { Forward, Backward };

inline constexpr std::int32_t kNoMicrobatch = -1;

struct Action {
  std::int32_t stage = 0;
  std::int32_t microbatch = kNoMicrobatch;  // kNoMicrobatch: the action concerns the whole stage
  Kind kind = Kind::F;
  bool joins_next = false;  // first half of an overlapped pair, "(2F0;1B3)OVERLAP_F_B"

  friend bool operator==(const Action&, const Action&) = default;
};

// Raised for a plan that cannot be built. Users see the text.
struct PlanError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string_view kind_name(Kind kind);
Kind kind_of(std::string_view name);  // throws PlanError for an unknown name
Stream stream_of(Kind kind);
bool concerns_whole_stage(Kind kind);
inline bool is_compute(Kind kind) { return kind <= Kind::W; }

// As in "2F0", "1B3", "3SEND_B1", "0UNSHARD"; leaves out `joins_next`.
std::string to_text(const Action& action);

// Reads one cell of a schedule: an action, or an overlapped pair as two joined actions. An empty cell (idle)
// has no action. Throws PlanError; the message does not know the cell's position.
std::vector<Action> parse_cell(std::string_view text);

// The cells of a list of actions; joined actions become one pair.
std::vector<std::string> to_cells(const std::vector<Action>& actions);

}  // namespace pe
