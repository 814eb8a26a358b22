// The weight hook: a weight tensor that carries a site of Rust's.
//
// An adapted weight is a storage-less TensorImpl with one more dispatch key,
// whose BackendMeta owns the site. Kernels registered for that key hand the
// operators that consume weights to Rust; a boxed fallback serves every other
// operator with the dense effective value, and refuses those that would write.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "tch_peft.h"

namespace tch_peft {
namespace {

// Free in libtorch (no kernel is registered for it) and above Autograd,
// Autocast and the backends, on every device. docs/hook.md has the reasons.
constexpr auto KEY = c10::DispatchKey::TESTING_ONLY_GenericWrapper;

// CUDA is loaded before `main`, by the file that every user of the hook links.
[[maybe_unused]] const char* const cuda_at_start = tp_cuda_status();

// A view of all matrices of a weight, not of one of a stack.
constexpr int64_t WHOLE = -1;

// Owns Rust's site, or borrows that of the weight of which it is a view: one
// matrix of a stack, and with rows and columns exchanged.
struct Site final : c10::BackendMeta {
  const tp_site_calls* calls;
  void* rust;
  c10::intrusive_ptr<Site> origin;
  int64_t matrix = WHOLE;
  bool transposed = false;
  Site(const tp_site_calls* calls, void* rust) : calls(calls), rust(rust) {}
  Site(c10::intrusive_ptr<Site> of, int64_t matrix, bool transposed)
      : calls(of->calls), rust(of->rust), origin(std::move(of)), matrix(matrix), transposed(transposed) {}
  ~Site() override {
    if (!origin) calls->drop(rust);
  }
};

Site* site_of(const Tensor& t) {
  if (!t.defined() || !t.unsafeGetTensorImpl()->key_set().has(KEY)) return nullptr;
  return dynamic_cast<Site*>(t.unsafeGetTensorImpl()->get_backend_meta());
}

// Runs one of Rust's calls: `call(&out, &error)`.
template <typename F>
Tensor ask(F&& call) {
  tp_tensor out = nullptr;
  std::string error;
  if (!call(&out, &error)) throw std::runtime_error(error);
  return take(out);
}

Tensor dense(const Site* site, const char* op) {
  auto value = ask([&](auto out, auto error) { return site->calls->dense(site->rust, op, out, error); });
  if (site->matrix != WHOLE) value = value.select(0, site->matrix);
  return site->transposed ? value.transpose(-2, -1) : value;
}

Tensor plain(const Tensor& t, const char* op) {
  auto site = site_of(t);
  return site ? dense(site, op) : t;
}

[[noreturn]] void refuse_write(const Site* site, const std::string& op) {
  throw std::runtime_error("`" + op + "` would write to `" + site->calls->name(site->rust) +
                           "`, an adapted weight: its values live packed in the model, so the write would be lost. "
                           "Change or load the base before it is quantised or wrapped");
}

// x · Wᵀ + bias, or x · W + bias where `transposed`, with a matrix.
Tensor product(const Site* site, const Tensor& x, const Tensor& bias, bool transposed, const char* op) {
  auto input = plain(x, op);
  auto offset = plain(bias, op);
  return ask([&](auto out, auto error) {
    return site->calls->linear(site->rust, &input, offset.defined() ? &offset : nullptr, site->matrix, transposed, out,
                               error);
  });
}

// x · W, or x · Wᵀ where `transposed` is false, with a stack of matrices.
Tensor products(const Site* site, Tensor x, bool transposed) {
  return ask([&](auto out, auto error) { return site->calls->batched(site->rust, &x, transposed, out, error); });
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  auto site = site_of(weight);
  if (site && weight.dim() == 2) return product(site, x, bias.value_or(Tensor()), site->transposed, "aten::linear");
  auto offset = bias ? std::optional<Tensor>(plain(*bias, "aten::linear")) : std::nullopt;
  return at::linear(plain(x, "aten::linear"), plain(weight, "aten::linear"), offset);
}

// `set_data` bypasses the dispatcher except for this question, which it asks
// before it overwrites the TensorImpl.
bool has_compatible_shallow_copy_type(const Tensor& self, const Tensor& from) {
  auto site = site_of(self) ? site_of(self) : site_of(from);
  refuse_write(site, "set_data");
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto& name = op.schema().name();
  const auto base = stack->size() - arguments.size();
  auto replace = [&](const Tensor& t, const c10::Argument& argument) -> std::optional<Tensor> {
    auto site = site_of(t);
    if (!site) return std::nullopt;
    if (argument.alias_info() && argument.alias_info()->isWrite()) refuse_write(site, name);
    return dense(site, name.c_str());
  };
  for (size_t i = 0; i < arguments.size(); i++) {
    auto& value = (*stack)[base + i];
    if (value.isTensor()) {
      if (auto t = replace(value.toTensor(), arguments[i])) value = *t;
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      bool changed = false;
      for (auto& item : list)
        if (auto t = replace(item, arguments[i])) item = *t, changed = true;
      if (changed) value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      bool changed = false;
      for (const std::optional<Tensor>& item : value.toOptionalTensorVector()) {
        auto t = item ? replace(*item, arguments[i]) : std::nullopt;
        changed |= t.has_value();
        list.push_back(t ? t : item);
      }
      if (changed) value = list;
    }
  }
  op.callBoxed(stack);
}

// The arguments of a boxed call, by the names in its schema.
class Arguments {
 public:
  Arguments(const c10::OperatorHandle& op, torch::jit::Stack* stack)
      : op_(op), stack_(stack), base_(stack->size() - op.schema().arguments().size()) {}

  const c10::IValue& operator[](const char* name) const { return (*stack_)[base_ + *at(name)]; }

  bool has(const char* name) const { return at(name).has_value(); }

  Tensor tensor(const char* name) const { return (*this)[name].isTensor() ? (*this)[name].toTensor() : Tensor(); }

  // A number per dimension of the kernel; a single one stands for all.
  std::vector<int64_t> numbers(const char* name, size_t dims) const {
    auto list = (*this)[name].toIntVector();
    return list.size() == 1 ? std::vector<int64_t>(dims, list[0]) : list;
  }

  void answer(Tensor result) const {
    stack_->resize(base_);
    stack_->emplace_back(std::move(result));
  }

 private:
  std::optional<int> at(const char* name) const { return op_.schema().argumentIndexWithName(name); }

  const c10::OperatorHandle& op_;
  torch::jit::Stack* stack_;
  size_t base_;
};

c10::intrusive_ptr<c10::TensorImpl> hollow(const Tensor& like, at::IntArrayRef sizes, c10::intrusive_ptr<Site> site);

// An adapted weight again, which shares the site.
Tensor view(const Tensor& weight, Site* site, at::IntArrayRef sizes, int64_t matrix, bool transposed) {
  auto origin = site->origin ? site->origin : c10::intrusive_ptr<Site>::reclaim_copy(site);
  return Tensor(hollow(weight, sizes, c10::make_intrusive<Site>(std::move(origin), matrix, transposed)));
}

// bmm, and matmul of two stacks of one size: x · W or x · Wᵀ for each matrix.
void multiply_stack(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Arguments arguments(op, stack);
  auto x = arguments.tensor("self");
  auto weight = arguments.tensor(arguments.has("mat2") ? "mat2" : "other");
  auto site = site_of(weight);
  if (!site || site_of(x) || weight.dim() != 3 || x.dim() != 3 || x.size(0) != weight.size(0))
    return fallback(op, stack);
  arguments.answer(products(site, x, !site->transposed));
}

// matmul, mm, addmm: x · W or x · Wᵀ.
void multiply(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Arguments arguments(op, stack);
  const bool add = arguments.has("mat1");
  auto x = arguments.tensor(add ? "mat1" : "self");
  auto weight = arguments.tensor(arguments.has("mat2") ? "mat2" : "other");
  auto site = site_of(weight);
  if (site && weight.dim() == 3 && !add) return multiply_stack(op, stack);
  if (!site || weight.dim() != 2 || site_of(x) || x.dim() == 0) return fallback(op, stack);
  const auto name = op.schema().name().c_str();
  if (!add) return arguments.answer(product(site, x, {}, !site->transposed, name));
  auto bias = plain(arguments.tensor("self"), name);
  auto beta = arguments["beta"].toScalar(), alpha = arguments["alpha"].toScalar();
  if (beta.equal(1) && alpha.equal(1) && bias.dim() == 1 && bias.size(0) == weight.size(1))
    return arguments.answer(product(site, x, bias, !site->transposed, name));
  auto y = product(site, x, {}, !site->transposed, name);
  y = alpha.equal(1) ? y : y.mul(alpha);
  arguments.answer(beta.equal(0) ? y : y.add(bias, beta));
}

// t, transpose, numpy_T, mT: rows for columns, of a matrix or of each of a stack.
void transpose(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Arguments arguments(op, stack);
  auto weight = arguments.tensor("self");
  auto site = site_of(weight);
  const auto dims = weight.dim();
  bool swaps = site && (dims == 2 || dims == 3);
  if (swaps && arguments.has("dim0")) {
    const auto a = at::maybe_wrap_dim(arguments["dim0"].toInt(), dims);
    const auto b = at::maybe_wrap_dim(arguments["dim1"].toInt(), dims);
    swaps = std::min(a, b) == dims - 2 && std::max(a, b) == dims - 1;
  } else if (dims == 3) {
    swaps = swaps && op.schema().name() == "aten::mT";
  }
  if (!swaps) return fallback(op, stack);
  auto sizes = weight.sizes().vec();
  std::swap(sizes[dims - 2], sizes[dims - 1]);
  arguments.answer(view(weight, site, sizes, site->matrix, !site->transposed));
}

// w[i] of a stack: one of its matrices.
void select(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Arguments arguments(op, stack);
  auto weight = arguments.tensor("self");
  auto site = site_of(weight);
  const auto dim = arguments["dim"].toInt();
  auto index = arguments["index"].toInt();
  if (!site || weight.dim() != 3 || (dim != 0 && dim != -3)) return fallback(op, stack);
  if (index < 0) index += weight.size(0);
  // libtorch says what is wrong with the number.
  if (index < 0 || index >= weight.size(0)) return fallback(op, stack);
  arguments.answer(view(weight, site, weight.sizes().slice(1), index, site->transposed));
}

void embedding(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Arguments arguments(op, stack);
  auto site = site_of(arguments.tensor("weight"));
  auto indices = arguments.tensor("indices");
  if (!site || site->matrix != WHOLE || site->transposed || site_of(indices)) return fallback(op, stack);
  arguments.answer(ask([&](auto out, auto error) {
    return site->calls->embedding(site->rust, &indices, arguments["padding_idx"].toInt(),
                                  arguments["scale_grad_by_freq"].toBool(), arguments["sparse"].toBool(), out, error);
  }));
}

// Every overload of conv1d, conv2d, conv3d and convolution.
void convolution(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Arguments arguments(op, stack);
  auto weight = arguments.tensor("weight");
  auto site = site_of(weight);
  auto x = arguments.tensor("input");
  if (!site || site->transposed || weight.dim() < 3 || site_of(x) ||
      (arguments.has("transposed") && arguments["transposed"].toBool()))
    return fallback(op, stack);
  const size_t dims = weight.dim() - 2;
  auto bias = plain(arguments.tensor("bias"), op.schema().name().c_str());
  auto stride = arguments.numbers("stride", dims), dilation = arguments.numbers("dilation", dims);
  std::vector<int64_t> padding(dims, 0);
  if (!arguments["padding"].isString()) {
    padding = arguments.numbers("padding", dims);
  } else if (arguments["padding"].toStringRef() == "same") {
    // As libtorch: what can't be split evenly goes to the end.
    std::vector<int64_t> ends(2 * dims, 0);
    for (size_t i = 0; i < dims; i++) {
      const auto total = dilation[i] * (weight.size(i + 2) - 1);
      padding[i] = total / 2;
      ends[2 * (dims - 1 - i) + 1] = total % 2;
    }
    if (std::any_of(ends.begin(), ends.end(), [](auto n) { return n > 0; })) x = at::constant_pad_nd(x, ends);
  }
  const bool batched = x.dim() == weight.dim();
  if (!batched) x = x.unsqueeze(0);
  const tp_convolution form{stride.data(), padding.data(), dilation.data(), dims, arguments["groups"].toInt()};
  auto y = ask([&](auto out, auto error) {
    return site->calls->convolution(site->rust, &x, bias.defined() ? &bias : nullptr, &form, out, error);
  });
  arguments.answer(batched ? y : y.squeeze(0));
}

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericWrapper, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(aten, TESTING_ONLY_GenericWrapper, m) {
  m.impl("linear", TORCH_FN(linear));
  m.impl("_has_compatible_shallow_copy_type", TORCH_FN(has_compatible_shallow_copy_type));
  m.impl("embedding", torch::CppFunction::makeFromBoxedFunction<&embedding>());
  m.impl("bmm", torch::CppFunction::makeFromBoxedFunction<&multiply_stack>());
  m.impl("select.int", torch::CppFunction::makeFromBoxedFunction<&select>());
  for (auto name : {"matmul", "mm", "addmm"}) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&multiply>());
  for (auto name : {"t", "transpose.int", "numpy_T", "mT"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&transpose>());
  for (auto name : {"conv1d", "conv1d.padding", "conv2d", "conv2d.padding", "conv3d", "conv3d.padding", "convolution",
                    "_convolution", "_convolution.deprecated", "_convolution_mode"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&convolution>());
}

// No storage: raw access throws instead of reading nothing.
c10::intrusive_ptr<c10::TensorImpl> hollow(const Tensor& like, at::IntArrayRef sizes, c10::intrusive_ptr<Site> site) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, at::DataPtr(nullptr, like.device()), nullptr, false);
  storage.unsafeGetStorageImpl()->release_data_and_set_meta_custom_data_ptr_error_msg_(
      std::string("raw access to `") + site->calls->name(site->rust) +
      "`, an adapted weight that has no dense storage; use an operator (for example `w.detach()`) to get its value");
  auto impl = c10::make_intrusive<c10::TensorImpl>(std::move(storage), like.key_set().add(KEY), like.dtype());
  impl->set_sizes_contiguous(sizes);
  impl->set_backend_meta(std::move(site));
  return impl;
}

}  // namespace
}  // namespace tch_peft

using namespace tch_peft;

extern "C" {

void tp_free_message(char* text) { free(text); }

void tp_set_message(std::string* error, const char* text, size_t len) { error->assign(text, len); }

// Takes `site` in any case: it is dropped when this fails.
char* tp_attach(tp_tensor weight, const tp_site_calls* calls, void* rust) {
  auto site = c10::make_intrusive<Site>(calls, rust);
  return guarded([&] {
    TORCH_CHECK(!site_of(*weight), calls->name(rust), " is adapted already");
    TORCH_CHECK(weight->layout() == at::kStrided && weight->has_storage() && !weight->is_inference(), calls->name(rust),
                ": only plain strided tensors can be adapted");
    at::NoGradGuard no_grad;
    weight->unsafeGetTensorImpl()->shallow_copy_from(hollow(*weight, weight->sizes(), std::move(site)));
  });
}

// The weight becomes what `dense` is, on its storage, and its site is dropped.
char* tp_release(tp_tensor weight, tp_tensor dense) {
  return guarded([&] {
    TORCH_CHECK(site_of(*weight) && !site_of(*dense), "only an adapted weight can become a plain one");
    at::NoGradGuard no_grad;
    weight->unsafeGetTensorImpl()->shallow_copy_from(dense->detach().getIntrusivePtr());
  });
}

// NULL unless the weight owns a site with these calls.
void* tp_site_of(tp_tensor weight, const tp_site_calls* calls) {
  auto site = site_of(*weight);
  return site && !site->origin && site->calls == calls ? site->rust : nullptr;
}
}
