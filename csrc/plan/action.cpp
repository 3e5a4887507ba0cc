#include "plan/action.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <optional>

namespace pe {
namespace {

constexpr std::array<std::string_view, kNumKinds> kNames = {
    "F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B", "REDUCE_GRAD", "UNSHARD", "RESHARD"};
constexpr std::string_view kOverlap = "OVERLAP_F_B";
constexpr std::size_t kMostJoined = 16;  // the simulator compares each two of them

std::string_view trim(std::string_view text) {
  constexpr std::string_view kSpace = " \t\r\n";
  const auto first = text.find_first_not_of(kSpace);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kSpace) - first + 1);
}

// What is given may be of any length; its begin tells which it is.
std::string shown(std::string_view text) {
  constexpr std::size_t kMost = 60;
  if (text.size() <= kMost) return "'" + std::string(text) + "'";
  std::size_t end = kMost;
  while (end > 0 && (text[end] & 0xc0) == 0x80) --end;  // between two characters of UTF-8
  return "'" + std::string(text.substr(0, end)) + "...'";
}

[[noreturn]] void refuse(std::string_view text) {
  throw PlanError(shown(text) +
                  " is not an action; write stage, kind and microbatch, as in 2F0, 1B3, 3SEND_B1, "
                  "0UNSHARD or (2F0;1B3)OVERLAP_F_B, with the kinds F B I W SEND_F RECV_F SEND_B "
                  "RECV_B REDUCE_GRAD UNSHARD RESHARD");
}

// Reads the digits `text` starts with and drops them; false when there are none or too many. The largest number
// is left out: one more than it has to be a number too.
bool take_number(std::string_view& text, std::int32_t& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || value < 0 || value == std::numeric_limits<std::int32_t>::max()) return false;
  text.remove_prefix(static_cast<std::size_t>(end - text.data()));
  return true;
}

std::optional<Kind> find_kind(std::string_view name) {
  const auto it = std::find(kNames.begin(), kNames.end(), name);
  if (it == kNames.end()) return std::nullopt;
  return static_cast<Kind>(it - kNames.begin());
}

Action parse_action(std::string_view whole) {
  Action action;
  std::string_view rest = whole;
  if (!take_number(rest, action.stage)) refuse(whole);
  const auto digits = rest.find_first_of("0123456789");
  const std::string_view name = rest.substr(0, digits);
  const auto kind = find_kind(name);
  if (!kind) refuse(whole);
  action.kind = *kind;
  rest.remove_prefix(name.size());
  if (rest.empty() != concerns_whole_stage(action.kind)) refuse(whole);
  if (!rest.empty() && (!take_number(rest, action.microbatch) || !rest.empty())) refuse(whole);
  return action;
}

}  // namespace

std::string_view kind_name(Kind kind) { return kNames[static_cast<int>(kind)]; }

Kind kind_of(std::string_view name) {
  const auto kind = find_kind(name);
  if (!kind) throw PlanError(shown(name) + " is not a kind of action");
  return *kind;
}

Stream stream_of(Kind kind) {
  switch (kind) {
    case Kind::F:
    case Kind::SendF:
    case Kind::RecvF:
    case Kind::Unshard:
      return Stream::Forward;
    default:
      return Stream::Backward;
  }
}

bool concerns_whole_stage(Kind kind) { return kind >= Kind::ReduceGrad; }

std::string to_text(const Action& action) {
  std::string text = std::to_string(action.stage);
  text += kind_name(action.kind);
  if (action.microbatch != kNoMicrobatch) text += std::to_string(action.microbatch);
  return text;
}

std::vector<Action> parse_cell(std::string_view text) {
  text = trim(text);
  if (text.empty()) return {};
  if (text.front() != '(') return {parse_action(text)};

  const auto close = text.find(')');
  if (close == std::string_view::npos || trim(text.substr(close + 1)) != kOverlap) refuse(text);
  std::vector<Action> parts;
  std::string_view inside = text.substr(1, close - 1);
  while (!inside.empty()) {
    const auto semicolon = inside.find(';');
    parts.push_back(parse_action(trim(inside.substr(0, semicolon))));
    parts.back().joins_next = true;
    if (parts.size() > kMostJoined) refuse(text);
    inside.remove_prefix(semicolon == std::string_view::npos ? inside.size() : semicolon + 1);
  }
  if (parts.size() < 2) refuse(text);
  parts.back().joins_next = false;
  return parts;
}

std::vector<std::string> to_cells(const std::vector<Action>& actions) {
  std::vector<std::string> cells;
  bool joined = false;
  for (const Action& action : actions) {
    if (joined) {
      cells.back() += ";" + to_text(action);
    } else {
      cells.push_back(action.joins_next ? "(" + to_text(action) : to_text(action));
    }
    if (joined && !action.joins_next) cells.back() += ")" + std::string(kOverlap);
    joined = action.joins_next;
  }
  return cells;
}

}  // namespace pe
