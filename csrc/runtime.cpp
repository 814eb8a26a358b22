// What tch doesn't bind: generator states, the fused AdamW step, autocast's
// dtype, TorchScript's module tree; and loading CUDA.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/_fused_adamw.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <vector>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "tch_peft.h"

using namespace tch_peft;

namespace {

c10::Device device_of(int index) {
  return index < 0 ? c10::Device(c10::kCPU) : c10::Device(c10::kCUDA, static_cast<c10::DeviceIndex>(index));
}

std::vector<Tensor> collect(const tp_tensor* cells, size_t n) {
  std::vector<Tensor> list;
  for (size_t i = 0; i < n; i++) list.push_back(*cells[i]);
  return list;
}

torch::jit::Module* module_of(void* module) { return static_cast<torch::jit::Module*>(module); }

}  // namespace

extern "C" {

char* tp_generator_state(int device, tp_tensor* out) {
  return guarded([&] {
    auto generator = at::globalContext().defaultGenerator(device_of(device));
    std::lock_guard<std::mutex> lock(generator.mutex());
    *out = new Tensor(generator.get_state().clone());
  });
}

char* tp_set_generator_state(int device, tp_tensor state) {
  return guarded([&] {
    auto generator = at::globalContext().defaultGenerator(device_of(device));
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(*state);
  });
}

// Lends the Mersenne Twister of the CPU's default generator: its 624 words and
// how many of them are used up, at least one of which must be used.
char* tp_with_cpu_engine(void* context, void (*call)(void* context, uint32_t* words, size_t* used)) {
  return guarded([&] {
    auto generator = at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator());
    std::lock_guard<std::mutex> lock(generator->mutex_);
    auto engine = generator->engine();
    auto data = engine.data();
    // A seeded engine that has drawn nothing says 0 with one left.
    size_t used = data.left_ == 1 ? data.state_.size() : data.next_;
    call(context, data.state_.data(), &used);
    data.next_ = static_cast<uint32_t>(used);
    data.left_ = static_cast<int>(data.state_.size() + 1 - used);
    engine.set_data(data);
    generator->set_engine(engine);
  });
}

// Answers what was set before.
bool tp_set_deterministic(bool on) {
  auto& context = at::globalContext();
  bool before = context.deterministicAlgorithms();
  context.setDeterministicAlgorithms(on, /*warn_only=*/false);
  context.setDeterministicCuDNN(on);
  if (on) context.setBenchmarkCuDNN(false);
  // Every tile would be filled before it is unpacked.
  context.setDeterministicFillUninitializedMemory(false);
  return before;
}

// Highest, high and medium are 0, 1 and 2; answers what it was before.
char* tp_set_float32_matmul_precision(int to, int* before) {
  return guarded([&] {
    auto& context = at::globalContext();
    *before = static_cast<int>(context.float32MatmulPrecision());
    context.setFloat32MatmulPrecision(to == 0 ? "highest" : to == 1 ? "high" : "medium");
  });
}

char* tp_float32_matmul_precision(int* now) {
  return guarded([&] { *now = static_cast<int>(at::globalContext().float32MatmulPrecision()); });
}

// Whether the CPU's products of f32 may round to bf16.
bool tp_rounds_f32_products() {
  return at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL) ==
         at::Float32Precision::BF16;
}

char* tp_peak_memory(int device, int64_t* bytes) {
  return guarded([&] {
    auto stats = at::getDeviceAllocator(c10::kCUDA)->getDeviceStats(static_cast<c10::DeviceIndex>(device));
    *bytes = stats.allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)].peak;
  });
}

char* tp_reset_peak_memory(int device) {
  return guarded([&] { at::getDeviceAllocator(c10::kCUDA)->resetPeakStats(static_cast<c10::DeviceIndex>(device)); });
}

char* tp_fused_adamw(const tp_tensor* params, const tp_tensor* grads, const tp_tensor* exp_avgs,
                     const tp_tensor* exp_avg_sqs, const tp_tensor* steps, size_t n, double lr, double beta1,
                     double beta2, double weight_decay, double eps) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_fused_adamw_(collect(params, n), collect(grads, n), collect(exp_avgs, n), collect(exp_avg_sqs, n), {},
                      collect(steps, n), lr, beta1, beta2, weight_decay, eps, /*amsgrad=*/false, /*maximize=*/false);
  });
}

// The dtype that autocast asks for on this device, or -1 where it is off.
int tp_autocast_kind(int device) {
  auto type = device_of(device).type();
  return at::autocast::is_autocast_enabled(type) ? static_cast<int>(at::autocast::get_autocast_dtype(type)) : -1;
}

// Per thread; answers what was set before.
bool tp_set_graph_executor_optimize(bool on) {
  bool before = torch::jit::getGraphExecutorOptimize();
  torch::jit::setGraphExecutorOptimize(on);
  return before;
}

// `groups` is 0 for a module without such a number.
char* tp_module_types(void* module, void* sink, void (*visit)(void*, const char*, const char*, int64_t groups)) {
  return guarded([&] {
    for (const auto& item : module_of(module)->named_modules()) {
      auto name = item.value.type()->name();
      auto groups = item.value.attr("groups", c10::IValue(0));
      visit(sink, item.name.c_str(), name ? name->name().c_str() : "", groups.isInt() ? groups.toInt() : 0);
    }
  });
}

char* tp_module_buffers(void* module, void* sink, void (*visit)(void*, const char*, tp_tensor)) {
  return guarded([&] {
    for (const auto& item : module_of(module)->named_buffers()) visit(sink, item.name.c_str(), new Tensor(item.value));
  });
}

// Gives freed heap pages back to the system, where the C library can.
void tp_trim_heap() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

char* tp_module_set_training(void* module, bool on) {
  return guarded([&] { module_of(module)->train(on); });
}
}
