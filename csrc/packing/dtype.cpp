#include "packing/dtype.hpp"

#include <initializer_list>

namespace pe {
namespace {

struct Named {
  const char* name;
  DType dtype;
};

constexpr Named kNames[] = {
    {"bool", {6, 8}},
    {"uint8", kUint8},
    {"uint16", {1, 16}},
    {"uint32", {1, 32}},
    {"uint64", {1, 64}},
    {"int8", {0, 8}},
    {"int16", {0, 16}},
    {"int32", kInt32},
    {"int64", {0, 64}},
    {"float16", kFloat16},
    {"bfloat16", kBfloat16},
    {"float32", kFloat32},
    {"float64", kFloat64},
    {"float8_e4m3fn", kFloat8E4m3fn},
    {"float8_e5m2", kFloat8E5m2},
};

}  // namespace

DType dtype_of(std::string_view name) {
  for (const Named& named : kNames) {
    if (name == named.name) return named.dtype;
  }
  throw PackingError("tensors of " + std::string(name) + " cannot be packed");
}

std::string name_of(DType dtype) {
  for (const Named& named : kNames) {
    if (dtype == named.dtype) return named.name;
  }
  return "DLPack type " + std::to_string(dtype.code) + " of " + std::to_string(dtype.bits) + " bits";
}

bool is_arithmetic(DType dtype) {
  for (const DType known : {kFloat32, kBfloat16, kFloat16, kFloat64, kFloat8E4m3fn, kFloat8E5m2}) {
    if (dtype == known) return true;
  }
  return false;
}

}  // namespace pe
