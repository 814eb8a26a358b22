// The weight hook: a weight tensor that carries a site of Rust's.
//
// An adapted weight is a storage-less TensorImpl with one more dispatch key,
// whose BackendMeta owns the site. Kernels registered for that key hand
// `linear` to Rust; a boxed fallback serves every other operator with the
// dense effective value, and refuses operators that would write.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "tch_peft.h"

namespace tch_peft {
namespace {

// Free in libtorch (no kernel is registered for it) and above Autograd,
// Autocast and the backends, on every device. docs/hook.md has the reasons.
constexpr auto KEY = c10::DispatchKey::TESTING_ONLY_GenericWrapper;

// CUDA is loaded before `main`, by the file that every user of the hook links.
[[maybe_unused]] const char* const cuda_at_start = tp_cuda_status();

struct Site final : c10::BackendMeta {
  const tp_site_calls* calls;
  void* rust;
  Site(const tp_site_calls* calls, void* rust) : calls(calls), rust(rust) {}
  ~Site() override { calls->drop(rust); }
};

Site* site_of(const Tensor& t) {
  if (!t.defined() || !t.unsafeGetTensorImpl()->key_set().has(KEY)) return nullptr;
  return dynamic_cast<Site*>(t.unsafeGetTensorImpl()->get_backend_meta());
}

Tensor dense(const Site* site, const char* op) {
  tp_tensor out = nullptr;
  std::string error;
  if (!site->calls->dense(site->rust, op, &out, &error)) throw std::runtime_error(error);
  return take(out);
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

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  auto input = plain(x, "aten::linear");
  auto offset = bias.has_value() ? plain(*bias, "aten::linear") : Tensor();
  auto site = site_of(weight);
  if (!site) return at::linear(input, weight, offset.defined() ? std::optional<Tensor>(offset) : std::nullopt);
  tp_tensor out = nullptr;
  std::string error;
  if (!site->calls->linear(site->rust, &input, offset.defined() ? &offset : nullptr, &out, &error))
    throw std::runtime_error(error);
  return take(out);
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

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericWrapper, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(aten, TESTING_ONLY_GenericWrapper, m) {
  m.impl("linear", TORCH_FN(linear));
  m.impl("_has_compatible_shallow_copy_type", TORCH_FN(has_compatible_shallow_copy_type));
}

// No storage: raw access throws instead of reading nothing.
c10::intrusive_ptr<c10::TensorImpl> hollow(const Tensor& like, c10::intrusive_ptr<Site> site) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, at::DataPtr(nullptr, like.device()), nullptr, false);
  storage.unsafeGetStorageImpl()->release_data_and_set_meta_custom_data_ptr_error_msg_(
      std::string("raw access to `") + site->calls->name(site->rust) +
      "`, an adapted weight that has no dense storage; use an operator (for example `w.detach()`) to get its value");
  auto impl = c10::make_intrusive<c10::TensorImpl>(std::move(storage), like.key_set().add(KEY), like.dtype());
  impl->set_sizes_contiguous(like.sizes());
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
    weight->unsafeGetTensorImpl()->shallow_copy_from(hollow(*weight, std::move(site)));
  });
}

// NULL unless the weight's site is one with these calls.
void* tp_site_of(tp_tensor weight, const tp_site_calls* calls) {
  auto site = site_of(*weight);
  return site && site->calls == calls ? site->rust : nullptr;
}
}
