// Finds the memory of Python's tensors through DLPack.
#pragma once

#include <pybind11/pybind11.h>

#include <memory_resource>
#include <span>
#include <string>
#include <vector>

#include "packing/dlpack.hpp"
#include "packing/strided.hpp"

namespace pe {

// The name of an argument in errors: "tensor 3"; or "the buffer", if there is only one.
struct ArgumentName {
  const char* text;
  int index = -1;

  std::string str() const { return index < 0 ? text : text + (" " + std::to_string(index)); }
};

// Borrows the memory of tensors. Shapes and strides are valid as long as the Borrower lives.
class Borrower {
 public:
  // Throws PackingError unless it is a dense tensor in host memory whose values are the bytes stored there.
  Strided borrow(pybind11::handle tensor, ArgumentName name);

 private:
  using Exchange = int (*)(void*, dlpack::DLTensor*);

  void look_up(PyTypeObject* type);
  dlpack::DLTensor ask(pybind11::handle tensor, ArgumentName name);
  bool is_lazy(pybind11::handle tensor, const Strided& strided) const;
  const dlpack::DLTensor& ask_by_capsule(pybind11::handle tensor, ArgumentName name);
  std::span<std::int64_t> room(std::size_t n);
  std::span<const std::int64_t> copied(const std::int64_t* values, std::size_t n);
  std::span<const std::int64_t> row_major(std::span<const std::int64_t> shape);

  PyTypeObject* type_ = nullptr;  // of the last tensor; exchange_ and is_neg_ belong to this type
  Exchange exchange_ = nullptr;
  pybind11::object is_neg_;
  std::vector<pybind11::object> capsules_;
  std::pmr::monotonic_buffer_resource memory_;  // for shapes and strides
};

}  // namespace pe
