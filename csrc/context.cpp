// What runs around a piece of a graph: autocast, a nested backward pass, and
// gradients set by hand.
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/engine.h>

#include "tch_peft.h"

using namespace tch_peft;

namespace {
c10::DeviceType type_of(int device) { return device < 0 ? c10::kCPU : c10::kCUDA; }
}  // namespace

extern "C" {

// Sets autocast of the device's type on this thread; answers what was before.
tp_autocast tp_set_autocast(int device, tp_autocast to) {
  const auto type = type_of(device);
  const tp_autocast before{at::autocast::is_autocast_enabled(type),
                           static_cast<int>(at::autocast::get_autocast_dtype(type))};
  at::autocast::set_autocast_enabled(type, to.enabled);
  if (to.kind >= 0) at::autocast::set_autocast_dtype(type, static_cast<at::ScalarType>(to.kind));
  return before;
}

// Cast weights are kept until the outermost region on this thread ends.
void tp_autocast_enter() { at::autocast::increment_nesting(); }
void tp_autocast_leave() {
  if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
}

bool tp_set_autocast_cache(bool on) {
  const bool before = at::autocast::is_autocast_cache_enabled();
  at::autocast::set_autocast_cache_enabled(on);
  return before;
}

// A backward pass within another. Gradients end up in leaves, so the outer
// one must not be asked for the gradients of chosen inputs.
char* tp_backward(tp_tensor output, tp_tensor grad) {
  return guarded([&] {
    TORCH_CHECK(torch::autograd::Engine::get_default_engine().is_checkpoint_valid(),
                "a checkpointed function works with `backward` only: gradients of chosen inputs (`run_backward`) "
                "would miss the parameters used inside it");
    torch::autograd::backward({*output}, {*grad});
  });
}

char* tp_set_grad(tp_tensor parameter, tp_tensor grad) {
  return guarded([&] { parameter->mutable_grad() = grad ? *grad : Tensor(); });
}
}
