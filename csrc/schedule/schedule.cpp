#include "schedule/schedule.hpp"

namespace pe {

const std::vector<Schedule>& schedules() {
  static const std::vector<Schedule> all = {gpipe(),
                                            one_forward_one_backward(),
                                            interleaved_one_forward_one_backward(),
                                            looped_bfs(),
                                            zb_h1(),
                                            zb_h2(),
                                            zbv(),
                                            v_half(),
                                            v_min(),
                                            dualpipev(),
                                            dualpipe()};
  return all;
}

const Schedule& find_schedule(std::string_view name) {
  std::string names;
  for (const Schedule& schedule : schedules()) {
    if (schedule.name == name) return schedule;
    names += (names.empty() ? "" : ", ") + schedule.name;
  }
  throw PlanError("there is no schedule '" + std::string(name) + "'; there are " + names +
                  ", or give each rank's actions yourself");
}

}  // namespace pe
