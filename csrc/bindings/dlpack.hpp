// Where the memory of Python's tensors is, asked through DLPack.
#pragma once

#include <pybind11/pybind11.h>

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

// Asks tensors where their memory is; what it says lasts as long as it does itself, and the tensors do.
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

  PyTypeObject* type_ = nullptr;  // the last tensor's, of which the next three are known
  Exchange exchange_ = nullptr;
  pybind11::object is_neg_, is_conj_;
  std::vector<pybind11::object> capsules_;
};

}  // namespace pe
