// Where the memory of Python's tensors is, asked through DLPack.
#pragma once

#include <pybind11/pybind11.h>

#include <memory_resource>
#include <span>
#include <string>
#include <vector>

#include "packing/dlpack.hpp"
#include "packing/strided.hpp"

namespace pe {

// What an argument is called in errors: "tensor 3", or "the buffer" where there is but one.
struct ArgumentName {
  const char* text;
  int index = -1;

  std::string str() const { return index < 0 ? text : text + (" " + std::to_string(index)); }
};

// Asks tensors where their memory is; what it says lasts as long as it does itself, and that memory does.
class Borrower {
 public:
  // Throws PackingError for what is not a dense tensor in host memory whose values are those that lie there.
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

  PyTypeObject* type_ = nullptr;  // the last tensor's, of which the next two are known
  Exchange exchange_ = nullptr;
  pybind11::object is_neg_;
  std::vector<pybind11::object> capsules_;
  std::pmr::monotonic_buffer_resource memory_;  // of shapes and strides
};

}  // namespace pe
