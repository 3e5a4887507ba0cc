// Valid sizes for each schedule, for tests that run all of them.
#pragma once

#include "schedule/schedule.hpp"

struct Size {
  int stages;
  int ranks;
};

// The size of a schedule on `ranks` ranks with `chunks` stages each, or the nearest valid size.
inline Size size_of(const pe::Schedule& schedule, int ranks, int chunks) {
  switch (schedule.layout) {
    case pe::Layout::Linear:
      return {ranks, ranks};
    case pe::Layout::Looped:
      return {ranks * chunks, ranks};
    case pe::Layout::V:
      return {2 * ranks, ranks};
    case pe::Layout::Bidirectional:
      return {ranks + ranks % 2, ranks + ranks % 2};
  }
  return {};
}
