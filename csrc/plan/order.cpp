#include "plan/order.hpp"

#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <tuple>

#include "plan/interrupt.hpp"
#include "plan/size.hpp"

namespace pe {
namespace {

struct Entry {
  int rank;
  int position;
};

// The cell of an action; an overlapped pair is one cell.
int cell_of(const std::vector<Action>& actions, int position) {
  int cell = 0;
  for (int i = 0; i < position; ++i) cell += actions[i].joins_next ? 0 : 1;
  return cell;
}

std::string where(const Order& order, Entry entry) {
  return "rank " + std::to_string(entry.rank) + ", cell " +
         std::to_string(cell_of(order[entry.rank], entry.position)) + " '" +
         to_text(order[entry.rank][entry.position]) + "'";
}

[[noreturn]] void refuse(const Order& order, Entry entry, const std::string& why) {
  throw PlanError(where(order, entry) + ": " + why + "\n" +
                  to_table(order, entry.rank, cell_of(order[entry.rank], entry.position)));
}

using Key = std::tuple<int, Kind, int>;
using Index = std::map<Key, Entry>;

std::optional<Entry> find(const Index& index, int stage, Kind kind, int microbatch) {
  const auto it = index.find({stage, kind, microbatch});
  if (it == index.end()) return std::nullopt;
  return it->second;
}

// Where each (stage, microbatch) first appears. Actions of a whole stage are at microbatch -1.
std::map<std::pair<int, int>, Entry> homes_of(const Order& order) {
  std::map<std::pair<int, int>, Entry> homes;
  for (int rank = 0; rank < static_cast<int>(order.size()); ++rank) {
    for (int i = 0; i < static_cast<int>(order[rank].size()); ++i) {
      check_interrupt(i);
      homes.try_emplace({order[rank][i].stage, order[rank][i].microbatch}, Entry{rank, i});
    }
  }
  return homes;
}

// Which rank holds each stage. If two ranks share the microbatches of every stage, in the same way for all
// stages, also the second ranks and the first microbatch that runs there.
Shape placement_of(const Order& order) {
  Shape shape;
  const auto homes = homes_of(order);
  std::map<int, Entry> first;  // by stage, of its first microbatch listed
  for (const auto& [key, entry] : homes) {
    const auto [stage, microbatch] = key;
    const auto [it, fresh] = first.try_emplace(stage, entry);
    if (fresh || it->second.rank == entry.rank) continue;
    shape.first_of_copy = std::min(shape.first_of_copy, microbatch);
  }
  for (const auto& [stage, entry] : first) {
    if (stage != static_cast<int>(shape.rank_of_stage.size())) {
      refuse(order, entry,
             "stage " + std::to_string(shape.rank_of_stage.size()) +
                 " appears nowhere; stages are numbered from 0 without gaps");
    }
    shape.rank_of_stage.push_back(entry.rank);
    const auto copy = homes.find({stage, shape.first_of_copy});
    if (copy != homes.end()) shape.rank_of_copy.push_back(copy->second.rank);
  }
  shape.num_stages = static_cast<int>(shape.rank_of_stage.size());
  const bool copied = std::equal(shape.rank_of_stage.begin(), shape.rank_of_stage.end(),
                                 shape.rank_of_copy.begin(), shape.rank_of_copy.end(), std::not_equal_to{});
  if (!copied) {
    shape.rank_of_copy.clear();
    shape.first_of_copy = Shape{}.first_of_copy;
  }
  for (int rank = 0; rank < static_cast<int>(order.size()); ++rank) {
    for (int i = 0; i < static_cast<int>(order[rank].size()); ++i) {
      check_interrupt(i);
      const Action& a = order[rank][i];
      const int home = shape.rank_of(a.stage, a.microbatch);
      if (home == rank) continue;
      if (copied) {
        refuse(order, {rank, i},
               "it belongs on rank " + std::to_string(home) +
                   "; each stage lives on two ranks, of which the second runs all microbatches from " +
                   std::to_string(shape.first_of_copy) + " on and the first all else");
      }
      refuse(order, {rank, i},
             "stage " + std::to_string(a.stage) + " is already on rank " + std::to_string(home) + " (" +
                 where(order, first.at(a.stage)) + "); a stage lives on one rank");
    }
  }
  return shape;
}

Index index_of(const Order& order) {
  Index index;
  for (int rank = 0; rank < static_cast<int>(order.size()); ++rank) {
    for (int i = 0; i < static_cast<int>(order[rank].size()); ++i) {
      check_interrupt(i);
      const Action& a = order[rank][i];
      if (concerns_whole_stage(a.kind) && a.kind != Kind::ReduceGrad) continue;
      const auto [it, fresh] = index.try_emplace({a.stage, a.kind, a.microbatch}, Entry{rank, i});
      if (!fresh) refuse(order, {rank, i}, "already listed as " + where(order, it->second));
    }
  }
  return index;
}

// If both actions are listed, `before` must come first.
void require_order(const Order& order, const Index& index, int stage, int microbatch, Kind before, Kind after) {
  const auto first = find(index, stage, before, microbatch);
  const auto second = find(index, stage, after, microbatch);
  if (first && second && first->position > second->position) {
    refuse(order, *second,
           "needs " + to_text({stage, microbatch, before}) + ", which comes only later, as " +
               where(order, *first));
  }
}

void require_partner(const Order& order, const Index& index, Entry entry, int stage, Kind kind) {
  const Action& a = order[entry.rank][entry.position];
  if (!find(index, stage, kind, a.microbatch)) {
    refuse(order, entry, "its partner " + to_text({stage, a.microbatch, kind}) + " appears nowhere");
  }
}

void check_messages(const Order& order, const Index& index, int num_stages) {
  std::size_t turn = 0;
  for (const auto& [key, entry] : index) {
    check_interrupt(turn++);
    const auto [stage, kind, microbatch] = key;
    const bool last = stage + 1 == num_stages;
    if ((last && (kind == Kind::SendF || kind == Kind::RecvB)) ||
        (stage == 0 && (kind == Kind::RecvF || kind == Kind::SendB))) {
      refuse(order, entry, "stage " + std::to_string(stage) + " has no neighbour on that side");
    }
    if (kind == Kind::SendF) require_partner(order, index, entry, stage + 1, Kind::RecvF);
    if (kind == Kind::RecvF) require_partner(order, index, entry, stage - 1, Kind::SendF);
    if (kind == Kind::SendB) require_partner(order, index, entry, stage - 1, Kind::RecvB);
    if (kind == Kind::RecvB) require_partner(order, index, entry, stage + 1, Kind::SendB);
  }
}

}  // namespace

Order parse_order(const Cells& cells) {
  Order order(cells.size());
  for (std::size_t rank = 0; rank < cells.size(); ++rank) {
    for (std::size_t cell = 0; cell < cells[rank].size(); ++cell) {
      check_interrupt(cell);
      try {
        for (const Action& action : parse_cell(cells[rank][cell])) order[rank].push_back(action);
      } catch (const PlanError& error) {
        throw PlanError("rank " + std::to_string(rank) + ", cell " + std::to_string(cell) + ": " +
                        error.what());
      }
    }
  }
  return order;
}

Cells to_cells(const Order& order) {
  Cells cells;
  for (const auto& actions : order) cells.push_back(to_cells(actions));
  return cells;
}

Order order_from_csv(std::string_view text) {
  Cells cells;
  while (!text.empty()) {
    const auto newline = text.find('\n');
    std::string_view line = text.substr(0, newline);
    text.remove_prefix(newline == std::string_view::npos ? text.size() : newline + 1);
    if (text.empty() && line.find_first_not_of(" \t\r") == std::string_view::npos) break;
    auto& row = cells.emplace_back();
    check_interrupt(cells.size());
    for (;;) {
      const auto comma = line.find(',');
      row.emplace_back(line.substr(0, comma));
      if (comma == std::string_view::npos) break;
      line.remove_prefix(comma + 1);
    }
  }
  return parse_order(cells);
}

std::string to_csv(const Order& order) {
  std::string text;
  for (const auto& row : to_cells(order)) {
    for (std::size_t i = 0; i < row.size(); ++i) text += (i ? "," : "") + row[i];
    text += '\n';
  }
  return text;
}

Shape validate(const Order& order) {
  Shape shape = placement_of(order);
  if (shape.num_stages == 0) {
    throw PlanError("the schedule holds no action; give each rank its list, as in 0F0, 0B0");
  }
  const Index index = index_of(order);
  std::size_t turn = 0;
  for (const auto& [key, entry] : index) {
    check_interrupt(turn++);
    const auto [stage, kind, microbatch] = key;
    shape.num_microbatches = std::max(shape.num_microbatches, microbatch + 1);
    shape.has_backward |= kind == Kind::B || kind == Kind::I || kind == Kind::W;
    if (is_compute(kind) && !find(index, stage, Kind::F, microbatch)) {
      refuse(order, entry,
             "stage " + std::to_string(stage) + " has no F for microbatch " + std::to_string(microbatch));
    }
  }
  if (shape.num_microbatches == 0) {
    throw PlanError(
        "the schedule holds actions of whole stages only (UNSHARD, RESHARD, REDUCE_GRAD) and none of a "
        "microbatch; "
        "give each rank its list, as in 0F0, 0B0");
  }
  check_size(shape.num_stages, static_cast<int>(order.size()), shape.num_microbatches);
  // An error about a missing action marks the first one that is listed for its stage.
  std::vector<Entry> first(shape.num_stages, Entry{-1, 0});
  for (int rank = 0; rank < static_cast<int>(order.size()); ++rank) {
    for (int i = static_cast<int>(order[rank].size()) - 1; i >= 0; --i) {
      first[order[rank][i].stage] = {rank, i};
    }
  }
  for (int s = 0; s < shape.num_stages; ++s) {
    for (int m = 0; m < shape.num_microbatches; ++m) {
      check_interrupt(m);
      const auto f = find(index, s, Kind::F, m);
      const auto b = find(index, s, Kind::B, m);
      const auto i = find(index, s, Kind::I, m);
      const auto w = find(index, s, Kind::W, m);
      if (!f) {
        refuse(order, first[s], "stage " + std::to_string(s) + " has no F for microbatch " + std::to_string(m));
      }
      if (b && (i || w)) {
        refuse(order, *b,
               "the backward is listed whole and as " + to_text({s, m, i ? Kind::I : Kind::W}) +
                   "; use B, or I and W");
      }
      if (shape.has_backward && !b && !(i && w)) {
        refuse(order,
               i   ? *i
               : w ? *w
                   : *f,
               "stage " + std::to_string(s) + " has no " +
                   (i   ? "W"
                    : w ? "I"
                        : "B") +
                   " for microbatch " + std::to_string(m));
      }
      for (const Kind backward : {Kind::B, Kind::I, Kind::W}) {
        require_order(order, index, s, m, Kind::F, backward);
        require_order(order, index, s, m, Kind::RecvB, backward);
        require_order(order, index, s, m, backward, backward == Kind::W ? Kind::W : Kind::SendB);
      }
      require_order(order, index, s, m, Kind::I, Kind::W);
      require_order(order, index, s, m, Kind::RecvF, Kind::F);
      require_order(order, index, s, m, Kind::F, Kind::SendF);
    }
  }
  check_messages(order, index, shape.num_stages);
  return shape;
}

void refuse_action(const Order& order, int rank, int position, const std::string& why) {
  refuse(order, {rank, position}, why);
}

std::string to_table(const Order& order, int marked_rank, int marked_cell) {
  const Cells cells = to_cells(order);
  std::size_t rows = 0;
  std::vector<std::size_t> width;
  for (std::size_t rank = 0; rank < cells.size(); ++rank) {
    rows = std::max(rows, cells[rank].size());
    std::size_t widest = std::string("rank " + std::to_string(rank)).size();
    for (const auto& cell : cells[rank]) widest = std::max(widest, cell.size());
    width.push_back(widest);
  }
  // Of a large schedule, show only what is around the error.
  constexpr int kContext = 8;
  const auto around = [&](int marked, std::size_t all) {
    const int count = static_cast<int>(all);
    return marked < 0 ? std::pair(0, count)
                      : std::pair(std::max(0, marked - kContext), std::min(count, marked + kContext + 1));
  };
  const auto [first_rank, end_rank] = around(marked_rank, cells.size());
  std::string text(6, ' ');
  const auto pad = [&](const std::string& cell, std::size_t to) {
    text += "  " + cell + std::string(to - cell.size(), ' ');
  };
  const auto end_line = [&] {
    text.erase(text.find_last_not_of(' ') + 1);
    text += '\n';
  };
  for (int rank = first_rank; rank < end_rank; ++rank) pad("rank " + std::to_string(rank), width[rank]);
  end_line();
  const auto [from, to] = around(marked_cell, rows);
  for (int row = from; row < to; ++row) {
    const std::string number = std::to_string(row);
    text += std::string(6 - std::min<std::size_t>(6, number.size()), ' ') + number;
    for (int rank = first_rank; rank < end_rank; ++rank) {
      pad(row < static_cast<int>(cells[rank].size()) ? cells[rank][row] : "", width[rank]);
    }
    if (row == marked_cell) text += "  <-- ERROR HERE (rank " + std::to_string(marked_rank) + ")";
    end_line();
  }
  return text;
}

}  // namespace pe
