// An autograd node whose backward is a Rust closure.
//
// Saved tensors are kept as SavedVariable, so that libtorch's own checks hold:
// a tensor changed in place after the forward pass is an error, and so is a
// second backward without retain_graph; memory is freed as backward proceeds.
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <memory>
#include <mutex>
#include <vector>

#include "tch_peft.h"

namespace tch_peft {
namespace {
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

struct RustNode final : Node {
  const tp_node_calls* calls = nullptr;
  void* rust = nullptr;
  std::vector<SavedVariable> saved;

  ~RustNode() override {
    if (rust) calls->drop(rust);
  }

  std::string name() const override { return "TchPeftLinearBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& variable : saved) variable.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!at::GradMode::is_enabled(), "an adapted linear can't be differentiated twice (create_graph)");
    const auto n = num_outputs();
    variable_list result(n);
    if (!grads[0].defined()) return result;

    variable_list kept;
    std::vector<tp_tensor> kept_cells;
    kept.reserve(saved.size());
    for (auto& variable : saved) {
      kept.push_back(variable.unpack(shared_from_this()));
      kept_cells.push_back(&kept.back());
    }
    auto needed = std::make_unique<bool[]>(n);
    for (size_t i = 0; i < n; i++) needed[i] = task_should_compute_output(i);

    std::vector<tp_tensor> cells(n, nullptr);
    std::string error;
    const bool ok = calls->backward(rust, &grads[0], kept_cells.data(), kept_cells.size(), needed.get(), cells.data(),
                                    n, &error);
    for (size_t i = 0; i < n; i++)
      if (cells[i]) result[i] = take(cells[i]);
    if (!ok) throw std::runtime_error(error);
    return result;
  }
};

variable_list collect(const tp_tensor* cells, size_t n) {
  variable_list list;
  for (size_t i = 0; i < n; i++) list.push_back(*cells[i]);
  return list;
}

}  // namespace
}  // namespace tch_peft

using namespace tch_peft;

extern "C" {

bool tp_needs_grad(const tp_tensor* inputs, size_t n) {
  if (!at::GradMode::is_enabled()) return false;
  for (size_t i = 0; i < n; i++)
    if (inputs[i]->requires_grad()) return true;
  return false;
}

// Makes `output` the result of a node over `inputs`. Takes `rust` in any case.
char* tp_record(const tp_tensor* inputs, size_t n_inputs, const tp_tensor* saved, size_t n_saved, tp_tensor output,
                const tp_node_calls* calls, void* rust) {
  std::shared_ptr<RustNode> node(new RustNode(), torch::autograd::deleteNode);
  node->calls = calls;
  node->rust = rust;
  return guarded([&] {
    auto list = collect(inputs, n_inputs);
    node->set_next_edges(torch::autograd::collect_next_edges(at::TensorList(list)));
    for (size_t i = 0; i < n_saved; i++) node->saved.emplace_back(*saved[i], /*is_output=*/false);
    torch::autograd::set_history(*output, node);
  });
}
}
