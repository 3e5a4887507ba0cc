// Access to the stand-in driver for tests of the core: its controls, and the driver's functions that torch
// would call. tests/softgpu/machine/script.cpp documents each one.
#pragma once

#include <dlfcn.h>

#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/abi.hpp"

namespace standin {

using namespace pe::cuda;
using ExecHandle = struct OpaqueExec*;

inline void* library() {
  static void* const opened = [] {
    const char* const path = std::getenv("PIPELINE_EXT_LIBCUDA");
    void* const found = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!found) throw std::runtime_error("PIPELINE_EXT_LIBCUDA has to name the stand-in driver");
    return found;
  }();
  return opened;
}

template <class Function>
void find(const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library(), name));
  if (!function) throw std::runtime_error(std::string("the stand-in driver has no ") + name);
}

template <class Function>
void find(const char* name, int version, Function& function) {
  GetProcAddress look_up = nullptr;
  find("cuGetProcAddress_v2", look_up);
  void* found = nullptr;
  if (look_up(name, &found, version, 0, nullptr) != kSuccess) {
    throw std::runtime_error(std::string("the stand-in driver hands out no ") + name);
  }
  function = reinterpret_cast<Function>(found);
}

struct Controls {
  void (*reset)(int num_devices);
  void (*fail_at)(long call, int code);
  void (*fail_sticky)(long call, int code);
  long (*num_calls)();
  const char* (*log)();
  void (*note)(const char* text);
  long (*live)(const char* kind);
  void (*discard)();
  int (*number)(void* handle);
  void (*pause)(int paused);
  void (*drain)();

  Result (*begin_capture)(StreamHandle stream, int mode);
  Result (*end_capture)(StreamHandle stream, GraphHandle* graph);
  Result (*instantiate)(ExecHandle* exec, GraphHandle graph, std::uint64_t flags);
  Result (*launch)(ExecHandle exec, StreamHandle stream);
  Result (*destroy_graph)(GraphHandle graph);
  Result (*destroy_exec)(ExecHandle exec);
  Result (*launch_host)(StreamHandle stream, void (*function)(void*), void* data);
  Result (*query)(StreamHandle stream);

  Controls() {
    find("standin_reset", reset);
    find("standin_fail_at", fail_at);
    find("standin_fail_sticky", fail_sticky);
    find("standin_num_calls", num_calls);
    find("standin_log", log);
    find("standin_note", note);
    find("standin_live", live);
    find("standin_discard", discard);
    find("standin_number", number);
    find("standin_pause", pause);
    find("standin_drain", drain);
    find("cuStreamBeginCapture", 10010, begin_capture);
    find("cuStreamEndCapture", 10000, end_capture);
    find("cuGraphInstantiateWithFlags", 11040, instantiate);
    find("cuGraphLaunch", 10000, launch);
    find("cuGraphDestroy", 10000, destroy_graph);
    find("cuGraphExecDestroy", 10000, destroy_exec);
    find("cuLaunchHostFunc", 10000, launch_host);
    find("cuStreamQuery", 2000, query);
  }

  std::vector<std::string> lines() const {
    std::vector<std::string> all;
    std::istringstream text(log());
    for (std::string line; std::getline(text, line);) all.push_back(line);
    return all;
  }
};

inline const Controls& controls() {
  static const Controls found;
  return found;
}

}  // namespace standin
