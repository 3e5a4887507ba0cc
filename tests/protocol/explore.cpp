#include "protocol/explore.hpp"

#include <algorithm>
#include <deque>
#include <unordered_map>

namespace world {
namespace {

struct Hash {
  std::size_t operator()(const State& state) const { return state.high ^ state.low; }
};

class Explorer {
 public:
  explicit Explorer(std::size_t most_states) : most_states_(most_states) {}

  Explored run(const std::function<void()>& begin) {
    try {
      begin();
      arrive(0, {});
      for (; !open_.empty(); open_.pop_front()) go_on_from(open_.front());
      check_ends_are_reached();
    } catch (const Violation& violation) {
      found_.violation = violation.what();
      begin();
      tell_way();
    }
    found_.states = known_.size();
    found_.ends = ends_.size();
    return std::move(found_);
  }

 private:
  using Id = std::uint32_t;

  // A state whose options were not taken yet.
  struct Open {
    Id id;
    std::vector<Option> options;
    std::vector<std::byte> kept;
  };
  struct Arrival {
    Id from;
    Option by;
    std::size_t length;
  };

  void go_on_from(const Open& open) {
    for (const Option& option : open.options) {
      put_back(open.kept);
      last_ = {open.id, option, 0};
      go(option);
      ++found_.transitions;
      arrive(open.id, option);
    }
  }

  // Adds the state that the world is in, if it is new.
  void arrive(Id from, const Option& by) {
    const auto id = static_cast<Id>(known_.size());
    const auto [at, is_new] = known_.try_emplace(state(), id);
    edges_.emplace_back(at->second, from);
    if (!is_new) return;
    arrivals_.push_back({from, by, id == 0 ? 0 : arrivals_[from].length + 1});
    last_ = {id, {-1, 0, false}, 0};
    found_.longest = std::max(found_.longest, arrivals_[id].length);
    if (known_.size() > most_states_) {
      throw Violation("there are more than " + std::to_string(most_states_) + " states");
    }
    std::vector<Option> found = options();
    if (std::all_of(found.begin(), found.end(), [](const Option& option) { return option.is_idle; })) {
      if (!ended()) throw Violation("nobody can go on:\n" + describe());
      ends_.push_back(id);
    }
    open_.push_back({id, std::move(found), keep()});
  }

  void check_ends_are_reached() {
    std::sort(edges_.begin(), edges_.end());
    std::vector<bool> reached(known_.size());
    for (const Id end : ends_) reached[end] = true;
    std::size_t count = ends_.size();
    for (std::vector<Id> open = ends_; !open.empty();) {
      const Id to = open.back();
      open.pop_back();
      for (auto edge = std::lower_bound(edges_.begin(), edges_.end(), std::pair{to, Id{0}});
           edge != edges_.end() && edge->first == to; ++edge) {
        if (reached[edge->second]) continue;
        reached[edge->second] = true;
        open.push_back(edge->second);
        ++count;
      }
    }
    if (count < known_.size()) throw Violation("from some states no end can be reached");
  }

  // The shortest way to the last state and what was taken there, in a world that has begun again.
  void tell_way() {
    std::vector<Option> way;
    for (Id id = last_.from; id != 0; id = arrivals_[id].from) way.push_back(arrivals_[id].by);
    std::reverse(way.begin(), way.end());
    for (const Option& option : way) {
      found_.trace.push_back(option.text());
      go(option);
    }
    const std::vector<Option> next = options();
    if (std::any_of(next.begin(), next.end(), [&](const Option& option) {
          return option.thread == last_.by.thread && option.outcome == last_.by.outcome;
        })) {
      found_.trace.push_back(last_.by.text());
    }
  }

  const std::size_t most_states_;
  std::unordered_map<State, Id, Hash> known_;
  std::vector<Arrival> arrivals_;         // by state
  std::vector<std::pair<Id, Id>> edges_;  // to, from
  std::vector<Id> ends_;
  std::deque<Open> open_;
  Arrival last_{};
  Explored found_;
};

}  // namespace

Explored explore(const Rules& rules, const std::function<void()>& prepare, const std::function<void()>& body,
                 std::span<std::byte> watched, std::size_t most_states) {
  return Explorer(most_states).run([&] {
    prepare();
    begin(rules, body, watched);
  });
}

}  // namespace world
