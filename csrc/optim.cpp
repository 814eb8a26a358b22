// libtorch's fused and multi-tensor operators for optimizers, which tch
// doesn't bind.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_amp_foreach_non_finite_check_and_unscale.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_addcdiv.h>
#include <ATen/ops/_foreach_addcmul.h>
#include <ATen/ops/_foreach_clamp_max.h>
#include <ATen/ops/_foreach_clamp_min.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/_fused_sgd.h>

#include <vector>

#include "tch_peft.h"

using namespace tch_peft;

namespace {

std::vector<Tensor> collect(tp_list list) {
  std::vector<Tensor> tensors;
  for (size_t i = 0; i < list.len; i++) tensors.push_back(*list.cells[i]);
  return tensors;
}

}  // namespace

extern "C" {

char* tp_foreach_mul(tp_list self, double factor) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_mul_(collect(self), factor);
  });
}

char* tp_foreach_add(tp_list self, tp_list other, double alpha) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_add_(collect(self), collect(other), alpha);
  });
}

char* tp_foreach_add_scalar(tp_list self, double value) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_add_(collect(self), value);
  });
}

char* tp_foreach_addcmul(tp_list self, tp_list a, tp_list b, double value) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_addcmul_(collect(self), collect(a), collect(b), value);
  });
}

char* tp_foreach_addcdiv(tp_list self, tp_list a, tp_list b, double value) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_addcdiv_(collect(self), collect(a), collect(b), value);
  });
}

char* tp_foreach_clamp(tp_list self, double least, double most) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto tensors = collect(self);
    at::_foreach_clamp_min_(tensors, least);
    at::_foreach_clamp_max_(tensors, most);
  });
}

char* tp_unscale(tp_list grads, tp_tensor found_inf, tp_tensor inverse_scale) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_amp_foreach_non_finite_check_and_unscale_(collect(grads), *found_inf, *inverse_scale);
  });
}

char* tp_fused_sgd(tp_list params, tp_list grads, tp_list buffers, double weight_decay, double momentum, double lr,
                   double dampening, bool nesterov, bool is_first_step) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_fused_sgd_(collect(params), collect(grads), collect(buffers), weight_decay, momentum, lr, dampening, nesterov,
                    /*maximize=*/false, is_first_step);
  });
}
}
