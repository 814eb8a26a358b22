// What the kernels take from libtorch: its threads, oneDNN's product, and the
// factors of `addmm`, which tch leaves out.
#include <ATen/TensorIterator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <stdexcept>

#include "tch_peft.h"

using namespace tch_peft;

namespace {

using Scalars = c10::List<std::optional<at::Scalar>>;
using LinearPointwise = Tensor(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                               std::string_view attr, Scalars scalars, std::optional<std::string_view> algorithm);

// Nothing where libtorch was built without oneDNN.
std::optional<c10::OperatorHandle> find_onednn() {
  auto op = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  if (op && !op->hasKernelForDispatchKey(c10::DispatchKey::CPU)) return std::nullopt;
  return op;
}

const std::optional<c10::OperatorHandle>& onednn() {
  static const auto op = find_onednn();
  return op;
}

}  // namespace

extern "C" {

// Calls `call(context, begin, end)` for ranges that make up 0..n, on
// libtorch's own threads. `at::parallel_for` is a template that needs the very
// OpenMP that libtorch was built with; a tensor iterator takes the same way
// from inside libtorch.
char* tp_parallel_for(size_t n, void* context, bool (*call)(void*, size_t begin, size_t end, std::string* error)) {
  return guarded([&] {
    auto items = at::empty({static_cast<int64_t>(n)}, at::TensorOptions(at::kByte));
    auto base = static_cast<char*>(items.data_ptr());
    auto iter = at::TensorIterator::borrowing_nullary_op(items);
    iter.for_each(
        [&](char** data, const int64_t*, int64_t size) {
          auto begin = static_cast<size_t>(data[0] - base);
          std::string error;
          if (!call(context, begin, begin + static_cast<size_t>(size), &error)) throw std::runtime_error(error);
        },
        /*grain_size=*/1);
  });
}

bool tp_has_onednn() { return onednn().has_value(); }

// x · wᵀ: x (n, in), w (out, in), both f32 or bf16 on the CPU.
char* tp_onednn_linear(tp_tensor x, tp_tensor w, tp_tensor* out) {
  return guarded([&] {
    TORCH_CHECK(onednn(), "this libtorch has no oneDNN");
    static const auto op = onednn()->typed<LinearPointwise>();
    *out = new Tensor(op.call(*x, *w, std::nullopt, "none", Scalars(), ""));
  });
}

// out = beta · out + alpha · a · b; with beta = 0 whatever is in `out` is ignored.
char* tp_addmm(tp_tensor out, tp_tensor a, tp_tensor b, double beta, double alpha) {
  return guarded([&] { at::addmm_out(*out, *out, *a, *b, beta, alpha); });
}
}
