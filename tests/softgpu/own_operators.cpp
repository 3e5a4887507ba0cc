// Operators with a kernel of their own: those that the CPU has not, those that copy, and those that make
// memory.
#include <ATen/cuda/EmptyTensor.h>
#include <ATen/native/TensorFactories.h>

#include <cstdlib>
#include <cstring>
#include <tuple>

#include "operators.hpp"

namespace softgpu {
namespace {

// Copies between the host and devices take the runtime's calls, as torch's own do.
Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  const BelowAutograd below;
  if (self.is_cuda() && source.is_cuda()) {
    if (self.device() == source.device()) {
      const c10::DeviceGuard guard(self.device());
      const Tensor to = on_host(self), from = on_host(source);
      submit("copy_", [to, from] { Tensor(to).copy_(from); });
      return self;
    }
    if (self.dtype() != source.dtype() || !source.is_contiguous() || !self.is_contiguous() ||
        self.sizes() != source.sizes()) {
      const Tensor plain = source.to(self.scalar_type()).expand(self.sizes()).contiguous();
      Tensor there = self.is_contiguous() ? self : at::empty(self.sizes(), self.options());
      at::native::copy_(there, plain, non_blocking);
      return there.is_same(self) ? self : self.copy_(there);
    }
  }
  return at::native::copy_(self, source, non_blocking);
}

// There is no fused attention.
std::int64_t sdp_choice(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                        std::optional<double>, bool) {
  return 0;
}

std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double p, std::optional<bool> train) {
  const BelowAutograd below;
  const c10::DeviceGuard guard(input.device());
  const bool drops = !train || *train;
  Tensor output = at::empty_like(input);
  Tensor mask = at::empty_like(input, input.options().dtype(at::kBool));
  const Tensor in = on_host(input), out = on_host(output), kept = on_host(mask);
  std::optional<Randomness> randomness;
  if (drops) randomness = draw(std::nullopt);
  submit("native_dropout", [=] {
    if (randomness) {
      Tensor(kept).bernoulli_(1 - p, randomness->generator());
      Tensor(out).copy_(in * kept * (p == 1 ? 0.0 : 1 / (1 - p)));
    } else {
      Tensor(kept).fill_(1);
      Tensor(out).copy_(in);
    }
  });
  return {output, mask};
}

// A step of an LSTM: torch's CPU kernels have none in one piece. `gates` are of the inputs and of the hidden
// state, each with or without a bias; the workspace keeps what the backward needs.
using OptionalTensor = std::optional<Tensor>;

OptionalTensor host_of(const OptionalTensor& tensor) {
  return tensor && tensor->defined() ? OptionalTensor(on_host(*tensor)) : std::nullopt;
}

Tensor sum_of(const Tensor& inputs, const Tensor& hidden, const OptionalTensor& b, const OptionalTensor& c) {
  Tensor gates = inputs + hidden;
  if (b) gates = gates + *b;
  if (c) gates = gates + *c;
  return gates;
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input_gates, const Tensor& hidden_gates,
                                             const Tensor& cx, const OptionalTensor& input_bias,
                                             const OptionalTensor& hidden_bias) {
  const BelowAutograd below;
  const c10::DeviceGuard guard(input_gates.device());
  Tensor workspace = at::empty_like(input_gates, at::MemoryFormat::Contiguous);
  Tensor hy = at::empty_like(cx, at::MemoryFormat::Contiguous), cy = at::empty_like(hy);
  const Tensor ig = on_host(input_gates), hg = on_host(hidden_gates), c = on_host(cx);
  const OptionalTensor ib = host_of(input_bias), hb = host_of(hidden_bias);
  const Tensor to_h = on_host(hy), to_c = on_host(cy), kept = on_host(workspace);
  submit("_thnn_fused_lstm_cell", [=] {
    const auto gates = sum_of(ig, hg, ib, hb).chunk(4, 1);
    const Tensor i = gates[0].sigmoid(), f = gates[1].sigmoid(), g = gates[2].tanh(), o = gates[3].sigmoid();
    const Tensor next = f * c + i * g;
    Tensor(to_c).copy_(next);
    Tensor(to_h).copy_(o * next.tanh());
    Tensor(kept).copy_(at::cat({i, f, g, o}, 1));
  });
  return {hy, cy, workspace};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const OptionalTensor& grad_hy,
                                                      const OptionalTensor& grad_cy, const Tensor& cx,
                                                      const Tensor& cy, const Tensor& workspace,
                                                      bool has_bias) {
  if (!(grad_hy && grad_hy->defined()) && !(grad_cy && grad_cy->defined())) return {};
  const BelowAutograd below;
  const c10::DeviceGuard guard(workspace.device());
  Tensor grad_gates = at::empty_like(workspace, at::MemoryFormat::Contiguous);
  Tensor grad_cx = at::empty_like(cx, at::MemoryFormat::Contiguous);
  Tensor grad_bias = has_bias ? at::empty({workspace.size(1)}, workspace.options()) : Tensor();
  const OptionalTensor gh = host_of(grad_hy), gc = host_of(grad_cy);
  const Tensor c = on_host(cx), next = on_host(cy), kept = on_host(workspace);
  const Tensor to_gates = on_host(grad_gates), to_c = on_host(grad_cx), to_bias = on_host(grad_bias);
  submit("_thnn_fused_lstm_cell_backward_impl", [=] {
    const auto gates = kept.chunk(4, 1);
    const Tensor &i = gates[0], &f = gates[1], &g = gates[2], &o = gates[3];
    const Tensor t = next.tanh();
    Tensor of_c = at::zeros_like(c);
    if (gc) of_c = of_c + *gc;
    if (gh) of_c = of_c + *gh * o * (1 - t * t);
    const Tensor of_o = gh ? *gh * t * o * (1 - o) : at::zeros_like(o);
    const Tensor all =
        at::cat({of_c * g * i * (1 - i), of_c * c * f * (1 - f), of_c * i * (1 - g * g), of_o}, 1);
    Tensor(to_gates).copy_(all);
    Tensor(to_c).copy_(of_c * f);
    if (has_bias) Tensor(to_bias).copy_(all.sum(0));
  });
  return {grad_gates, grad_cx, grad_bias};
}

// A step of a GRU, as above. The workspace keeps both gates, the candidate, the state and the hidden part.
std::tuple<Tensor, Tensor> gru_cell(const Tensor& input_gates, const Tensor& hidden_gates, const Tensor& hx,
                                    const OptionalTensor& input_bias, const OptionalTensor& hidden_bias) {
  const BelowAutograd below;
  const c10::DeviceGuard guard(hx.device());
  Tensor workspace = at::empty({hx.size(0), hx.size(1) * 5}, hx.options());
  Tensor hy = at::empty_like(hx, at::MemoryFormat::Contiguous);
  const Tensor ig = on_host(input_gates), hg = on_host(hidden_gates), h = on_host(hx);
  const OptionalTensor ib = host_of(input_bias), hb = host_of(hidden_bias);
  const Tensor to_h = on_host(hy), kept = on_host(workspace);
  submit("_thnn_fused_gru_cell", [=] {
    const auto in = (ib ? ig + *ib : ig).chunk(3, 1), hidden = (hb ? hg + *hb : hg).chunk(3, 1);
    const Tensor r = (in[0] + hidden[0]).sigmoid(), z = (in[1] + hidden[1]).sigmoid();
    const Tensor n = (in[2] + r * hidden[2]).tanh();
    Tensor(to_h).copy_(n + z * (h - n));
    Tensor(kept).copy_(at::cat({r, z, n, h, hidden[2]}, 1));
  });
  return {hy, workspace};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& grad_hy,
                                                                     const Tensor& workspace, bool has_bias) {
  const BelowAutograd below;
  const c10::DeviceGuard guard(workspace.device());
  const auto width = workspace.size(1) / 5;
  Tensor grad_in = at::empty({workspace.size(0), width * 3}, workspace.options());
  Tensor grad_hidden = at::empty_like(grad_in), grad_hx = at::empty_like(grad_hy, at::MemoryFormat::Contiguous);
  Tensor in_bias = has_bias ? at::empty({width * 3}, workspace.options()) : Tensor();
  Tensor hidden_bias = has_bias ? at::empty_like(in_bias) : Tensor();
  const Tensor g = on_host(grad_hy), kept = on_host(workspace);
  const Tensor to_in = on_host(grad_in), to_hidden = on_host(grad_hidden), to_h = on_host(grad_hx);
  const Tensor to_in_bias = on_host(in_bias), to_hidden_bias = on_host(hidden_bias);
  submit("_thnn_fused_gru_cell_backward", [=] {
    const auto parts = kept.chunk(5, 1);
    const Tensor &r = parts[0], &z = parts[1], &n = parts[2], &h = parts[3], &hidden = parts[4];
    const Tensor of_n = g * (1 - z) * (1 - n * n), of_z = g * (h - n) * z * (1 - z);
    const Tensor of_r = of_n * hidden * r * (1 - r);
    const Tensor in = at::cat({of_r, of_z, of_n}, 1), out = at::cat({of_r, of_z, of_n * r}, 1);
    Tensor(to_in).copy_(in);
    Tensor(to_hidden).copy_(out);
    Tensor(to_h).copy_(g * z);
    if (has_bias) {
      Tensor(to_in_bias).copy_(in.sum(0));
      Tensor(to_hidden_bias).copy_(out.sum(0));
    }
  });
  return {grad_in, grad_hidden, grad_hx, in_bias, hidden_bias};
}

// New memory holds what is not a number, also where the allocator hands a block out again: a kernel of the
// stream that asked for it writes that. Who still reads the block sees it.
const bool kPoisons = [] {
  const char* const set = std::getenv("SOFTGPU_POISON");
  return set && *set == '1';
}();

Tensor poisoned(Tensor made) {
  const std::size_t nbytes = made.storage().nbytes();
  if (!kPoisons || nbytes == 0) return made;
  const c10::DeviceGuard guard(made.device());
  submit("poison", [memory = made.storage().mutable_data(), nbytes] { std::memset(memory, 0xff, nbytes); });
  return made;
}

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
             std::optional<at::Device> device, std::optional<bool> pinned,
             std::optional<at::MemoryFormat> format) {
  return poisoned(at::detail::empty_cuda(size, dtype, layout, device, pinned, format));
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout> layout, std::optional<at::Device> device,
                     std::optional<bool> pinned) {
  return poisoned(at::detail::empty_strided_cuda(size, stride, dtype, layout, device, pinned));
}

}  // namespace

std::vector<std::string> install_own(torch::Library& library) {
  std::vector<std::string> names;
  const auto take_over = [&](const char* name, auto function) {
    library.impl(name, function);
    names.emplace_back(name);
  };
  take_over("copy_", TORCH_FN(copy_));
  take_over("_fused_sdp_choice", TORCH_FN(sdp_choice));
  take_over("native_dropout", TORCH_FN(native_dropout));
  take_over("_thnn_fused_lstm_cell", TORCH_FN(lstm_cell));
  take_over("_thnn_fused_lstm_cell_backward_impl", TORCH_FN(lstm_cell_backward));
  take_over("_thnn_fused_gru_cell", TORCH_FN(gru_cell));
  take_over("_thnn_fused_gru_cell_backward", TORCH_FN(gru_cell_backward));
  take_over("empty.memory_format", TORCH_FN(empty));
  take_over("empty_strided", TORCH_FN(empty_strided));
  return names;
}

}  // namespace softgpu
