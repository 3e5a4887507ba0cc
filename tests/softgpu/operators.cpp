// torch's CUDA operators on the software GPU. Every operator that has a kernel for CUDA gets a boxed one: it
// learns the shapes of results from meta tensors, takes their memory from torch's caching allocator, and
// submits to the current stream a closure that runs the CPU's operator on the same memory.
#include "operators.hpp"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdlib>
#include <iostream>
#include <set>
#include <sstream>
#include <unordered_map>

#include "machine/kernels.hpp"

namespace softgpu {

void mark_like(const Tensor& made, const Tensor& tensor) {
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
    made.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
}

Tensor on_host(const Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  if (!tensor.is_cuda()) {
    Tensor made = tensor.clone();  // read when the operator is called
    mark_like(made, tensor);
    return made;
  }
  TORCH_CHECK(tensor.layout() == c10::kStrided, "softgpu: only strided tensors");
  Tensor made = at::from_blob(const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
                              tensor.options().device(c10::kCPU));
  if (tensor.is_conj()) made._set_conj(true);
  if (tensor.is_neg()) made._set_neg(true);
  mark_like(made, tensor);
  return made;
}

at::Generator Randomness::generator() const {
  const std::uint64_t seed = state.captured_ ? *state.seed_.ptr : state.seed_.val;
  const std::uint64_t offset =
      state.captured_ ? *state.offset_.ptr + state.offset_intragraph_ : state.offset_.val;
  const std::uint64_t mixed = seed * 0x9e3779b97f4a7c15ULL ^ (offset + 1) * 0xbf58476d1ce4e5b9ULL;
  return at::make_generator<at::CPUGeneratorImpl>(mixed);
}

Randomness draw(const std::optional<at::Generator>& given) {
  auto* const generator =
      at::get_generator_or_default<at::CUDAGeneratorImpl>(given, at::cuda::detail::getDefaultCUDAGenerator());
  const std::lock_guard lock(generator->mutex_);
  return {generator->philox_cuda_state(4)};
}

// Operators compute nothing: what is left is the host's work. Their results are what the memory held.
const bool kEmpty = [] {
  const char* const set = std::getenv("SOFTGPU_EMPTY");
  return set && *set == '1';
}();

void submit(const std::string& name, std::function<void()> body) {
  if (kEmpty) return;
  submit_kernel(c10::cuda::getCurrentCUDAStream().stream(), name.c_str(), [name, body = std::move(body)] {
    static thread_local const bool once = (at::set_num_threads(1), true);
    (void)once;
    const BelowAutograd below;
    try {
      body();
    } catch (const std::exception& error) {
      throw std::runtime_error(name + ": " + error.what());
    }
  });
}

}  // namespace softgpu

namespace {

using namespace softgpu;
using c10::IValue;
using Stack = torch::jit::Stack;

// Stays as it is: what makes and views memory, and what copies with the runtime's own calls.
const std::set<std::string> kNative = {
    "aten::resize_",
    "aten::record_stream",
    "aten::_local_scalar_dense",
    "aten::_reshape_alias",
    "aten::as_strided",
    "aten::is_set_to",
    "aten::_efficientzerotensor",
    "aten::_pin_memory",
    "aten::is_pinned",
    "aten::_has_same_storage_numel",
};
// Shapes depend on values, so the device waits for them as CUDA's do.
const std::set<std::string> kSynchronous = {
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::repeat_interleave.Tensor",
    "aten::equal",
    "aten::unique_dim_consecutive",
};

template <class F>
IValue map_tensors(const IValue& value, F&& f) {
  if (value.isTensor()) return IValue(f(value.toTensor()));
  if (value.isTensorList()) {
    c10::List<Tensor> out;
    for (const Tensor& tensor : value.toTensorVector()) out.push_back(f(tensor));
    return IValue(out);
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> out;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorList()) {
      out.push_back(tensor ? std::optional<Tensor>(f(*tensor)) : std::nullopt);
    }
    return IValue(out);
  }
  return value;
}

Tensor as_meta(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  Tensor made = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(c10::kMeta));
  mark_like(made, tensor);
  return made;
}

bool is_generator(const c10::Argument& argument) {
  const auto& type = argument.type();
  return type->kind() == c10::TypeKind::GeneratorType ||
         (type->kind() == c10::TypeKind::OptionalType &&
          type->expectRef<c10::OptionalType>().getElementType()->kind() == c10::TypeKind::GeneratorType);
}

// Which argument a return is, where it is one that has been written to.
std::optional<std::size_t> written_argument(const c10::FunctionSchema& schema, std::size_t number) {
  const auto* const alias = schema.returns()[number].alias_info();
  if (!alias) return std::nullopt;
  for (std::size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* const other = schema.arguments()[i].alias_info();
    if (other && other->beforeSets() == alias->beforeSets()) return i;
  }
  return std::nullopt;
}

void run_on_host(const c10::OperatorHandle& op, Stack& stack, const std::vector<IValue>& outputs) {
  op.callBoxed(stack);
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    if (outputs[i].isNone()) continue;  // an argument
    if (outputs[i].isTensor()) {
      const Tensor& to = outputs[i].toTensor();
      const Tensor& from = stack[i].toTensor();
      const bool left_out = from.defined() && from.numel() == 0 && to.numel() > 0;  // where nobody needs it
      if (to.defined() && from.defined() && !left_out) Tensor(to).copy_(from);
    } else if (outputs[i].isTensorList()) {
      const auto to = outputs[i].toTensorVector(), from = stack[i].toTensorVector();
      for (std::size_t j = 0; j < to.size(); ++j) Tensor(to[j]).copy_(from[j]);
    }
  }
}

// What results look like, by operator and arguments: meta functions may be in Python, and slow.
std::mutex cache_mutex;
auto& cache = *new std::unordered_map<std::string, std::vector<IValue>>;

template <class T>
void append(std::string& key, const T& value) {
  key.append(reinterpret_cast<const char*>(&value), sizeof value);
}

void append_tensor(std::string& key, const Tensor& tensor) {
  if (!tensor.defined()) {
    key += 'u';
    return;
  }
  key += tensor.is_cuda() ? 'g' : 'c';
  append(key, tensor.scalar_type());
  append(key, tensor.unsafeGetTensorImpl()->is_wrapped_number());
  append(key, tensor.dim());
  for (const auto size : tensor.sizes()) append(key, size);
  for (const auto stride : tensor.strides()) append(key, stride);
}

// None: not to be kept.
std::optional<std::string> key_of(const std::string& name, const std::vector<IValue>& arguments) {
  std::string key = name + ':';
  append(key, c10::get_default_dtype());
  std::ostringstream others;
  others.precision(17);
  for (const IValue& value : arguments) {
    if (value.isTensor() || value.isTensorList() || value.isOptionalTensorList()) {
      key += 'T';
      map_tensors(value, [&](const Tensor& tensor) {
        append_tensor(key, tensor);
        return tensor;
      });
    } else if (value.isGenerator()) {
      key += 'G';
    } else {
      others << value.tagKind() << ' ' << value << ';';
    }
  }
  return key + others.str();
}

void boxed(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const std::string name =
      op.operator_name().name +
      (op.operator_name().overload_name.empty() ? "" : "." + op.operator_name().overload_name);
  const std::size_t num_arguments = schema.arguments().size(), num_returns = schema.returns().size();
  const std::size_t first = stack->size() - num_arguments;
  const std::vector<IValue> arguments(stack->begin() + static_cast<long>(first), stack->end());
  const BelowAutograd below;

  std::optional<c10::Device> device;
  const auto look = [&](const Tensor& tensor) {
    if (tensor.defined() && tensor.is_cuda()) {
      TORCH_CHECK(!device || *device == tensor.device(), name,
                  ": expected all tensors to be on the same device, but found ", *device, " and ",
                  tensor.device());
      device = tensor.device();
    } else if (tensor.defined() && tensor.dim() > 0 && name.find("index") == std::string::npos) {
      TORCH_CHECK(false, name, ": expected all tensors to be on the same device, but found one on ",
                  tensor.device());
    }
    return tensor;
  };
  for (const IValue& value : arguments) map_tensors(value, look);
  for (const IValue& value : arguments) {
    if (!device && value.isDevice() && value.toDevice().is_cuda()) device = value.toDevice();
  }
  const c10::OptionalDeviceGuard guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream();

  const bool inner = op.hasKernelForDispatchKey(c10::DispatchKey::CPU) ||
                     op.hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd) ||
                     op.hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutogradNonFunctional) ||
                     op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd);
  TORCH_CHECK_NOT_IMPLEMENTED(inner, "softgpu: the CPU has no ", name);

  // What the host's operator is called with.
  std::optional<Randomness> randomness;
  std::optional<std::size_t> generator_at;
  Stack host;
  const auto make_host = [&] {
    for (std::size_t i = 0; i < num_arguments; ++i) {
      if (is_generator(schema.arguments()[i])) {
        generator_at = i;
        randomness = draw(arguments[i].isNone() ? std::nullopt
                                                : std::optional<at::Generator>(arguments[i].toGenerator()));
        host.emplace_back();
      } else if (arguments[i].isDevice()) {
        host.emplace_back(c10::Device(c10::kCPU));
      } else {
        host.push_back(map_tensors(arguments[i], on_host));
      }
    }
  };
  if (!kEmpty) make_host();

  bool synchronous = kSynchronous.contains(name);
  for (const auto& value : schema.returns()) {
    const auto kind = value.type()->kind();
    synchronous |= kind != c10::TypeKind::TensorType && kind != c10::TypeKind::ListType;
  }

  bool writes = false;
  for (std::size_t i = 0; i < num_arguments; ++i) {
    const auto* const alias = schema.arguments()[i].alias_info();
    if (!alias || !alias->isWrite()) continue;
    writes = true;
    if (!arguments[i].isTensorList()) continue;
    // Autograd leaves that to the kernels of lists.
    for (const Tensor& tensor : arguments[i].toTensorVector()) tensor.unsafeGetTensorImpl()->bump_version();
  }
  Stack meta;
  std::optional<std::string> key;
  bool known = false;
  if (!synchronous && !writes) {
    key = key_of(name, arguments);
    const std::lock_guard lock(cache_mutex);
    if (const auto found = cache.find(*key); found != cache.end()) {
      meta = found->second;
      known = true;
    }
  }
  // Needs no shapes: it writes to its arguments, and resizes none.
  known = known || (kEmpty && writes && op.operator_name().name.ends_with('_'));
  if (!synchronous && !known) {
    for (std::size_t i = 0; i < num_arguments; ++i) {
      if (is_generator(schema.arguments()[i])) {
        meta.emplace_back();
      } else if (arguments[i].isDevice()) {
        meta.emplace_back(c10::Device(c10::kMeta));
      } else {
        meta.push_back(map_tensors(arguments[i], as_meta));
      }
    }
    const std::vector<IValue> asked = meta;
    try {
      op.callBoxed(meta);
      if (key) {
        const std::lock_guard lock(cache_mutex);
        cache.emplace(*key, meta);
      }
      // Results that had to be resized.
      for (std::size_t i = 0; i < num_arguments; ++i) {
        const auto* const alias = schema.arguments()[i].alias_info();
        if (!alias || !alias->isWrite() || !arguments[i].isTensor()) continue;
        const Tensor target = arguments[i].toTensor();
        const Tensor& wanted = asked[i].toTensor();
        if (!target.defined() || target.sizes() == wanted.sizes()) continue;
        target.resize_(wanted.sizes());
        if (target.strides() != wanted.strides()) target.as_strided_(wanted.sizes(), wanted.strides());
        if (!kEmpty) host[i] = on_host(target);
      }
    } catch (const c10::NotImplementedError&) {
      bool in_place = true;
      for (std::size_t i = 0; i < num_returns; ++i) in_place &= written_argument(schema, i).has_value();
      if (!in_place) synchronous = true;
      meta.clear();
    }
  }

  if (synchronous) {
    if (kEmpty) make_host();
    synchronize_stream(stream.stream());
    if (generator_at) host[*generator_at] = randomness->generator();
    op.callBoxed(host);
    torch::jit::drop(*stack, num_arguments);
    for (std::size_t i = 0; i < num_returns; ++i) {
      const auto written = written_argument(schema, i);
      torch::jit::push(*stack, written ? arguments[*written] : map_tensors(host[i], [&](const Tensor& made) {
        if (!made.defined()) return made;
        Tensor out = at::empty_strided(made.sizes(), made.strides(),
                                       made.options().device(c10::Device(c10::kCUDA, stream.device_index())));
        on_host(out).copy_(made);
        return out;
      }));
    }
    return;
  }

  std::vector<IValue> results, outputs;  // `outputs` are the results' memory, or none for arguments
  for (std::size_t i = 0; i < num_returns; ++i) {
    if (const auto written = written_argument(schema, i)) {
      results.push_back(arguments[*written]);
      outputs.emplace_back();
      continue;
    }
    results.push_back(map_tensors(meta[i], [&](const Tensor& made) {
      if (!made.defined()) return made;
      return at::empty_strided(made.sizes(), made.strides(),
                               made.options().device(c10::Device(c10::kCUDA, stream.device_index())));
    }));
    outputs.push_back(map_tensors(results.back(), on_host));
  }
  submit(name, [op, host, outputs, randomness, generator_at] {
    Stack inputs = host;  // kept as they are: a graph runs this again
    if (generator_at) inputs[*generator_at] = randomness->generator();
    run_on_host(op, inputs, outputs);
  });
  torch::jit::drop(*stack, num_arguments);
  for (IValue& result : results) torch::jit::push(*stack, std::move(result));
}

struct Silent : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

// Returns how many operators it has taken over.
int install() {
  Silent silent;  // about kernels that are replaced
  const c10::WarningUtils::WarningHandlerGuard quiet(&silent);
  static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  const std::set<std::string> composite = {"aten::convolution", "aten::convolution_backward"};
  std::set<std::string> own;
  for (const std::string& name : install_own(library)) own.insert("aten::" + name);
  int count = 0;
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind("aten::", 0) != 0) continue;
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    if (!op) continue;
    const std::string full = name.name + (name.overload_name.empty() ? "" : "." + name.overload_name);
    if (!op->hasKernelForDispatchKey(c10::DispatchKey::CUDA) && !composite.contains(full)) continue;
    if (own.contains(full) || kNative.contains(full) || name.name == "aten::set_") continue;
    bool is_view = false;
    for (const auto& value : op->schema().returns()) {
      is_view |= value.alias_info() && !value.alias_info()->isWrite();
    }
    if (is_view) continue;
    library.impl(full.substr(6).c_str(), torch::CppFunction::makeFromBoxedFunction<&boxed>());
    ++count;
  }
  return count;
}

const int num_taken_over = [] {
  const int count = install();
  if (std::getenv("SOFTGPU_LOUD")) std::cerr << "softgpu: " << count << " operators\n";
  return count;
}();

}  // namespace
